"""Large pictures through a network in overlapping tiles, without seams.

Cores of about `tile` pixels cover the picture; each is fed with `overlap` pixels more on every inner side. Between two
cores the results are blended linearly over `overlap` pixels (half on either side), so a pixel that counts lies at least
overlap / 2 from a tile's inner edge: tiled equals whole where that covers the network's reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError

KINDS = {None: torch.float32, 8: torch.uint8, 16: torch.uint16}
ROWS = 64  # that are rounded at once: what they take stays in the processor's caches
AUTO_OVERLAP_MAX = 32  # beyond this the influence of a pixel is below 8-bit rounding for the usual networks


@dataclass(frozen=True)
class Span:
    """One tile along one axis: pixels [start, stop) go in; [core_start, core_stop) is its own part."""

    start: int
    stop: int
    core_start: int
    core_stop: int
    size: int  # of the whole axis
    overlap: int

    def shared(self, scale: int) -> tuple[int, int]:
        """How many pixels of the output are blended with the last tile, and with the next."""
        both = self.overlap * scale // 2 * 2
        return both if self.core_start else 0, both if self.core_stop < self.size else 0

    def counted(self, scale: int) -> slice:
        """Where this tile counts in the whole output; nothing of it counts elsewhere."""
        before, after = self.shared(scale)
        return slice(self.core_start * scale - before // 2, self.core_stop * scale + after // 2)


def spans(size: int, tile: int, overlap: int, fold: int = 1) -> list[Span]:
    """Tiles of one axis with cores of nearly equal size, at most `tile`; all edges are multiples of `fold`.

    Raises ConfigError when cores would be narrower than the overlap, which would blend three tiles.
    """
    units = size // fold
    count = -(-size // tile)
    edges = [round(i * units / count) * fold for i in range(count + 1)]
    if count > 1 and min(b - a for a, b in zip(edges, edges[1:])) < overlap:
        raise ConfigError(
            f"an overlap of {overlap} px is wider than tiles of {tile} px; make tiles at least {2 * overlap}"
        )
    margin = -(-overlap // fold) * fold
    return [Span(max(0, a - margin), min(size, b + margin), a, b, size, overlap) for a, b in zip(edges, edges[1:])]


def reach(net: nn.Module) -> int:
    """How many input pixels away a pixel can influence an output pixel, for RRDBNet and SRVGGNetCompact."""
    options: Any = getattr(net, "options", None)
    if hasattr(options, "num_block"):
        return (15 * options.num_block + 4) * (4 // options.scale)
    return options.num_conv + 2 if hasattr(options, "num_conv") else AUTO_OVERLAP_MAX


def auto_overlap(net: nn.Module) -> int:
    """Twice the reach, where that is affordable."""
    return min(2 * reach(net), AUTO_OVERLAP_MAX)


class Joined:
    """A picture [C, H, W] in the making: tiles come row by row, each row from the left.

    What two tiles share waits until both are there, so every pixel is written once: as the network gives it, or with
    `bits` as a whole number, of values cut to [0, 1].
    """

    def __init__(self, out: Tensor, scale: int, overlap: int, bits: int | None) -> None:
        self.out, self.scale, self.bits = out, scale, bits
        width = overlap * scale
        self.fade = (torch.arange(-(width // 2), width // 2) + 0.5) / max(width, 1) + 0.5  # how much the next counts
        self.left = torch.empty(0)  # of the last tile, the columns that the next one shares
        self.above = torch.empty(out.shape[0], len(self.fade), out.shape[2])  # rows of the last row of tiles

    def add(self, made: Tensor, y: Span, x: Span) -> None:
        """Take what the network has made of a tile, [C, scale h, scale w]."""
        rows, columns = y.counted(self.scale), x.counted(self.scale)
        top, first = y.start * self.scale, x.start * self.scale
        made = made[:, rows.start - top : rows.stop - top, columns.start - first : columns.stop - first]
        before, after = x.shared(self.scale)
        done = made.shape[2] - after
        if before:
            self._add_columns(self.left.lerp(made[:, :, :before], self.fade), y, columns.start)
        self._add_columns(made[:, :, before:done], y, columns.start + before)
        self.left = made[:, :, done:].clone()  # no more of the tile is kept

    def _add_columns(self, made: Tensor, y: Span, first: int) -> None:
        columns, (before, after) = slice(first, first + made.shape[2]), y.shared(self.scale)
        place, above = self.out[:, y.counted(self.scale), columns], self.above[:, :, columns]
        done = made.shape[1] - after
        if before:
            self._write(place[:, :before], above.lerp(made[:, :before], self.fade[:, None]))
        self._write(place[:, before:done], made[:, before:done])
        if after:
            above.copy_(made[:, done:])

    def _write(self, place: Tensor, values: Tensor) -> None:
        if self.bits is None:
            place.copy_(values)
            return
        for first in range(0, values.shape[1], ROWS):
            rows = slice(first, first + ROWS)
            place[:, rows].copy_(values[:, rows].clamp(0, 1).mul_(2**self.bits - 1).round_())


@torch.inference_mode()
def enlarge(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    scale: int,
    fold: int = 1,
    tile: int = 512,
    overlap: int = AUTO_OVERLAP_MAX,
    bits: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda pixels: None,
) -> Tensor:
    """[3, H, W] in [0, 1] -> [3, scale H, scale W] on the CPU, by tiles on `device`.

    float32 as the network gives it; with `bits` 8 or 16 uint8 or uint16, values beyond [0, 1] cut off. `fold` is what
    sides must be a multiple of (pixel-unshuffle); the picture is extended by its edge and cut again. `progress` hears
    of pixels done.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (0, -width % fold, 0, -height % fold), mode="replicate")[0]
    rows, columns = (side * scale for side in padded.shape[-2:])
    out = torch.empty(rows, columns, image.shape[0], dtype=KINDS[bits]).permute(2, 0, 1)  # pixels, as files have them
    joined = Joined(out, scale, overlap, bits)
    for y in spans(padded.shape[-2], tile, overlap, fold):
        for x in spans(padded.shape[-1], tile, overlap, fold):
            part = padded[:, y.start : y.stop, x.start : x.stop].to(device)
            joined.add(net(part[None])[0].float().cpu(), y, x)
            progress((y.core_stop - y.core_start) * (x.core_stop - x.core_start))
    return out[:, : height * scale, : width * scale]
