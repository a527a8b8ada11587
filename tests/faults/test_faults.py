"""Without these, one crash at the wrong moment, one bad disk or one NaN costs a run of weeks.

Invariant 6: a run folder is resumable at every instant after its first save, whatever is killed, cut or filled up.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import asked
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, unequal, write_config

END, KILLED = 24, -9
# boundary of the second save (position 16) at which the process is killed -> the position that the next start finds
BOUNDARIES = {
    "begin@2": 8,  # the folder exists, no byte is written
    "mid-save@8": 8,  # some tensor files are there, others not
    "before-marker@2": 8,
    "after-marker@2": 8,  # complete, but not under its name yet
    "after-rename@2": 16,
    "after-latest@2": 16,
    "retention": 16,
    "mid-retention": 16,  # the old one has lost its marker and still has its files
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_shards(folder / "shards", samples=24)
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": 8, "keep_checkpoints": 1}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock))
    return folder


def args(place: Path, out: str, *more: str) -> list[str]:
    return ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), *more]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An uninterrupted run that keeps all its checkpoints."""
    done = run_jobs(place, [{"args": args(place, "whole", "--set", "keep_checkpoints=9")}])[0]
    assert done["code"] == 0, done["said"]
    return place / "whole"


@pytest.fixture(scope="module")
def killed(place: Path, whole: Path, request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    jobs, names = [], asked(request, BOUNDARIES)
    for name in names:
        jobs += [{"args": args(place, name), "env": {"SDTRAIN_FAULT": name}}, {"args": args(place, name)}]
    done = run_jobs(place, jobs)
    return {name: done[2 * i : 2 * i + 2] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_killed_at_any_write_boundary_the_run_goes_on_from_the_newest_complete_checkpoint(
    place: Path, whole: Path, killed: dict[str, list[dict[str, Any]]], name: str
) -> None:
    first, second = killed[name]
    assert first["code"] == KILLED, first["said"]
    assert second["code"] == 0, second["said"]
    assert f"going on at {BOUNDARIES[name]} from" in second["said"]
    assert unequal(tensors(whole, END), tensors(place / name, END)) == []
    assert rows(whole) == rows(place / name)
    assert [p.name for p in sorted((place / name / "checkpoints").iterdir())] == [f"img_{END:09d}", "latest"]


def test_damaged_checkpoints_are_named_and_an_older_one_is_taken(place: Path, whole: Path) -> None:
    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1])

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    damage = {
        "truncated": lambda newest: cut(newest / "G.safetensors"),
        "flipped": lambda newest: flip(newest / "D.optim.safetensors"),
        "missing": lambda newest: (newest / "state.json").unlink(),
        "unmarked": lambda newest: (newest / "complete.json").unlink(),
        "garbled": lambda newest: (newest / "complete.json").write_text("{"),
    }
    reasons = {
        "truncated": "G.safetensors does not match its digest",
        "flipped": "D.optim.safetensors does not match its digest",
        "missing": "state.json is missing",
        "unmarked": "it has no marker: the save was interrupted",
        "garbled": "its marker is unreadable",
    }
    hints = dict(zip(damage, [b"\xff\x00 img_of_nothing", b"", b"img_000000099", b"../..", b"img_000000008"]))
    for name, harm in damage.items():
        shutil.copytree(whole, place / name)
        harm(place / name / "checkpoints" / f"img_{END:09d}")
        (place / name / "checkpoints" / "latest").write_bytes(hints[name])
    jobs = [{"args": args(place, name, "--set", "keep_checkpoints=9")} for name in damage]
    for name, done in zip(damage, run_jobs(place, jobs), strict=True):
        assert done["code"] == 0, done["said"]
        assert f"img_{END:09d} is not used: {reasons[name]}" in done["said"]
        assert "going on at 16 from" in done["said"]
        assert unequal(tensors(whole, END), tensors(place / name, END)) == []
        assert rows(whole) == rows(place / name)


