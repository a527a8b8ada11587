"""Without these, a run that is moved to another number of ranks becomes another run.

Test of whole runs in real processes: what one number of ranks began, others go on with, and what one rank cannot read
stops all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, unequal, worst, write_config

from sdtrain.engine.checkpoint import verify

BATCH, GHOST = 24, 2  # 12 ghosts: 1, 2, 3 and 4 ranks can share them


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    make_shards(folder / "shards")
    make_shards(folder / "dying")
    for shards in ("shards", "dying"):
        clock = {"batch_size": BATCH, "ghost_batch": GHOST, "log_img": BATCH, "save_img": 100 * BATCH}
        lazy = {"sd__every": 2, "sd__share": 0.5}  # L_SD in every other step, on half of each ghost
        write_config(folder / f"{shards}.yaml", tiny_config(folder / shards, **clock, **lazy, data__prefetch=1))
    return folder


def args(place: Path, out: str, steps: int, shards: str = "shards") -> list[str]:
    total = ["--set", f"total_img={steps * BATCH}"]
    return ["--cfg", str(place / f"{shards}.yaml"), "--out", str(place / out), *total]


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """Four steps on one rank, two epochs of the data."""
    done = run_jobs(place, [{"args": args(place, "alone", 4)}])[0]
    assert done["code"] == 0, done["said"]
    return place / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [[4, 2, 1], [4, 2, 3, 1]], ids=str)
def test_each_step_on_another_number_of_ranks_is_the_run_of_one_rank_bit_for_bit(
    place: Path, alone: Path, worlds: list[int]
) -> None:
    out = "to".join(map(str, worlds))
    for step, ranks in enumerate(worlds, 5 - len(worlds)):
        jobs = [{"args": args(place, out, step)}]
        if ranks == 2 and len(worlds) == 3:  # while the launch is there: the data dies under two ranks
            command = ["sh", "-c", 'rm "$0/001.tar"', str(place / "dying")]
            dying = args(place, f"{out}_dying", 4, "dying")
            jobs.append({"args": dying, "meanwhile": {"time": 2, "command": command}})
        told = run_jobs(place, jobs, ranks)
        assert [rank["code"] for rank in told[0].get("ranks", told[:1])] == [0] * ranks, told
        if ranks == 2 and len(worlds) == 3:
            assert [rank["code"] for rank in told[1]["ranks"]] == [2, 2], told
            assert verify(place / f"{out}_dying" / "checkpoints" / f"img_{2 * BATCH:09d}") is None
    assert unequal(tensors(alone, 4 * BATCH), tensors(place / out, 4 * BATCH)) == []
    deviation = worst(rows(alone), rows(place / out))  # of means, whose float64 sums are grouped by rank
    print("worst deviation:", deviation)
    assert deviation[0] <= 1e-12
