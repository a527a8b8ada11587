"""Batches of training images: step -> positions -> samples -> pixels. Only bad samples are remembered.

Resuming is `start_step`. Ranks appear only as the numbers of the ghosts they own, workers only as speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.data.read.dataset import Dataset, open_dataset
from sdtrain.data.read.order import flipped, hashed, order, substitute
from sdtrain.data.read.pool import Pool, WorkerError, requests_of
from sdtrain.data.read.reader import iterate, planes_of, read_all
from sdtrain.errors import DataError

__all__ = ["Batch", "Dataset", "Stream", "WorkerError", "iterate", "open_dataset", "order", "read_all"]
SUBSTITUTES = 64


@dataclass(frozen=True)
class Batch:
    """The share of one step that some ghosts own, in the order of the ghosts.

    images  uint8 [N, 3, H, W], when CUDA is present pinned and channels last; N = len(ghosts) * ghost_batch
    labels  float32 one-hot [N, num_classes], or None for a data set without labels
    indices int64 [N]: which samples these are (a substitute's own number where one stands in)
    lq      uint8 [N, 3, H / scale, W / scale] for paired data, else None
    """

    step: int
    images: Tensor
    labels: Tensor | None
    indices: Tensor
    lq: Tensor | None = None


class Stream:
    """Endless iterator over batches from `start_step` on.

    ghosts      the ghosts of the global batch to deliver, ghost g being positions g*ghost_batch ... of the step
    resolution  what the model needs; with `crop`, images may have any size not smaller (or any with `pad`)
    max_bad     unreadable samples above which the stream raises: a fraction of the data set (at least one sample unless
                0.0), with those that other streams have found (`learn`), or a whole number in a row; each is replaced
                by another that seed and position decide
    paired      deliver `KEY.lq.png` too; `scale` is the ratio of the sides

    Raises DataError for data that cannot serve the model and when too much is bad, WorkerError when a process dies.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        ghost_batch: int,
        ghosts: Sequence[int],
        resolution: int | None = None,
        channels: int = 3,
        xflip: bool = False,
        workers: int = 2,
        prefetch: int = 2,
        start_step: int = 0,
        max_bad: float | int = 0.001,
        crop: int | None = None,
        pad: bool = False,
        paired: bool = False,
        scale: int = 4,
        purpose: str = "train",
        **waiting: Any,
    ) -> None:
        """`waiting`: `stuck_sec` and `enough` of the pool."""
        self.dataset, self.seed, self.batch_size, self.ghost_batch = dataset, seed, batch_size, ghost_batch
        self.ghosts, self.xflip, self.crop, self.max_bad, self.scale = tuple(ghosts), xflip, crop, max_bad, scale
        self.purpose, self.step, self.paired, self.prefetch = purpose, start_step, paired, max(1, prefetch)
        self._order_seed = seed if purpose == "train" else _other_seed(seed, purpose)
        self.side = crop or resolution or dataset.resolution or 0
        check_fits(dataset, self.side, batch_size=batch_size, crop=crop, channels=channels, paired=paired)
        self._bad: dict[int, str] = {}
        self._news: list[tuple[int, str]] = []
        self._bad_in_a_row = 0
        self._positions = _positions_in_batch(self.ghosts, ghost_batch)
        self._ahead: dict[int, np.ndarray] = {}
        self._submitted = start_step
        size = len(self._positions) * self._sample_bytes()
        more = {"num_slots": self.prefetch, "slot_bytes": size, "pad": pad, **waiting}
        self._pool = Pool(dataset, num_workers=workers, **more)

    @property
    def bad(self) -> list[tuple[str, str, str]]:
        """Samples found unreadable so far: (shard, key, reason), in the order they were met."""
        return [(*self.dataset.locate(i), reason) for i, reason in self._bad.items()]

    def news(self) -> list[tuple[int, str]]:
        """(sample, reason) of those found unreadable since this was last asked."""
        found, self._news = self._news, []
        return found

    def learn(self, found: Iterable[tuple[int, str]]) -> None:
        """Take over what the streams of other ranks have found. Raises DataError when it is too much together."""
        for i, reason in found:
            self._bad.setdefault(i, reason)
        self._require_few()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while self._submitted < self.step + self.prefetch:
            self._submit(self._submitted)
            self._submitted += 1
        step, slot = self.step, self.step % self.prefetch
        indices = self._ahead.pop(step)
        bad_rows = self._pool.wait(step)
        self._mend(step, slot, indices, bad_rows)
        batch = self._batch(step, slot, indices)
        self.step += 1
        return batch

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def positions(self, step: int) -> np.ndarray:
        """Global positions of this stream's samples at a step: int64 [N]."""
        return step * self.batch_size + self._positions

    def _sample_bytes(self) -> int:
        lq_side = self.side // self.scale if self.paired else 0
        return 3 * (self.side * self.side + lq_side * lq_side)

    def _submit(self, step: int) -> None:
        positions = self.positions(step)
        indices = order(self._order_seed, positions, self.dataset.num_samples)
        for row, i in enumerate(indices):
            if int(i) in self._bad:
                indices[row] = self._stand_in(int(positions[row]))
        self._ahead[step] = indices
        self._pool.submit(step, step % self.prefetch, self._requests(positions, indices))

    def _requests(self, positions: np.ndarray, indices: np.ndarray, first_row: int = 0) -> np.ndarray:
        rows = self._half_requests(positions, indices, first_row, lq=False)
        if not self.paired:
            return rows
        return np.concatenate([rows, self._half_requests(positions, indices, first_row, lq=True)])

    def _half_requests(self, positions: np.ndarray, indices: np.ndarray, first_row: int, *, lq: bool) -> np.ndarray:
        side = self.side // self.scale if lq else self.side
        rows = requests_of(self.dataset, indices, side, lq=lq)
        before = 3 * self.side * self.side * len(self._positions) if lq else 0
        rows[:, 0] += before + first_row * 3 * side * side
        if self.xflip:
            rows[:, 5] = flipped(self._order_seed, positions)
        if self.crop:
            rows[:, 6] = (hashed(self._order_seed, "crop x", positions) >> np.uint64(1)).astype(np.int64)
            rows[:, 7] = (hashed(self._order_seed, "crop y", positions) >> np.uint64(1)).astype(np.int64)
        rows[:, 8] = self.scale if self.paired and not lq else 1
        return rows

    def _mend(self, step: int, slot: int, indices: np.ndarray, bad_rows: list[tuple[int, str]]) -> None:
        """Record bad samples and decode their substitutes into the same places."""
        reasons = {row % len(indices): reason for row, reason in bad_rows}
        for row in range(len(indices)):
            if row not in reasons:
                self._bad_in_a_row = 0
                continue
            self._quarantine(int(indices[row]), reasons[row])
            indices[row] = self._replace(int(self.positions(step)[row]), row, slot)

    def _replace(self, position: int, row: int, slot: int) -> int:
        while True:
            stand_in = self._stand_in(position)
            requests = self._requests(np.array([position]), np.array([stand_in]), row)
            bad = self._pool.decoder.run(requests, self._pool.slot(slot))
            if not bad:
                return stand_in
            self._quarantine(stand_in, bad[0][1])

    def _stand_in(self, position: int) -> int:
        for attempt in range(SUBSTITUTES):
            candidate = substitute(self._order_seed, position, attempt, self.dataset.num_samples)
            if candidate not in self._bad:
                return candidate
        raise DataError(f"no readable sample found for position {position} of {self.dataset.source}{self._worst()}")

    def _quarantine(self, i: int, reason: str) -> None:
        if i not in self._bad:
            self._bad[i] = reason
            self._news.append((i, reason))
        self._bad_in_a_row += 1
        self._require_few()

    def _require_few(self) -> None:
        if isinstance(self.max_bad, float):
            # One bad image must not end a run on a small set, unless none at all was allowed.
            allowed = max(1.0, self.max_bad * self.dataset.num_samples) if self.max_bad else 0.0
            if len(self._bad) > allowed:
                share = f"{len(self._bad)} of {self.dataset.num_samples} samples are unreadable"
                raise DataError(f"{share}, data.max_bad allows {self.max_bad:g}{self._worst()}")
        elif self._bad_in_a_row > self.max_bad:
            raise DataError(
                f"{self._bad_in_a_row} samples in a row are unreadable, max_bad allows {self.max_bad}{self._worst()}"
            )

    def _worst(self) -> str:
        counts: dict[str, int] = {}
        for shard, _, _ in self.bad:
            counts[shard] = counts.get(shard, 0) + 1
        worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
        shard, key, reason = self.bad[-1]
        listed = ", ".join(f"{name} ({count})" for name, count in worst)
        return f"; worst shards: {listed}; last: {key} in {shard}, {reason}; run: sdtrain verify {self.dataset.source}"

    def _batch(self, step: int, slot: int, indices: np.ndarray) -> Batch:
        data, num, side = self._pool.slot(slot), len(indices), self.side
        cut = num * 3 * side * side
        as_decoded = torch.cuda.is_available()  # a GPU separates planes in no time, a CPU best while it copies
        images = planes_of(data[:cut], num, side, as_decoded)
        lq_side = side // self.scale
        lq = planes_of(data[cut:], num, lq_side, as_decoded) if self.paired else None
        return Batch(step, images, one_hot(self.dataset, indices), torch.from_numpy(indices), lq)