def test_a_full_disk_ends_the_run_with_one_sentence_and_leaves_the_older_checkpoint(place: Path, whole: Path) -> None:
    jobs = [{"args": args(place, "full"), "limit": 4096}, {"args": args(place, "full")}]
    full, after = run_jobs(place, jobs)
    assert full["code"] == 2 and "Traceback" not in full["said"], full["said"]
    sentence = next(line for line in full["said"].splitlines() if "checkpoints/img_000000016:" in line)
    needed = int(sentence.partition("it needs ")[2].split()[0])
    written = sum(f.stat().st_size for f in (whole / "checkpoints" / "img_000000016").glob("*.safetensors"))
    assert 0.5 * written < needed <= written  # the tensors; headers come on top
    assert "are free" in sentence and "img_000000008 was kept; the same command goes on" in sentence
    assert after["code"] == 0 and "going on at 8 from" in after["said"], after["said"]
    assert unequal(tensors(whole, END), tensors(place / "full", END)) == []


@pytest.fixture(scope="module")
def poisoned(place: Path) -> list[dict[str, Any]]:
    """On two ranks: a NaN on rank 1 in phase D of the second step, and in the very first; stop, then skip."""

    def job(out: str, policy: str, step: int) -> dict[str, Any]:
        more = ["--set", f"on_nonfinite={policy}", "--set", "total_img=16", "--set", "keep_checkpoints=9"]
        return {"args": args(place, out, *more), "nan": {"phase": "D", "rank": 1, "step": step}}

    return run_jobs(place, [job("nan_stop", "stop", 1), job("nan_skip", "skip", 1), job("nan_first", "skip", 0)], 2)


def test_a_nan_on_one_rank_stops_all_ranks_and_names_rank_terms_and_step(poisoned: list[dict[str, Any]]) -> None:
    for told in poisoned[0]["ranks"]:
        assert told["code"].startswith("NonFinite: phase D at step 1: D/real=nan")
        assert told["code"].endswith("on rank 1")


def test_no_player_moves_on_any_rank_in_a_phase_that_is_not_finite(poisoned: list[dict[str, Any]]) -> None:
    assert [told["moved"] for job in poisoned for told in job["ranks"]] == [False] * 6


def still(place: Path, out: str, player: str) -> None:
    """From 8 to 16 images no parameter of this player has moved; the other's have, and pass state of both."""
    before, after = tensors(place / out, 8), tensors(place / out, 16)
    moved = {n for n in unequal(before, after) if n.startswith(player)}
    params = {n.rpartition("/")[0].replace(".optim", "") for n in before if n.startswith(f"{player}.optim:")}
    assert params and not params & moved and not any(".optim" in n for n in moved), moved
    assert any(n.startswith("D.optim" if player == "G" else "G.optim") for n in unequal(before, after))


def test_skipping_leaves_one_phase_out_counts_the_step_and_goes_on(place: Path, poisoned: list[dict[str, Any]]) -> None:
    assert [told["code"] for job in poisoned[1:] for told in job["ranks"]] == [0] * 4
    for out in ("nan_skip", "nan_first"):
        assert rows(place / out, "perf")[-1]["skipped_steps"] == 1
    still(place, "nan_skip", "D")


def test_a_phase_is_left_out_alike_on_one_rank_and_a_run_goes_on_right_after_it(
    place: Path, poisoned: list[dict[str, Any]]
) -> None:
    more = ["--set", "on_nonfinite=skip", "--set", "keep_checkpoints=9"]
    alone = {"args": args(place, "nan_alone", *more), "nan": {"phase": "D", "rank": 0, "step": 1}}
    shutil.copytree(place / "nan_skip", place / "nan_resumed")
    done = run_jobs(place, [alone, {"args": args(place, "nan_resumed", *more)}])
    assert [each["code"] for each in done] == [0, 0] and "going on at 16 from" in done[1]["said"], done
    assert unequal(tensors(place / "nan_alone", 16), tensors(place / "nan_skip", 16)) == []
    assert unequal(tensors(place / "nan_alone", END), tensors(place / "nan_resumed", END)) == []
    assert rows(place / "nan_alone") == rows(place / "nan_resumed")


