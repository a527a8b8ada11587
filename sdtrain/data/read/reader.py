"""Images by sample number, in the order asked for: metrics, validation, figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sdtrain.data.read.dataset import Dataset
from sdtrain.data.read.images import ImageRejected, decode_image, to_chw
from sdtrain.data.read.pool import Pool, requests_of
from sdtrain.errors import DataError

AHEAD = 2


def planes_of(pixels: np.ndarray, num: int, side: int, as_decoded: bool = False) -> Tensor:
    """Copy decoded bytes [num * side * side * 3] out of a slot as uint8 [num, 3, side, side], pinned where CUDA is.

    `as_decoded`: the channels of a pixel stay side by side in memory, and whoever wants planes separates them.
    """
    pin = torch.cuda.is_available()
    shape = (num, side, side, 3) if as_decoded else (num, 3, side, side)
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
    images = images.permute(0, 3, 1, 2) if as_decoded else images
    interleaved = pixels[: num * side * side * 3].reshape(num, side, side, 3)
    np.copyto(images.numpy(), interleaved.transpose(0, 3, 1, 2))
    return images


def read_image(dataset: Dataset, i: int, *, lq: bool = False) -> Tensor:
    """Sample i as uint8 [3, H, W], any size. Raises DataError naming shard and key when it is unreadable."""
    try:
        return torch.from_numpy(to_chw(decode_image(dataset.read(i, lq=lq), dataset.limits)[0]))
    except (OSError, EOFError, ImageRejected) as error:
        raise DataError(_unreadable(dataset, i, str(error))) from None


def iterate(
    dataset: Dataset,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    workers: int = 2,
    bad: list[tuple[str, str, str]] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images uint8 [n, 3, R, R], indices int64 [n]) for the asked samples in order, each exactly once.

    An unreadable sample raises DataError; with a list as `bad` it is left out and noted there as (shard, key, reason).
    """
    wanted = np.asarray(indices, np.int64)
    side = _side(dataset)
    chunks = [wanted[at : at + batch_size] for at in range(0, len(wanted), batch_size)]
    pool = Pool(dataset, num_workers=workers, num_slots=AHEAD, slot_bytes=batch_size * 3 * side * side)
    try:
        for number in range(min(AHEAD, len(chunks))):
            pool.submit(number, number % AHEAD, requests_of(dataset, chunks[number], side))
        for number, chunk in enumerate(chunks):
            keep = _kept(dataset, chunk, pool.wait(number), bad)
            images = planes_of(pool.slot(number % AHEAD), len(chunk), side)[torch.from_numpy(keep)]
            if number + AHEAD < len(chunks):
                pool.submit(number + AHEAD, number % AHEAD, requests_of(dataset, chunks[number + AHEAD], side))
            yield images, torch.from_numpy(chunk[keep])
    finally:
        pool.close()


def read_all(dataset: Dataset, indices: Sequence[int] | np.ndarray | None = None, workers: int = 0) -> Tensor:
    """The asked samples (default: all) as one uint8 tensor [n, 3, R, R]. Raises DataError for an unreadable one."""
    wanted = np.arange(dataset.num_samples) if indices is None else np.asarray(indices, np.int64)
    side = _side(dataset)
    out = torch.empty(len(wanted), 3, side, side, dtype=torch.uint8)
    at = 0
    for images, _ in iterate(dataset, wanted, batch_size=64, workers=workers):
        out[at : at + len(images)] = images
        at += len(images)
    return out


def _side(dataset: Dataset) -> int:
    if dataset.resolution is None:
        raise DataError(
            f"{dataset.source} holds images of mixed sizes, which do not stack; read them one by one (batch of 1)"
        )
    return dataset.resolution


def _kept(
    dataset: Dataset, chunk: np.ndarray, found_bad: list[tuple[int, str]], bad: list[tuple[str, str, str]] | None
) -> np.ndarray:
    keep = np.ones(len(chunk), bool)
    for row, reason in found_bad:
        i = int(chunk[row])
        if bad is None:
            raise DataError(_unreadable(dataset, i, reason))
        bad.append((*dataset.locate(i), reason))
        keep[row] = False
    return keep


def _unreadable(dataset: Dataset, i: int, reason: str) -> str:
    shard, key = dataset.locate(i)
    return f"sample {key} in {shard} cannot be read ({reason}); run: sdtrain verify {dataset.source}"
