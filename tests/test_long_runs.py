"""Without these a run would be killed for its memory, or for its open files, after days.

The ten thousand steps and two hundred dead processes:

    python -m pytest -q -s -m slow tests/test_long_runs.py
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, run_python

from sdtrain.engine import timing
from sdtrain.engine.timing import Timer

ROOM_MB = 8.0  # what allocators may still take after the first quarter
Row = dict[str, Any]


def long_run(*args: object) -> list[Row]:
    env = {"PYTHONPATH": str(REPO), "SDTRAIN_CPU": "1"}
    done = run_python("tests/long_runs.py", *map(str, args), env=env, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(*done.stdout.splitlines(), sep="\n")
    return found


def grown(found: list[Row], *names: str) -> dict[str, float]:
    """What became more after the first quarter, and by how much; resident memory may by ROOM_MB."""
    first, last = found[0], found[-1]
    more = {name: last[name] - first[name] for name in ("files", "threads", "children", *names)}
    more["rss_mb"] = last["rss_mb"] - first["rss_mb"] - ROOM_MB
    return {name: amount for name, amount in more.items() if amount > 0}


def uneven(found: list[Row], name: str) -> list[int]:
    """What was added in every stretch, unless it is as much in each but for a percent."""
    added = [later[name] - sooner[name] for sooner, later in pairwise(found)]
    return [] if 0 < min(added) and max(added) <= 1.01 * min(added) + 64 else added


@pytest.mark.parametrize("steps", [240, pytest.param(10_000, marks=pytest.mark.slow)])
def test_steps_with_ticks_leave_memory_files_and_threads_as_they_were(tmp_path: Path, steps: int) -> None:
    found = long_run("loop", tmp_path, steps, 10)
    assert (grown(found, "timer", "meter"), uneven(found, "board")) == ({}, [])


@pytest.mark.parametrize("steps", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_steps_of_the_engine_without_a_tick_keep_nothing(steps: int) -> None:
    assert grown(long_run("steps", steps), "timer", "meter", "tensors") == {}


@pytest.mark.parametrize("times", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_stream_begun_again_after_dead_processes_delivers_the_same_and_leaves_nothing(
    tmp_path: Path, times: int
) -> None:
    found = long_run("workers", tmp_path, times)
    assert grown(found) == {}
    assert (found[-1]["killed"], found[-1]["named"], found[-1]["equal"]) == (times, times, True)


class Event:
    """A CUDA event that has happened once the clock has come past it; each lasts a millisecond."""

    now = made = 0

    def __init__(self, enable_timing: bool) -> None:
        Event.made += 1
        self.number = Event.made

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.number <= Event.now

    def elapsed_time(self, end: Event) -> float:
        assert end.query()
        return 1.0


def test_a_timer_on_a_gpu_holds_a_bounded_number_of_events_where_nobody_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = Timer(torch.device("cuda"))
    for step in range(10_000):
        Event.now = Event.made - 8  # the device is some steps behind
        with timer.section("G" if step % 2 else "D"):
            pass
        assert len(timer._events) <= timing.HELD + 8
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(Event, "now", Event.made))
    assert timer.read()[1] == pytest.approx({"G": 5.0, "D": 5.0})