POISONS: dict[str, dict[str, Any]] = {
    "G_loss": {"phase": "G", "rank": 0, "step": 1},
    "G_gradient": {"phase": "G", "rank": 1, "step": 1, "what": "gradient"},
    "D_gradient": {"phase": "D", "rank": 0, "step": 1, "what": "gradient"},
    "persistent": {"phase": "D", "rank": 1, "steps": list(range(1, 40))},
    "often": {"phase": "D", "rank": 1, "steps": [1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13]},
}


@pytest.fixture(scope="module")
def skipping(place: Path) -> dict[str, list[dict[str, Any]]]:
    """Two ranks that leave bad phases out."""
    ends = {"persistent": 320, "often": 112}
    jobs = []
    for name, wish in POISONS.items():
        more = ["on_nonfinite=skip", f"total_img={ends.get(name, 16)}", "keep_checkpoints=99"]
        jobs.append({"args": args(place, name, *(word for key in more for word in ("--set", key)))})
        jobs[-1] |= {"ranks": 2, "nan": wish}
    return {name: done["ranks"] for name, done in zip(POISONS, run_jobs(place, jobs), strict=True)}


@pytest.mark.parametrize("name", ["G_loss", "G_gradient", "D_gradient"])
def test_a_bad_loss_or_gradient_of_either_player_on_either_rank_leaves_its_phase_out_on_both(
    place: Path, skipping: dict[str, list[dict[str, Any]]], name: str
) -> None:
    assert [(one["code"], one["moved"]) for one in skipping[name]] == [(0, False)] * 2, skipping[name]
    assert all("this phase is left out on every rank" in one["said"] for one in skipping[name])
    still(place, name, name[0])
    states = [place / name / "checkpoints" / f"img_{img:09d}" / "state.json" for img in (8, 16)]
    assert [json.loads(state.read_text())["skipped"] for state in states] == [0, 1]


def test_steps_that_are_bad_again_and_again_end_the_run_on_all_ranks_together(
    place: Path, skipping: dict[str, list[dict[str, Any]]]
) -> None:
    for one in skipping["persistent"]:
        assert one["code"] != 0 and "10 steps in a row were not finite; phase D at step 10" in one["said"], one["said"]
    last = max((place / "persistent" / "checkpoints").glob("img_*"))
    state = json.loads((last / "state.json").read_text())
    assert (state["step"], state["skipped"], state["skipped_in_a_row"]) == (10, 9, 9)


def test_bad_steps_with_good_ones_between_are_counted_and_end_nothing(
    place: Path, skipping: dict[str, list[dict[str, Any]]]
) -> None:
    assert [one["code"] for one in skipping["often"]] == [0, 0], skipping["often"]
    assert rows(place / "often", "perf")[-1]["skipped_steps"] == len(POISONS["often"]["steps"])


def test_clamping_replaces_gradients_counts_them_and_goes_on(place: Path) -> None:
    more = ["--set", "on_nonfinite=clamp", "--set", "total_img=24"]
    wish = {"phase": "D", "rank": 1, "step": 1}
    (told,) = run_jobs(place, [{"args": args(place, "nan_clamp", *more), "nan": wish}], 2)
    assert [each["code"] for each in told["ranks"]] == [0, 0], told
    counts = [row["D/clamped"] for row in rows(place / "nan_clamp") if "D/clamped" in row]
    assert counts[1] > 0 == counts[0] == counts[2]
    assert all(np.isfinite(value).all() for value in tensors(place / "nan_clamp", 24).values())


def test_a_phase_that_is_left_out_first_leaves_a_fresh_optimizer(place: Path, poisoned: list[dict[str, Any]]) -> None:
    steps = {(n[0], v.item()) for n, v in tensors(place / "nan_first", 16).items() if n.endswith("/step")}
    assert steps == {("G", 2.0), ("D", 1.0)}
