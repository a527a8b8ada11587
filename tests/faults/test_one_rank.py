"""Without these, what fails on one rank of a thousand leaves the others waiting, and the step before it is lost.

Two ranks in real processes. Outcome: both end by themselves, with the same sentence and exit code; where no player has
moved, the state is saved, and the run that goes on from it becomes the uninterrupted one bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import asked
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, unequal, write_config

END, FAULT, MEND, AGAIN = 32, 1, 2, 75
OURS = "rank 1 (pid"
KEPT, NOTHING = "checkpoints/img_000000016 was kept; the same command goes on from there", "; nothing was kept"
IN_A_STEP: dict[str, Any] = {"point": "in a step", "time": 3}
# what happens: (to the job, exit code, who is named, what, what is kept)
FAULTS: dict[str, tuple[dict[str, Any], int, str, str, str]] = {
    "memory in the first phase": (
        {"fail": {"point": "in a loss", "phase": "G", "time": 3, "rank": 1, "error": "memory"}},
        *(AGAIN, OURS, "CUDA out of memory", KEPT),
    ),
    "memory in a later phase": (
        {"fail": {"point": "in a loss", "phase": "D", "time": 3, "rank": 1, "error": "memory"}},
        *(AGAIN, OURS, "CUDA out of memory", NOTHING),
    ),
    "a mistake before a phase": (
        {"fail": {"point": "while chunks are made", "time": 3, "rank": 1, "error": "fault"}},
        *(FAULT, OURS, "ZeroDivisionError: a mistake of ours, in step 2", NOTHING),
    ),
    "data": (
        {"fail": {"point": "with a worker", "time": 3, "rank": 1, "error": "data"}},
        *(MEND, OURS, "shard 001.tar is nowhere", KEPT),
    ),
    "a dead worker": (
        {"harm": {"point": "with a worker", "how": "SIGKILL", "time": 3, "rank": 1}, "more": ["data.workers=1"]},
        *(AGAIN, OURS, "was killed by SIGKILL", KEPT),
    ),
    "pictures": (
        {"fail": {"point": "in a grid", "rank": 0, "error": "fault"}},
        *(FAULT, "rank 0 (pid", "ZeroDivisionError: a mistake of ours", KEPT),
    ),
    "evaluation": (
        {"fail": {"point": "in features", "time": 2, "rank": 1, "error": "memory"}},
        *(AGAIN, OURS, "CUDA out of memory", KEPT),
    ),
    "killed": (
        {"harm": {**IN_A_STEP, "how": "SIGKILL", "rank": 1}},
        *(AGAIN, OURS, "is gone, last seen in step", NOTHING),  # which, it writes once a second
    ),
    "killed with the store": (
        {"harm": {**IN_A_STEP, "how": "SIGKILL", "rank": 0}},
        *(AGAIN, "rank 0 (pid", "which keeps the ranks' common store, is stopped or gone", NOTHING),
    ),
    "killed at the start": (
        {"harm": {"point": "before the first step", "how": "SIGKILL", "rank": 1}},
        *(AGAIN, OURS, "is gone, last seen in step 0, section start", NOTHING),
    ),
}
GOING_ON = [name for name, fault in FAULTS.items() if fault[4] == KEPT]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    make_shards(folder / "shards", samples=24)
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": 64, "eval_img": 16, "sample_img": 16}
    metrics = {"names": ["rfid"], "num_fake": 12, "seeds": 1, "tap": 64, "select_by": "rfid", "batch_size": 2}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock, metrics=metrics, data__prefetch=1))
    return folder


def job(place: Path, out: str, *more: str, **wishes: Any) -> dict[str, Any]:
    args = ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out)]
    return {"args": [*args, *(word for key in more for word in ("--set", key))], "plain": True, **wishes}


@pytest.fixture(scope="module")
def done(place: Path, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Each fault on two ranks; what was saved, taken up by one; a run that nothing has befallen."""
    jobs, names = {}, asked(request, FAULTS)
    for name in names:
        wish = FAULTS[name][0]
        more = wish.get("more", [])
        jobs[name] = job(place, name, *more, ranks=2, **{key: value for key, value in wish.items() if key != "more"})
    jobs |= {f"after {name}": job(place, name) for name in GOING_ON if name in names}
    return dict(zip([*jobs, "whole"], run_jobs(place, [*jobs.values(), job(place, "whole")]), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_ends_with_one_sentence_that_names_rank_and_cause_and_what_is_kept(
    done: dict[str, dict[str, Any]], name: str
) -> None:
    wish, code, who, what, kept = FAULTS[name]
    dead = wish["harm"]["rank"] if name.startswith("killed") else None
    alive = [one for rank, one in enumerate(done[name]["ranks"]) if rank != dead]
    assert [one["code"] for one in alive] == [code] * len(alive), alive
    told = [[line for line in one["said"].splitlines() if line.startswith("sdtrain: ")] for one in alive]
    assert all(lines == told[0] for lines in told) and len(told[0]) == 1, told
    assert all(part in told[0][0] for part in (who, what, kept)), told
    assert sum("Traceback" in one["said"] for one in alive) == (code == FAULT)


@pytest.mark.parametrize("name", GOING_ON)
def test_the_run_that_goes_on_becomes_the_uninterrupted_one(
    place: Path, done: dict[str, dict[str, Any]], name: str
) -> None:
    after = done[f"after {name}"]
    assert after["code"] == 0 and "going on at 16 from" in after["said"], after["said"]
    assert unequal(tensors(place / "whole", END), tensors(place / name, END)) == []
    assert rows(place / "whole") == rows(place / name)
    for kept in ("best/metrics.json", "samples/fakes_000000016.png"):
        assert (place / "whole" / kept).read_bytes() == (place / name / kept).read_bytes()
