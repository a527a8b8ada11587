"""Without these, a stopped run loses work, or comes back as a slightly different run and nobody can tell.

Invariant 4 (resumed == uninterrupted), and the signal half of invariant 6.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from tiny import SIGNAL_POINTS, make_shards, rows, run_jobs, tensors, tiny_config, unequal, worst, write_config

STOPPED, END = 75, 48


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_shards(folder / "shards")
    # a tick is three steps, so that most stops leave a half-filled one behind
    clock = {"batch_size": 8, "total_img": END, "log_img": 24, "save_img": 16}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock))
    return folder


def args(place: Path, out: str, *more: str) -> list[str]:
    return ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), *more]


STOPS = {
    "sigterm": {"point": "before the first step", "name": "SIGTERM"},
    "usr1_step4": {"point": "in a step", "name": "SIGUSR1", "time": 4},
    "data5": {"point": "while waiting for data", "name": "SIGTERM", "time": 5},
    "save1": {"point": "in a save", "name": "SIGUSR1", "time": 1},
    "last": {"point": "in a step", "name": "SIGTERM", "time": 6},
}


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Any]:
    """One uninterrupted run, and one stopped and resumed for every kind of stop."""
    jobs = [{"args": args(place, "whole")}, {"args": args(place, "whole")}]
    for name, wish in STOPS.items():
        jobs += [{"args": args(place, name), "signal": wish}, {"args": args(place, name)}]
    done = run_jobs(place, jobs)
    return {"whole": done[:2]} | {name: done[2 + 2 * i : 4 + 2 * i] for i, name in enumerate(STOPS)}


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_stops_with_code_75_and_the_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    place: Path, alone: dict[str, Any], name: str
) -> None:
    stopped, resumed = alone[name]
    assert stopped["code"] == STOPPED, stopped["said"]
    assert resumed["code"] == 0, resumed["said"]
    assert STOPS[name]["name"] in stopped["said"] and "the same command goes on from here" in stopped["said"]
    assert "going on at" in resumed["said"]
    assert unequal(tensors(place / "whole", END), tensors(place / name, END)) == []
    assert rows(place / "whole") == rows(place / name)
    assert [row["seen_img"] for row in rows(place / "whole")] == [24, 48]


def test_the_stops_cover_every_place_a_signal_can_find_a_run_in() -> None:
    assert {stop["point"] for stop in STOPS.values()} == set(SIGNAL_POINTS)


def test_a_finished_run_started_again_does_nothing_and_says_so(place: Path, alone: dict[str, Any]) -> None:
    first, again = alone["whole"]
    assert first["code"] == again["code"] == 0, again["said"]
    assert "going on at 48" in again["said"] and "finished at 48" in again["said"]
    assert [row["seen_img"] for row in rows(place / "whole", "train", "perf")] == [24, 24, 48, 48]


@pytest.fixture(scope="module")
def together(place: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    """On two ranks: uninterrupted; SIGTERM to rank 1 only, then resumed; what one rank had left, taken up by two."""
    stop = {"point": "in a step", "name": "SIGTERM", "time": 4, "rank": 1}
    jobs = [
        {"args": args(place, "whole2")},
        {"args": args(place, "stopped2"), "signal": stop},
        {"args": args(place, "stopped2", "--set", "total_img=40")},
    ]
    return run_jobs(place, jobs, ranks=2)


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_image(place: Path, together: list[dict[str, Any]]) -> None:
    assert [r["code"] for r in together[1]["ranks"]] == [STOPPED, STOPPED]
    starts = json.loads((place / "stopped2" / "environment.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 2]
    state = json.loads((place / "stopped2" / "checkpoints" / "img_000000032" / "state.json").read_text())
    assert (state["step"], state["world_size"], sorted(state["meters"])) == (4, 2, ["0", "1"])


def test_two_ranks_stopped_and_resumed_are_two_ranks_uninterrupted(place: Path, together: list[dict[str, Any]]) -> None:
    assert [r["code"] for job in together for r in job["ranks"]] == [0, 0, STOPPED, STOPPED, 0, 0]
    assert rows(place / "stopped2") == rows(place / "whole2")[:1]
    state = json.loads((place / "stopped2" / "checkpoints" / "img_000000040" / "state.json").read_text())
    assert state["seen_img"] == 40


def test_a_run_of_two_ranks_goes_on_with_one_as_if_it_had_always_had_one(
    place: Path, together: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    shutil.copytree(place / "stopped2", place / "moved")
    done = run_jobs(place, [{"args": args(place, "moved")}])[0]
    assert done["code"] == 0, done["said"]
    # the tick that ends at 48 began on two ranks (image 24 to 40) and ended on one
    deviation = worst(rows(place / "whole"), rows(place / "moved"))
    print("worst deviation after two ranks -> one:", deviation)
    assert deviation[0] <= 1e-4
    one, other = tensors(place / "whole", END), tensors(place / "moved", END)
    assert one.keys() == other.keys()
    assert max(float(abs(one[n] - other[n]).max()) for n in one if one[n].size) < 1e-4


@pytest.mark.slow
def test_a_real_signal_at_a_random_moment_is_obeyed_within_seconds(place: Path) -> None:
    command = [sys.executable, "sdtrain/main.py", *args(place, "live", "--set", "total_img=16000")]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = place / "live" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED, said
    assert "Traceback" not in said


@pytest.mark.slow
def test_torchrun_and_accelerate_launch_start_the_same_run(place: Path) -> None:
    few = ["--set", "total_img=16"]
    ways = {
        "by_torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sdtrain/main.py"],
        "by_accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "sdtrain/main.py"],
        "by_python": ["sdtrain/main.py"],
    }
    for out, start in ways.items():
        command = [sys.executable, *start, *args(place, out, *few)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        starts = json.loads((place / out / "environment.json").read_text())["starts"]
        assert starts[0]["world_size"] == (2 if out == "by_torchrun" else 1)
        assert unequal(tensors(place / "by_torchrun", 16), tensors(place / out, 16)) == []
