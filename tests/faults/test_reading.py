"""Without these a moment's failure of a file system costs images, a dead one hours, and damage that is spread over
ranks is never too much.

Outcome: what comes back within seconds is read; what does not is given up once, not for each image; too many bad
samples on all ranks together end all of them.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_shards, run_jobs, tiny_config, write_config

from sdtrain import files
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.order import order
from sdtrain.data.read.reader import read_image
from sdtrain.data.read.stream import Stream

SAMPLES = 24


class Flaky:
    """`os.pread` that fails for the first reads; `pauses` collects what was waited in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int, code: int = errno.EIO) -> None:
        self.left, self.code, self.calls, self.pauses = failures, code, 0, []
        self.pread = os.pread
        monkeypatch.setattr(os, "pread", self)
        monkeypatch.setattr(files.time, "sleep", self.pauses.append)

    def __call__(self, *args: Any) -> bytes:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.pread(*args)


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    dataset = open_dataset(make_shards(tmp_path / "shards", samples=SAMPLES))
    return Stream(dataset, seed=0, batch_size=8, ghost_batch=2, ghosts=range(4), workers=0, max_bad=0.9)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_system_that_comes_back_costs_no_image(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    flaky = Flaky(monkeypatch, failures=len(files.PAUSES_SEC), code=code)
    with stream:
        next(stream)
    assert flaky.pauses == list(files.PAUSES_SEC) == sorted(flaky.pauses) and sum(flaky.pauses) < 10
    assert stream.bad == []


def test_images_of_an_evaluation_are_waited_for_too(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(monkeypatch, failures=2)
    assert read_image(stream.dataset, 3).shape == (3, 32, 32) and len(flaky.pauses) == 2


def test_a_dead_file_system_is_waited_for_once_and_not_for_each_image(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(monkeypatch, failures=len(files.PAUSES_SEC) + 4)
    with stream:
        next(stream)
        assert flaky.pauses == list(files.PAUSES_SEC) and len(stream.bad) == 4
        flaky.left = 2
        next(stream)
    assert len(stream.bad) == 4 and len(flaky.pauses) == len(files.PAUSES_SEC) + 2


def test_a_broken_image_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "shards", samples=SAMPLES)
    spoil(folder, [0])
    dataset = open_dataset(folder)
    flaky = Flaky(monkeypatch, failures=0)
    with Stream(dataset, seed=0, batch_size=24, ghost_batch=8, ghosts=range(3), workers=0, max_bad=0.9) as stream:
        next(stream)
    assert len(stream.bad) == 1 and flaky.calls == SAMPLES + 1 and flaky.pauses == []  # and its substitute


def spoil(folder: Path, numbers: list[int]) -> None:
    """Overwrite the beginning of these samples."""
    index = open_dataset(folder, keep_index=False).index
    for i in numbers:
        with open(sorted(folder.glob("*.tar"))[index.shard[i]], "r+b") as shard:
            shard.seek(int(index.offset[i]))
            shard.write(b"no picture")


def test_damage_that_is_spread_over_ranks_is_counted_together(tmp_path: Path) -> None:
    """Two bad samples a rank in the first step: 4 of 24 are too many for `max_bad: 0.1`, 2 of 24 are not."""
    first = order(0, np.arange(8), SAMPLES)
    for name, spoilt in (("spread", [*first[2:4], *first[6:8]]), ("few", list(first[2:4]))):
        spoil(make_shards(tmp_path / name, samples=SAMPLES), [int(i) for i in spoilt])
        clock = {"batch_size": 8, "total_img": 16, "log_img": 8, "save_img": 16, "data__max_bad": 0.1, "seed": 0}
        write_config(tmp_path / f"{name}.yaml", tiny_config(tmp_path / name, **clock))
    jobs = [
        {"args": ["--cfg", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / f"{name}_run")], "ranks": 2}
        for name in ("spread", "few")
    ]
    spread, few = run_jobs(tmp_path, jobs)
    for one in spread["ranks"]:
        assert one["code"] == 2, one["said"]
        assert "sdtrain: 4 of 24 samples are unreadable, data.max_bad allows 0.1; worst shards:" in one["said"]
    assert [one["code"] for one in few["ranks"]] == [0, 0], few
