"""Without these a full disk, a remount or a folder that vanishes would end a run with a traceback, hang its other
ranks, or go unnoticed: rows, pictures or best weights would be missing in a run that looks whole.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import asked
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, unequal, write_config

USER_ERROR, END = 2, 24
KEPT = "/img_000000016 was kept; the same command goes on from there"
# where a write fails -> what the sentence names, and what it says is safe (saves are at 8, 16 and 24)
WRITES: dict[str, tuple[dict[str, Any], str, str]] = {
    "config": ({"where": "file", "word": "config.yaml"}, "config.yaml", "start the same command again"),
    "plan": ({"where": "file", "word": "plan.json"}, "plan.json", "start the same command again"),
    "environment": ({"where": "file", "word": "environment.json"}, "environment.json", "start the same command again"),
    "rows": ({"where": "rows", "word": "", "time": 3}, "metrics.jsonl", KEPT),
    "board": ({"where": "board", "word": "", "time": 40}, "tensorboard", "was kept; the same command goes on"),
    "wandb": ({"where": "file", "word": "/wandb/told.json", "time": 8}, "/wandb: ", KEPT),
    "samples": ({"where": "file", "word": "/samples/", "time": 3}, "samples/", KEPT),
    "best": ({"where": "file", "word": "/best/"}, "best/G_ema.safetensors", KEPT),
    "cache": ({"where": "file", "word": "/cache/real"}, "cache/real-", KEPT),
    "eval": ({"where": "rows", "word": "", "time": 5}, "metrics.jsonl", KEPT),
    "checkpoint": ({"where": "file", "word": "img_000000016/D"}, "checkpoints/img_000000016", "img_000000008 was kept"),
    "snapshot": ({"where": "file", "word": "/snapshots/"}, "snapshots/img_000000016", KEPT),
}
ON_TWO_RANKS = ("rows", "cache", "checkpoint")
GOING_ON = ("rows", "best", "samples")
SELDOM = ("eval", "config", "environment", "board", "wandb", "snapshot")  # in slow tests
OFTEN = [*(name for name in WRITES if name not in SELDOM), *(f"{name}2" for name in ON_TWO_RANKS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    make_shards(folder / "shards", samples=24)
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": 8, "eval_img": 16, "sample_img": 8}
    metrics = {"names": ["rfid"], "num_fake": 12, "seeds": 1, "tap": 64, "select_by": "rfid", "batch_size": 4}
    more = {"metrics": metrics, "snapshots": [0.5], "tracker": "tensorboard"}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock, **more))
    return folder


def job(place: Path, out: Path, **wishes: Any) -> dict[str, Any]:
    return {"args": ["--cfg", str(place / "tiny.yaml"), "--out", str(out)], "plain": True, **wishes}


def filled(place: Path, name: str) -> dict[str, Any]:
    wishes = {"full": WRITES[name.removesuffix("2")][0], "ranks": 1 + name.endswith("2")}
    filled_up = job(place, place / f"run_{name}", **wishes)
    return {**filled_up, "args": [*filled_up["args"], *(["--set", "tracker=wandb"] if name == "wandb" else [])]}


@pytest.fixture(scope="module")
def full(place: Path, request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    """What the ranks of each run said and how they ended; of the next start of two of them, too."""
    names, again = asked(request, OFTEN), asked(request, GOING_ON)
    jobs = [filled(place, name) for name in names]
    jobs += [job(place, place / name) for name in ("whole", *(f"run_{name}" for name in again))]
    done = [one.get("ranks", [one]) for one in run_jobs(place, jobs)]
    return dict(zip([*names, "whole", *(f"{name} again" for name in again)], done, strict=True))


@pytest.mark.parametrize("name", OFTEN)
def test_a_disk_that_fills_up_at_any_write_ends_all_ranks_with_one_sentence(
    full: dict[str, list[dict[str, Any]]], name: str
) -> None:
    check(name, full[name])


@pytest.mark.slow
def test_a_disk_that_fills_up_at_a_seldom_write_ends_all_ranks_with_one_sentence(place: Path) -> None:
    names = [*SELDOM, "samples2", "best2", "config2"]
    if not importlib.util.find_spec("wandb"):
        names.remove("wandb")
    for name, done in zip(names, run_jobs(place, [filled(place, name) for name in names]), strict=True):
        check(name, done.get("ranks", [done]))


def check(name: str, ranks: list[dict[str, Any]]) -> None:
    _, named, safe = WRITES[name.removesuffix("2")]
    for one in ranks:
        assert one["code"] == USER_ERROR and "Traceback" not in one["said"], one["said"]
        [sentence] = [line for line in one["said"].splitlines() if "cannot write" in line]
        assert named in sentence and "No space left on device" in sentence and safe in sentence, sentence


@pytest.mark.parametrize("name", GOING_ON)
def test_with_room_again_the_run_becomes_what_it_would_have_been(
    place: Path, full: dict[str, list[dict[str, Any]]], name: str
) -> None:
    assert full["whole"][0]["code"] == full[f"{name} again"][0]["code"] == 0, full[f"{name} again"]
    assert unequal(tensors(place / "whole", END), tensors(place / f"run_{name}", END)) == []
    assert rows(place / "whole") == rows(place / f"run_{name}")
    for kept in ("best/metrics.json", "samples/fakes_000000016.png"):
        assert (place / "whole" / kept).read_bytes() == (place / f"run_{name}" / kept).read_bytes()


def test_a_run_folder_that_vanishes_ends_all_ranks_and_is_not_begun_anew(place: Path) -> None:
    at = {"point": "in a step", "how": "command", "time": 2}
    gone, moved = place / "gone", place / "moved"
    jobs = [
        job(place, gone, ranks=2, harm={**at, "command": f"rm -rf {gone}"}),
        job(place, moved, harm={**at, "command": f"mv {moved} {place / 'elsewhere'}"}),
    ]
    first, second = run_jobs(place, jobs)
    for one in [*first["ranks"], second]:
        assert one["code"] == USER_ERROR and "Traceback" not in one["said"], one["said"]
        assert "has vanished: bring it back" in one["said"]
    assert not gone.exists() and not moved.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_real_disk_that_is_full_in_a_step_is_told_and_the_run_goes_on_later(
    place: Path, small_disk: Path, full: dict[str, list[dict[str, Any]]]
) -> None:
    out = small_disk / "run"
    fill = f"head -c 20000000 /dev/zero > {small_disk / 'filler'} || true"
    at = {"point": "in a step", "how": "command", "time": 2}
    (filled,) = run_jobs(place, [job(place, out, harm={**at, "command": fill})])
    assert filled["code"] == USER_ERROR and "Traceback" not in filled["said"], filled["said"]
    assert "No space left on device" in filled["said"] and "/img_000000008 was kept; the same" in filled["said"]
    (small_disk / "filler").unlink()
    (after,) = run_jobs(place, [job(place, out)])
    assert after["code"] == 0, after["said"]
    assert unequal(tensors(place / "whole", END), tensors(out, END)) == []
    assert rows(place / "whole") == rows(out)
    shutil.rmtree(out)