def one_hot(dataset: Dataset, indices: np.ndarray) -> Tensor | None:
    """Labels as float32 [n, num_classes], None without classes. A sample without a label has a row of zeros."""
    if dataset.num_classes == 0:
        return None
    labels = torch.from_numpy(dataset.index.label[indices].astype(np.int64))
    return F.one_hot(labels + 1, dataset.num_classes + 1)[:, 1:].float()


def check_fits(
    dataset: Dataset, side: int, *, batch_size: int, crop: int | None = None, channels: int = 3, paired: bool = False
) -> None:
    """Raise DataError when the data cannot feed the model; called by the stream and at plan time."""
    if channels != 3:
        raise DataError(
            f"the stream delivers 3 channels, the model asks for {channels}; every image is converted to RGB"
        )
    if side < 1:
        raise DataError(
            f"{dataset.source} holds images of mixed sizes; set a crop, or pack it with: sdtrain pack --resolution N"
        )
    if crop is None and dataset.resolution is not None and dataset.resolution != side:
        raise DataError(
            f"{dataset.source} holds {dataset.resolution} px images, the model needs {side} px; pack at {side} px"
        )
    if dataset.num_samples < batch_size:
        raise DataError(
            f"{dataset.source} has {dataset.num_samples} samples, fewer than a batch of {batch_size}; lower batch_size"
        )
    if paired and not dataset.paired:
        raise DataError(
            f"{dataset.source} lacks low-quality partners (KEY.lq.png) for some samples; degrade on the fly instead"
        )


def _positions_in_batch(ghosts: Sequence[int], ghost_batch: int) -> np.ndarray:
    return (np.asarray(ghosts, np.int64)[:, None] * ghost_batch + np.arange(ghost_batch)).reshape(-1)


def _other_seed(seed: int, purpose: str) -> int:
    return int(hashed(seed, purpose, 0) >> np.uint64(1))
