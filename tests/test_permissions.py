"""Without these, looking at somebody's run folder or configuration runs the commands that are written in it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_python
from tiny import make_shards, rows, run_jobs, tiny_config, write_config

from sdtrain import cli
from sdtrain.config.compare import dump
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError

SPLITS = ("train", "val", "test")


def piped(folder: Path, split: str) -> str:
    """A source that is a command: it leaves a file behind, so that everybody sees that it has run."""
    return f"pipe:touch {shlex.quote(str(folder / f'ran-{split}'))}; cat {shlex.quote(str(folder / 'all.tar'))}"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short evaluated run whose sources were plain and whose config.yaml somebody has changed to commands."""
    place = tmp_path_factory.mktemp("permissions")
    shards = make_shards(place / "shards")
    (place / "all.tar").write_bytes((shards / "000.tar").read_bytes())
    metrics = {"names": ["rfid"], "num_fake": 4, "num_real": 4, "seeds": 1, "tap": 64, "select_by": "rfid"}
    clock = {"total_img": 32, "log_img": 16, "save_img": 16, "eval_img": 16, "data__test": str(shards), "seed": 5}
    write_config(place / "tiny.yaml", tiny_config(shards, metrics=metrics, **clock))
    [done] = run_jobs(place, [{"args": ["--cfg", str(place / "tiny.yaml"), "--out", str(place / "run")]}])
    assert done["code"] == 0, done["said"]
    return place / "run"


@pytest.fixture
def hostile(run_folder: Path) -> Path:
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert tree["data"]["allow_pipe"] is False
    for split in SPLITS:
        tree["data"][split] = piped(run_folder.parent, split)
    (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return run_folder


def commands(run: Path) -> dict[str, list[object]]:
    own = ["--cfg", run / "config.yaml", "--out", run]
    quick = ["--cache", run.parent / "statistics", "--workers", 0]
    return {
        "plan": ["train", *own, "--plan"],
        "train": ["train", *own],
        "sample": ["sample", run, "--out", run.parent / "images", "--num", 2],
        "sample one class": ["sample", run, "--out", run.parent / "images", "--num", 2, "--class", "a"],
        "evaluate": ["evaluate", run, *quick],
        "evaluate val": ["evaluate", run, "--split", "val", *quick],
        "bench": ["bench", "--cfg", run / "config.yaml", "--steps", 1, "--resolution", 32, "--variants", "baseline"],
        "variation": ["report", run, "--variation", "--latents", 2, "--out", run.parent / "report.md"],
        "doctor": ["doctor", "--cfg", run / "config.yaml"],
    }


NAMES = list(commands(Path("run")))
REFUSING = ("plan", "train", "evaluate", "evaluate val")


@pytest.mark.parametrize("name", NAMES)
def test_no_command_runs_what_the_config_of_a_run_folder_names(
    hostile: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main([str(word) for word in commands(hostile)[name]])
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr().err
    print(name, code, said)
    assert list(hostile.parent.glob("ran-*")) == []
    if name in REFUSING:
        assert code == 2 and "would run a command; allow it with --allow-pipe" in said


def test_a_file_cannot_give_the_permission_and_the_command_line_can(tmp_path: Path) -> None:
    path = write_config(tmp_path / "a.yaml", tiny_config(tmp_path / "shards", data__allow_pipe=True))
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(ConfigError, match=r"a\.yaml:\d+: data\.allow_pipe would let this configuration run comm"):
            load_config(tmp_path / name)
    write_config(path, tiny_config(tmp_path / "shards"))
    config = load_config(path, ["data.allow_pipe=true"])
    assert config.data.allow_pipe and "allow_pipe: false" in dump(config)


@pytest.mark.parametrize("given", [["--allow-pipe"], ["--set", "data.allow_pipe=true"]])
def test_a_run_that_is_allowed_to_reads_from_a_command(run_folder: Path, tmp_path: Path, given: list[str]) -> None:
    (tmp_path / "all.tar").write_bytes((run_folder.parent / "all.tar").read_bytes())
    config: dict[str, Any] = tiny_config(tmp_path / "shards", data__train=piped(tmp_path, "train"), total_img=16)
    args = ["--cfg", str(write_config(tmp_path / "piped.yaml", config)), "--out", str(tmp_path / "run")]
    done = run_python("sdtrain/main.py", *args, *given)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran-train").exists()
    assert "allow_pipe: false" in (tmp_path / "run" / "config.yaml").read_text()
    again = run_python("sdtrain/main.py", *args)
    assert again.returncode == 2 and "would run a command" in again.stderr


def test_the_test_split_is_measured_on_latents_that_have_chosen_nothing(run_folder: Path) -> None:
    found = {row["split"]: row for row in rows(run_folder, "eval")}
    assert found["val"]["protocol"]["latents_seed"] == 5 and found["test"]["protocol"]["latents_seed"] == 6
    assert found["val"]["protocol"]["real_hash"] == found["test"]["protocol"]["real_hash"]
    assert found["val"]["seen_img"] == found["test"]["seen_img"]
    assert found["val"]["rfid"] != found["test"]["rfid"]  # the same weights and photographs: other latents alone
