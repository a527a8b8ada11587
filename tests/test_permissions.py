"""Without these, looking at somebody's run folder or configuration fetches or runs what is written in it."""

from __future__ import annotations

import http.server
import io
import shlex
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_python
from tiny import make_shards, rows, run_jobs, tiny_config, write_config

from sdtrain import cli
from sdtrain.commands.source import of_run
from sdtrain.config.compare import dump
from sdtrain.config.load import load_config, load_written
from sdtrain.errors import ConfigError
from sdtrain.serve.worker import maker_of

SPLITS = ("train", "val", "test")


def piped(folder: Path, split: str) -> str:
    """A source that is a command: it leaves a file behind, so that everybody sees that it has run."""
    return f"pipe:touch {shlex.quote(str(folder / f'ran-{split}'))}; cat {shlex.quote(str(folder / 'all.tar'))}"


def label(shards: Path) -> Path:
    """Give every picture one of two classes."""
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard, "a") as tar:
            for name in tar.getnames():
                member = tarfile.TarInfo(name.replace(".png", ".cls"))
                member.size = 1
                tar.addfile(member, io.BytesIO(b"%d" % (int(name[:4]) % 2)))
    return shards


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short evaluated run with two classes, of plain sources."""
    place = tmp_path_factory.mktemp("permissions")
    shards = label(make_shards(place / "shards"))
    (place / "all.tar").write_bytes((shards / "000.tar").read_bytes())
    metrics = {"names": ["rfid"], "num_fake": 4, "num_real": 4, "seeds": 1, "tap": 64, "select_by": "rfid"}
    clock = {"total_img": 32, "log_img": 16, "save_img": 16, "eval_img": 16, "data__test": str(shards), "seed": 5}
    classes = {f"model__{role}__num_embeddings": 2 for role in ("generator", "discriminator")}
    write_config(place / "tiny.yaml", tiny_config(shards, metrics=metrics, **clock, **classes))
    [done] = run_jobs(place, [{"args": ["--cfg", str(place / "tiny.yaml"), "--out", str(place / "run")]}])
    assert done["code"] == 0, done["said"]
    return place / "run"


@pytest.fixture(scope="module")
def asked(run_folder: Path) -> Iterator[tuple[str, list[str]]]:
    """An address on this machine that has what the run needs, and the requests that came."""
    came: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(self.path)
            super().do_GET()

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(run_folder.parent)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}", came
    httpd.shutdown()


@pytest.fixture(params=["pipe", "http"])
def hostile(run_folder: Path, asked: tuple[str, list[str]], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The run after somebody has written addresses and commands into its config.yaml."""
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert tree["data"]["allow_pipe"] is False
    for split in SPLITS:
        address = f"http://{asked[0]}/all.tar"
        tree["data"][split] = piped(run_folder.parent, split) if request.param == "pipe" else address
    tree["data"]["cache"] = str(tmp_path / "cache")
    (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return run_folder


def commands(run: Path) -> dict[str, list[object]]:
    own = ["--cfg", run / "config.yaml", "--out", run]
    quick = ["--cache", run.parent / "statistics", "--workers", 0]
    drawn = ["--out", run.parent / "images", "--num", 2]
    return {
        "plan": ["train", *own, "--plan"],
        "plan with the switch": ["train", *own, "--plan", "--allow-pipe"],
        "train": ["train", *own],
        "sample": ["sample", run, *drawn],
        "sample with the switch": ["sample", run, *drawn, "--allow-pipe"],
        "sample one class": ["sample", run, *drawn, "--class", "a"],
        "evaluate": ["evaluate", run, *quick],
        "evaluate with the switch": ["evaluate", run, *quick, "--allow-pipe"],
        "evaluate val": ["evaluate", run, "--split", "val", *quick],
        "bench": ["bench", "--cfg", run / "config.yaml", "--steps", 1, "--resolution", 32, "--variants", "baseline"],
        "variation": ["report", run, "--variation", "--latents", 2, "--out", run.parent / "report.md"],
        "interplay": ["report", run, "--interplay", "--out", run.parent / "report.md"],
        "table 3": ["report", "sdgan-table3", "--runs", run, "--latents", 2, "--out", run.parent / "report.md"],
        "figure 9": ["report", "sdgan-fig9", "--runs", run, "--out", run.parent / "report.md"],
        "doctor": ["doctor", "--cfg", run / "config.yaml"],
        "export": ["export", run, "--out", run.parent / "exported"],
        "export all": ["export", run, "--to", run.parent / "all", "--unfinished", "--format", "safetensors"],
    }


NAMES = list(commands(Path("run")))
WITHOUT_DATA = ("doctor", "export", "export all")
REFUSALS = ("a run folder, which may come from anyone", "anyone, so nothing is fetched or run for it")


@pytest.mark.parametrize("name", NAMES)
def test_no_command_fetches_or_runs_what_the_config_of_a_run_folder_names(
    hostile: Path, asked: tuple[str, list[str]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main([str(word) for word in commands(hostile)[name]])
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr().err
    assert list(hostile.parent.glob("ran-*")) == [] and asked[1] == []
    if name not in WITHOUT_DATA:
        assert code == 2 and any(sentence in said for sentence in REFUSALS), said


def test_the_page_of_a_run_fetches_and_runs_nothing(hostile: Path, asked: tuple[str, list[str]]) -> None:
    page = maker_of({"path": str(hostile), "weights": "ema", "device": "cpu", "max_image_mb": 64})
    assert page.about()["classes"] == ["0", "1"] and page({"class": "1"}, b"")[1]
    assert list(hostile.parent.glob("ran-*")) == [] and asked[1] == []


def test_what_is_typed_takes_the_place_of_what_a_run_folder_names(
    hostile: Path, asked: tuple[str, list[str]], tmp_path: Path
) -> None:
    shards, typed = str(hostile.parent / "shards"), f"http://{asked[0]}/all.tar"
    draw = ["sample", str(hostile), "--num", "2", "--out", str(tmp_path / "images")]
    assert cli.main([*draw, "--data", shards]) == 0 and len(list((tmp_path / "images").iterdir())) == 2
    assert cli.main(["evaluate", str(hostile), "--data", shards, "--real", shards, "--workers", "0"]) == 0
    assert asked[1] == []
    again = load_config(hostile / "config.yaml", [f"data.{split}={typed}" for split in SPLITS])
    assert (again.data.train, again.data.test) == (typed, typed)


ADDRESSES = [
    "pipe:touch ran",
    "http://h/a.tar",
    "s3://bucket/{000..123}.tar",
    "file:///etc/passwd",
    "{htt,no}p://h/a.tar",
    "pip{e,x}:touch ran",
    ["shards", "gs://bucket/"],
]


@pytest.mark.parametrize("source", ADDRESSES, ids=str)
def test_an_address_in_a_run_folder_is_refused_however_it_is_written(source: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is fetched or run for it; type it yourself: --real SOURCE"):
        of_run(source, "--real")
    path = write_config(tmp_path / "config.yaml", tiny_config(tmp_path, data__train=source))
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: data\.train is the address or command"):
        load_config(path)
    assert load_config(write_config(tmp_path / "mine.yaml", tiny_config(tmp_path, data__train=source)))


@pytest.mark.parametrize("source", ["a/b{0..3}.tar", "../shards", "/data/x*.tar", ["a", "b"], "data:v2/shards", None])
def test_paths_that_a_run_folder_names_are_paths(source: Any) -> None:
    assert of_run(source, "--real") == source


def test_a_configuration_that_extends_the_config_of_a_run_folder_takes_no_address_from_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run" / "config.yaml", tiny_config(tmp_path, data__train="s3://theirs/"))
    (tmp_path / "mine.yaml").write_text("base: run/config.yaml\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: data\.train is the address or command 's3://theirs/'"):
        load_config(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("base: run/config.yaml\ndata: {train: 's3://mine/'}\n")
    assert load_config(tmp_path / "mine.yaml").data.train == "s3://mine/"


def test_the_config_of_a_run_folder_extends_no_other_file(tmp_path: Path) -> None:
    write_config(tmp_path / "secret.yaml", tiny_config(tmp_path))
    (tmp_path / "config.yaml").write_text("base: secret.yaml\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:1: a run folder's config\.yaml is written whole and ext"):
        load_written(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").method == "sdgan"  # where --cfg names it


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
    own = {"data__train": piped(tmp_path, "train"), "data__labels": False, "total_img": 16}
    config: dict[str, Any] = tiny_config(tmp_path / "shards", **own)
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
