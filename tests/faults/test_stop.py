"""Without these a signal that comes at the wrong moment, a rank that hangs or a worker that dies would cost the run its
last hours, or block a machine until somebody looks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import asked, run_python
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, unequal, write_config

from sdtrain.engine.preempt import OUT_OF_TIME, StopRequest, end_of_time
from sdtrain.engine.pulse import PULSE, Mark
from sdtrain.engine.watch import Record, Silence, accused

REQUEUE, END = 75, 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    make_shards(folder / "shards", samples=24)
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": 24, "eval_img": 16, "sample_img": 16}
    metrics = {"names": ["rfid"], "num_fake": 12, "seeds": 1, "tap": 64, "select_by": "rfid", "batch_size": 2}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock, metrics=metrics))
    return folder


def job(place: Path, out: str, *more: str, **wishes: Any) -> dict[str, Any]:
    args = ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out)]
    return {"args": [*args, *(word for key in more for word in ("--set", key))], "plain": True, **wishes}


SLEEP = {"how": "sleep", "sec": 100}
STOPS: dict[str, dict[str, Any]] = {
    "pictures": {"signal": {"point": "in pictures", "name": "SIGTERM"}},
    "evaluation": {"signal": {"point": "in an evaluation", "name": "SIGUSR1", "time": 2}},
    "last": {"signal": {"point": "in an evaluation", "name": "SIGTERM", "time": 20}},
    "data": {
        "signal": {"point": "with a worker", "name": "SIGTERM", "time": 2},
        "harm": {"point": "with a worker", "how": "SIGSTOP", "time": 2},
        "more": ["data.workers=1"],
    },
    "both": {"ranks": 2, "signal": {"point": "in an evaluation", "name": "SIGTERM", "time": 2, "rank": 1}},
}


SELDOM_STOPS, SELDOM_HANGS = ("last", "data"), ("step", "collective", "metric", "store", "killed")  # in slow tests


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that nobody stopped."""
    (done,) = run_jobs(place, [job(place, "whole")])
    assert done["code"] == 0, done["said"]
    return place / "whole"


