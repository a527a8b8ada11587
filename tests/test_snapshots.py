"""Without these, the weights that Table 3 compares are gone when a run is over, or are those of another moment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import make_shards, run_jobs, tensors, tiny_config, write_config

from sdtrain import cli
from sdtrain.engine.checkpoint import verify
from sdtrain.engine.snapshots import snapshot_positions

END, KILLED = 40, -9
POSITIONS = [8, 16, 24, 32, 40]
# saves in their order: snapshots 8 and 16, checkpoint 16, snapshot 24
KILLS = {"before-marker@4": "snapshot 24 is half written", "after-rename@4": "snapshot 24 is there, 16 was saved last"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    make_shards(folder / "shards", samples=24)
    tree = tiny_config(folder / "shards", batch_size=8, total_img=END, save_img=16, keep_checkpoints=1)
    del tree["snapshots"]  # the default
    write_config(folder / "tiny.yaml", tree)
    return folder


def args(place: Path, out: str, *more: str) -> list[str]:
    return ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), *more]


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, dict[str, Any]]:
    """One run in peace over remains of an earlier one, two that are killed and resumed, one that may not write."""
    for stale in ("img_000000032", "img_000000036"):
        (place / "whole" / "snapshots" / stale).mkdir(parents=True)
        (place / "whole" / "snapshots" / stale / "complete.json").write_text('{"files": {}}')
    (place / "barred").mkdir()
    (place / "barred" / "snapshots").write_text("a file where the folder belongs")
    jobs = {"whole": {"args": args(place, "whole")}, "barred": {"args": args(place, "barred")}}
    jobs["off"] = {"args": args(place, "off", "--set", "snapshots=[]", "--set", "total_img=16")}
    for name in KILLS:
        jobs |= {f"{name} first": {"args": args(place, name), "env": {"SDTRAIN_FAULT": name}}}
        jobs |= {name: {"args": args(place, name)}}
    return dict(zip(jobs, run_jobs(place, list(jobs.values())), strict=True))


def saved(out: Path) -> dict[str, bytes]:
    """FOLDER/FILE -> content of every snapshot, unfinished ones included."""
    return {str(f.relative_to(out / "snapshots")): f.read_bytes() for f in (out / "snapshots").rglob("*.*")}


def test_snapshots_hold_G_and_its_average_at_the_default_shares_and_stay_when_checkpoints_go(place, done):
    assert done["whole"]["code"] == 0, done["whole"]["said"]
    folders = sorted((place / "whole" / "snapshots").iterdir())
    assert [folder.name for folder in folders] == [f"img_{at:09d}" for at in POSITIONS]
    for folder in folders:
        assert verify(folder) is None
        assert {file.name for file in folder.iterdir()} == {"G.safetensors", "G_ema.safetensors", "complete.json"}
    last, checkpoint = folders[-1], place / "whole" / "checkpoints" / f"img_{END:09d}"
    for name in ("G.safetensors", "G_ema.safetensors"):
        assert (last / name).read_bytes() == (checkpoint / name).read_bytes()


@pytest.mark.parametrize("name", KILLS, ids=KILLS.values())
def test_a_killed_and_resumed_run_has_the_snapshots_of_an_uninterrupted_one_bit_for_bit(place, done, name):
    assert done[f"{name} first"]["code"] == KILLED and done[name]["code"] == 0, done[name]["said"]
    assert "going on at 16 from" in done[name]["said"]
    assert saved(place / name) == saved(place / "whole")


def test_what_a_resumed_run_has_passed_is_not_written_again(place, done):
    out = place / "again"
    shutil.copytree(place / "whole", out)
    before = {file: file.stat().st_mtime_ns for file in (out / "snapshots").rglob("*.*")}
    assert run_jobs(place, [{"args": args(place, "again")}])[0]["code"] == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "snapshots").rglob("*.*")} == before


def test_a_snapshot_that_cannot_be_written_ends_the_run_with_one_sentence(done):
    said = done["barred"]["said"]
    assert done["barred"]["code"] == 2 and "Traceback" not in said, said
    assert "cannot write" in said and "snapshots/img_000000008:" in said and "start the same command again" in said


def test_an_empty_list_keeps_none(place, done):
    assert done["off"]["code"] == 0 and not (place / "off" / "snapshots").exists()


def test_two_ranks_write_one_snapshot_of_the_whole_networks(place):
    more = ["--set", "total_img=16", "--set", "snapshots=[0.5]", "--set", "save_img=8", "--set", "keep_checkpoints=9"]
    together = run_jobs(place, [{"args": args(place, "two", *more)}], ranks=2)[0]
    assert [told["code"] for told in together["ranks"]] == [0, 0]
    assert sorted(p.name for p in (place / "two" / "snapshots").iterdir()) == ["img_000000008"]
    assert tensors(place / "two", 8)
    for name in ("G.safetensors", "G_ema.safetensors"):
        files = [place / "two" / kind / "img_000000008" / name for kind in ("snapshots", "checkpoints")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_report_has_the_variation_at_all_shares_of_a_real_run(place, done, tmp_path, capsys):
    words = ["--variation", "--latents", "2", "--lpips", "random", "--device", "cpu", "--out", str(tmp_path / "a.md")]
    assert cli.main(["report", str(place / "whole"), *words, "--shares", "20,40,60,80,100"]) == 0
    said = capsys.readouterr()
    assert "| 20, 40, 60, 80, 100 | 8, 16, 24, 32, 40 |" in said.out and "no weights" not in said.err


def test_positions_are_the_first_steps_at_or_beyond_each_share():
    assert snapshot_positions((0.2, 0.4, 0.6, 0.8, 1.0), 1000, 10) == {200, 400, 600, 800, 1000}
    assert snapshot_positions((0.0, 0.001, 0.5, 1.0), 100, 16) == {16, 64, 112}
    assert snapshot_positions((), 100, 16) == frozenset()
