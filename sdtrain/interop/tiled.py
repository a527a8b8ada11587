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

    def weights(self, scale: int) -> Tensor:
        """How much each pixel of the output counts, [scale (stop - start)]; the tiles of an axis add up to one."""
        at = torch.arange(self.start * scale, self.stop * scale, dtype=torch.float32) + 0.5
        width = max(self.overlap * scale, 1)
        weight = torch.ones_like(at)
        if self.core_start > 0:
            weight *= ((at - self.core_start * scale) / width + 0.5).clamp(0, 1)
        if self.core_stop < self.size:
            weight *= (0.5 - (at - self.core_stop * scale) / width).clamp(0, 1)
        return weight

    def shared(self, scale: int) -> slice:
        """Of the whole output: all that this tile and the last one both count in, and no more than a pixel beyond."""
        half = (self.overlap * scale + 1) // 2 + 1 if self.core_start else 0
        return slice(max(self.core_start * scale - half, 0), self.core_start * scale + half)

    def parts(self, weights: Tensor) -> list[slice]:
        """Of the output of this tile: what is blended with the last one, its own, what is blended with the next."""
        (own,) = (weights == 1).nonzero(as_tuple=True)
        counts = weights.nonzero()
        first, last = (int(counts[0]), int(counts[-1]) + 1) if len(counts) else (0, 0)
        low, high = (int(own[0]), int(own[-1]) + 1) if len(own) else (last, last)
        return [part for part in (slice(first, low), slice(low, high), slice(high, last)) if part.start < part.stop]


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


def blend(out: Tensor, result: Tensor, y: Span, x: Span, scale: int) -> None:
    """Add a tile's result [C, h, w], weighed, to the picture [C, H, W]; where it counts alone it is only copied."""
    down, across = y.weights(scale), x.weights(scale)
    for rows in y.parts(down):
        for columns in x.parts(across):
            own = result[:, rows, columns]
            place = out[:, y.start * scale :, x.start * scale :][:, rows, columns]
            if down[rows].min() == across[columns].min() == 1:
                place.copy_(own)
            else:
                place += own * (down[rows, None] * across[columns])


@torch.inference_mode()
def enlarge(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    scale: int,
    fold: int = 1,
    tile: int = 512,
    overlap: int = AUTO_OVERLAP_MAX,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda pixels: None,
) -> Tensor:
    """[3, H, W] -> [3, scale H, scale W], float32 on the CPU, by tiles on `device`; `progress` hears of pixels done.

    `fold` is what sides must be a multiple of (pixel-unshuffle); the picture is extended by its edge and cut again.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (0, -width % fold, 0, -height % fold), mode="replicate")[0]
    # rows of pixels, as files have them; what tiles share is summed up, all else is written once
    out = torch.empty(*(side * scale for side in padded.shape[-2:]), image.shape[0]).permute(2, 0, 1)
    down, across = (spans(side, tile, overlap, fold) for side in padded.shape[-2:])
    for y in down:
        out[:, y.shared(scale)] = 0
    for x in across:
        out[:, :, x.shared(scale)] = 0
    for y in down:
        for x in across:
            part = padded[:, y.start : y.stop, x.start : x.stop].to(device)
            result = net(part[None])[0].float().cpu()
            blend(out, result, y, x, scale)
            progress((y.core_stop - y.core_start) * (x.core_stop - x.core_start))
    return out[:, : height * scale, : width * scale]
