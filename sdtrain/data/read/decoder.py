"""Bytes of a shard to pixels of a batch. Free of torch: decoding processes start in a fraction of a second."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdtrain.data.read.budget import DOWNLOAD_BYTES, LIMITS, PictureLimits
from sdtrain.data.read.images import ImageRejected, decode_image, refuse_bytes
from sdtrain.data.read.remote import fetch, is_remote
from sdtrain.errors import DataError, ShardChanged
from sdtrain.files import PAUSES_SEC, Stamp, open_regular, patiently, stamp_of

# A request is one row of int64: where the pixels go, where the bytes lie, and what happens between.
COLUMNS = ("dest", "shard", "offset", "size", "side", "flip", "crop_x", "crop_y", "align")
NUM_COLUMNS = len(COLUMNS)
NO_CROP = -1
OPEN_SHARDS = 64


class Decoder:
    """Reads requests into a buffer of bytes, pixels as [side, side, 3]. Keeps the most recently used shards open.

    The planes are separated later, by the copy out of shared memory that is needed anyway (`planes_of`).
    """

    def __init__(
        self,
        shards: Sequence[str],
        sha256: Sequence[str],
        cache: str,
        pad: bool,
        allow_pipe: bool = False,
        limits: PictureLimits = LIMITS,
        sizes: Sequence[int] = (),
        stamps: Sequence[Stamp] = (),
    ) -> None:
        """`stamps`: of each shard what it must keep; none = whatever is found is read."""
        self._allow_pipe, self._limits, self._sizes, self._stamps = allow_pipe, limits, sizes, stamps
        self._shards, self._sha256, self._cache, self._pad = shards, sha256, Path(cache), pad
        self._open: OrderedDict[int, int] = OrderedDict()
        self._given_up = False  # the last read has failed, however often it was tried

    @classmethod
    def of(cls, setup: dict[str, Any]) -> Decoder:
        """The one that a pool describes to its processes, as JSON."""
        more = {key: setup[key] for key in ("shards", "sha256", "cache", "pad", "allow_pipe", "sizes", "stamps")}
        return cls(**more, limits=PictureLimits(**setup["limits"]))

    def run(self, requests: np.ndarray, buffer: np.ndarray) -> list[tuple[int, str]]:
        """Carry out requests [n, NUM_COLUMNS]; returns (row, reason) for those that could not be.

        Raises `ShardChanged` when a shard is no longer what it was.
        """
        bad = []
        for row, request in enumerate(requests.tolist()):
            try:
                self._one(request, buffer)
            except ShardChanged:
                raise
            except (ImageRejected, OSError, EOFError, DataError) as error:
                bad.append((row, str(error)[:200]))
        return bad

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _one(self, request: list[int], buffer: np.ndarray) -> None:
        dest, shard, offset, size, side, flip, crop_x, crop_y, align = request
        image, _ = decode_image(self._read(shard, offset, size), self._limits)
        if crop_x != NO_CROP:
            image = self._cropped(image, side, crop_x, crop_y, align)
        if image.size != (side, side):
            raise ImageRejected(f"wrong resolution: {image.width}x{image.height}, not {side}x{side}")
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer[dest : dest + 3 * side * side] = np.asarray(image).reshape(-1)

    def _cropped(self, image: Image.Image, side: int, crop_x: int, crop_y: int, align: int) -> Image.Image:
        if min(image.size) < side:
            image = self._padded(image, side)
        x = crop_x % ((image.width - side) // align + 1) * align
        y = crop_y % ((image.height - side) // align + 1) * align
        return image.crop((x, y, x + side, y + side))

    def _padded(self, image: Image.Image, side: int) -> Image.Image:
        if not self._pad:
            raise ImageRejected(f"smaller than the crop: {image.width}x{image.height}, crop {side}")
        right, below = max(0, side - image.width), max(0, side - image.height)
        return Image.fromarray(np.pad(np.asarray(image), ((0, below), (0, right), (0, 0)), mode="reflect"))

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        refuse_bytes(size, self._limits)
        try:
            data = patiently(lambda: self._attempt(shard, offset, size), () if self._given_up else PAUSES_SEC)
        except OSError:  # the next reads are not waited for, until one comes through: a dead disk is soon known
            self._given_up = True
            raise
        self._given_up = False
        if len(data) < size:
            raise EOFError(f"truncated tar: shard ends {size - len(data)} bytes too early")
        return data

    def _attempt(self, shard: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd(shard), size, offset)
            self._require_unchanged(shard)
            return data
        except FileNotFoundError:
            self._require_unchanged(shard)
            raise EOFError("missing shard") from None
        except OSError:  # network file systems fail for a moment; a stale descriptor is opened afresh
            self._forget(shard)
            raise

    def _fd(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = open_regular(self._path(shard))
        self._open.move_to_end(shard)
        return self._open[shard]

    def _require_unchanged(self, shard: int) -> None:
        """The file under the shard's name, and the open one where it has one, are what they were."""
        was = tuple(self._stamps[shard]) if self._stamps else (-1, 0)
        if was == (-1, 0):  # not there from the start, or fetched
            return
        fd = self._open.get(shard)
        if fd is not None and os.fstat(fd).st_nlink and stamp_of(fd) == was:
            return
        self._forget(shard)  # another file may have taken the name, even one with the same bytes
        if (now := stamp_of(self._shards[shard])) == was:
            return
        what = "was deleted" if now[0] < 0 else f"was changed or replaced ({was[0]} bytes then, {now[0]} now)"
        raise ShardChanged(f"shard {self._shards[shard]} {what} while the run was reading it; put it back")

    def _forget(self, shard: int) -> None:
        if shard in self._open:
            os.close(self._open.pop(shard))

    def _path(self, shard: int) -> Path:
        name = self._shards[shard]
        if not is_remote(name):
            return Path(name)
        digest = self._sha256[shard] if self._sha256 else ""
        most = self._sizes[shard] if self._sizes else DOWNLOAD_BYTES
        return fetch(name, self._cache, digest, allow_pipe=self._allow_pipe, most=most)