def stopped_and_resumed(place: Path, names: list[str]) -> dict[str, Any]:
    jobs = []
    for name in names:
        wish = STOPS[name]
        more = {key: value for key, value in wish.items() if key != "more"}
        jobs += [job(place, name, *wish.get("more", []), **more), job(place, name)]
    done = run_jobs(place, jobs)
    return {name: done[2 * i : 2 * i + 2] for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def stopped(place: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return stopped_and_resumed(place, asked(request, STOPS))


@pytest.mark.parametrize("name", [name for name in STOPS if name not in SELDOM_STOPS])
def test_a_signal_in_long_work_cuts_it_short_and_the_run_that_goes_on_does_it_again(
    place: Path, whole: Path, stopped: dict[str, Any], name: str
) -> None:
    check_stop(place, name, *stopped[name])


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_or_in_front_of_a_stuck_worker_is_obeyed_too(place: Path, whole: Path) -> None:
    for name, done in stopped_and_resumed(place, list(SELDOM_STOPS)).items():
        check_stop(place, name, *done)


def check_stop(place: Path, name: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    each = first.get("ranks", [first])
    assert [one["code"] for one in each] == [REQUEUE] * len(each), each
    said = each[0]["said"]
    assert "the same command goes on from here" in said and "Traceback" not in said
    assert ("left for later: " in said) == (name != "data"), said
    assert second["code"] == 0, second["said"]
    assert unequal(tensors(place / "whole", END), tensors(place / name, END)) == []
    assert rows(place / "whole") == rows(place / name)
    for kept in ("best/metrics.json", "samples/fakes_000000016.png"):
        assert (place / "whole" / kept).read_bytes() == (place / name / kept).read_bytes()


HANGS: dict[str, tuple[dict[str, Any], str]] = {
    "loader": ({"point": "while waiting for data", **SLEEP, "time": 3, "rank": 1}, "rank 1 (pid"),
    "step": ({"point": "in a step", **SLEEP, "time": 3, "rank": 0}, "rank 0 (pid"),
    "collective": ({"point": "in a collective", **SLEEP, "time": 25, "rank": 1}, "rank 1 (pid"),
    "metric": ({"point": "in an evaluation", **SLEEP, "time": 2, "rank": 1}, "rank 1 (pid"),
    "stopped": ({"point": "in a step", "how": "SIGSTOP", "time": 3, "rank": 1}, "rank 1 (pid"),
    "store": ({"point": "in a step", "how": "SIGSTOP", "time": 3, "rank": 0}, "is stopped or gone"),
    "worker": ({"point": "with a worker", "how": "SIGSTOP", "time": 2, "rank": 1}, "worker 0 (pid"),
    "killed": ({"point": "with a worker", "how": "SIGKILL", "time": 2, "rank": 1}, "worker 0 (pid"),
    "told": ({"point": "in a step", **SLEEP, "time": 3, "rank": 1}, "SIGTERM cannot be obeyed: rank 1 (pid"),
}


def hung(place: Path, names: list[str]) -> dict[str, Any]:
    def hang(name: str, harm: dict[str, Any]) -> dict[str, Any]:
        if name == "metric":
            return job(place, name, "timeout=3s", ranks=2, harm=harm, patch={"sdtrain.engine.pulse:LONGER": 5})
        if name != "told":
            return job(place, name, "timeout=3s", "data.workers=1", ranks=2, harm=harm)
        harm = {**harm, "file": str(place / "hangs")}
        patch = {"sdtrain.engine.watch:STOP_PATIENCE_SEC": 2}
        return job(place, name, ranks=2, harm=harm, patch=patch, then={"rank": 0, "name": "SIGTERM"})

    return dict(zip(names, run_jobs(place, [hang(name, HANGS[name][0]) for name in names]), strict=True))


@pytest.fixture(scope="module")
def hanging(place: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return hung(place, asked(request, HANGS))


@pytest.mark.parametrize("name", [name for name in HANGS if name not in SELDOM_HANGS])
def test_what_hangs_is_named_and_the_run_ends_as_worth_another_attempt(hanging: dict[str, Any], name: str) -> None:
    check_hang(name, hanging[name]["ranks"])


@pytest.mark.slow
def test_a_hang_in_a_step_collective_or_metric_a_stopped_store_and_a_killed_worker_are_named_too(place: Path) -> None:
    for name, done in hung(place, list(SELDOM_HANGS)).items():
        check_hang(name, done["ranks"])


def check_hang(name: str, ranks: list[dict[str, Any]]) -> None:
    harm, named = HANGS[name]
    frozen = harm["rank"] if name in ("stopped", "store") else None
    alive = [one for rank, one in enumerate(ranks) if rank != frozen]
    assert [one["code"] for one in alive] == [REQUEUE] * len(alive), ranks
    said = "".join(one["said"] for one in ranks)
    assert named in said and "; nothing" in said or name in ("worker", "killed"), said
    if name in ("loader", "step", "collective", "metric", "told"):
        assert said.count("rank 0 (pid") >= 1 and said.count("rank 1 (pid") >= 1
        assert "in call" in said and "time.sleep" in said  # the stack of the one that sleeps


def test_nothing_is_alarmed_by_a_slow_first_step_or_a_long_evaluation(place: Path) -> None:
    slow = {"how": "sleep", "sec": 8}  # longer than the timeout, which a process that gets no turn must not reach
    points = [{"point": "in a step", **slow, "rank": 1}, {"point": "in an evaluation", **slow, "time": 2, "rank": 1}]
    jobs = [job(place, f"slow{i}", "timeout=5s", ranks=2, harm=harm) for i, harm in enumerate(points)]
    for done in run_jobs(place, jobs):
        assert [one["code"] for one in done["ranks"]] == [0, 0], done


def silence(number: int, process: float = 0.0, main: float = 0.0, **mark: Any) -> tuple[int, Silence]:
    return number, Silence(Record(Mark(settled=True, **mark), 1, "pid 1 on host"), process, main)


def test_who_waits_for_others_is_not_blamed_while_another_is_stuck() -> None:
    waits = silence(0, main=9.0, section="D", step=4, waiting="agree_max")
    stuck = silence(1, main=8.0, section="data", step=4)
    found = accused(dict([waits, stuck]), 5.0)
    assert found == ["rank 1 (pid 1 on host) has not moved for 8 s in step 4, section data"]
    assert not accused(dict([waits, silence(1, main=3.0, section="pictures")]), 5.0)
    assert accused(dict([waits]), 5.0)[0].startswith("rank 0 (pid 1 on host) has waited for the others for 9 s in step")
    gone = silence(2, process=6.0, section="D", step=4)
    in_passing = silence(1, process=4.0, main=4.0, section="D", step=4, waiting="agree_max")  # and then stopped
    assert not accused(dict([waits, in_passing]), 5.0)
    assert not accused(dict([waits, silence(1, process=4.0, main=5.5, section="D", waiting="agree_max")]), 5.0)
    assert not accused(dict([waits, silence(1, main=3.0, section="D", waiting="agree_max")]), 5.0)  # it has just come
    both = dict([waits, silence(1, main=5.5, section="D", waiting="barrier")])
    assert [text[:6] for text in accused(both, 5.0)] == ["rank 0", "rank 1"]
    assert [text[:6] for text in accused(dict([waits, stuck, gone]), 5.0)] == ["rank 2"]


def test_patience_grows_with_what_a_run_needs_and_in_what_takes_long() -> None:
    assert not accused(dict([silence(0, main=9.0, section="D", slowest_sec=5.0)]), 5.0)
    assert not accused(dict([silence(0, main=49.0, section="evaluate")]), 5.0)
    assert accused(dict([silence(0, main=51.0, section="evaluate")]), 5.0)
    first = Silence(Record(Mark(settled=False, section="D"), 1, "pid 1 on host"), 0.0, 49.0)
    assert not accused({0: first}, 5.0)


def test_a_run_whose_time_is_nearly_up_stops_by_itself_with_a_checkpoint(place: Path) -> None:
    soon = {"SLURM_JOB_END_TIME": str(int(time.time()) + 3600)}
    jobs = [
        job(place, "timed", "max_time=30s"),  # less than what a save is taken for before one was measured
        job(place, "timed", env=soon),
    ]
    first, second = run_jobs(place, jobs)
    assert first["code"] == REQUEUE and "the time limit is near: stopped at 8 images" in first["said"], first["said"]
    assert second["code"] == 0 and "going on at 8 from" in second["said"], second["said"]


def test_the_reserve_is_what_saves_and_steps_have_taken() -> None:
    PULSE.restart()
    stop = StopRequest()
    stop._save_sec = 60.0
    stop.ends_at = time.time() + 90  # the next step may end just too late to save
    assert stop.reason == OUT_OF_TIME
    stop = StopRequest()
    stop._save_sec, stop.ends_at = 10.0, time.time() + 90
    assert stop.reason == 0
    assert end_of_time(60.0, 1000.0, {"SLURM_JOB_END_TIME": "1050"}) == 1050.0
    assert end_of_time(40.0, 1000.0, {"SLURM_JOB_END_TIME": "1050"}) == 1040.0
    assert end_of_time(0.0, 1000.0, {}) is None


def test_a_signal_at_the_start_ends_it_when_the_first_step_is_far_off(place: Path) -> None:
    patch = {"sdtrain.engine.preempt:START_SEC": 1.0}
    wish = {"point": "while the data is opened", "name": "SIGTERM", "presses": 2}  # and then it sleeps
    (done,) = run_jobs(place, [job(place, "start", signal=wish, patch=patch)])
    assert done["code"] == REQUEUE and "SIGTERM before the first step" in done["said"], done["said"]


def test_a_second_signal_leaves_a_step_but_never_a_save(place: Path) -> None:
    patch = {"sdtrain.engine.preempt:SECOND_SEC": 0.5, "sdtrain.engine.preempt:ECHO_SEC": -1.0}
    twice, waits = {"name": "SIGTERM", "presses": 2}, ["save_async=false"]  # or it might take another step before
    jobs = [
        job(place, "step_twice", signal={**twice, "point": "in a step", "time": 2}, patch=patch),
        job(place, "save_twice", *waits, signal={**twice, "point": "inside a save", "wait": 2}, patch=patch),
        job(place, "save_twice"),
    ]
    step, save, after = run_jobs(place, jobs)
    assert step["code"] == REQUEUE and "SIGTERM twice: the step in progress was left" in step["said"], step["said"]
    assert save["code"] == REQUEUE and "img_000000024" in save["said"], save["said"]
    assert after["code"] == 0 and "going on at 24 from" in after["said"], after["said"]


@pytest.mark.slow
def test_fifty_kills_and_signals_at_random_moments_change_no_bit() -> None:
    done = run_python("tests/kills.py", timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 30 of 30 bit-equal" in done.stdout and "signals: 20 of 20 obeyed within 30 s" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "launcher"])
def test_one_run_that_is_killed_thirty_times_in_a_row_ends_as_one_that_was_left_alone(victim: str) -> None:
    done = run_python("tests/kills.py", "--in-a-row", "--victim", victim, timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 kills in a row: bit-equal" in done.stdout
