"""Pictures of a super-resolution run: strips of fixed images, and histograms of what discriminators say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 192  # of a tile
ZOOM = 3
BINS = 20


def tile(image: Tensor, window: tuple[int, int, int]) -> Tensor:
    """The square (top, left, side) of a uint8 image [3, H, W] at SIDE pixels, by nearest neighbour."""
    top, left, side = window
    cut = image[:, top : top + side, left : left + side].float()[None]
    return F.interpolate(cut, size=(SIDE, SIDE), mode="nearest")[0].to(torch.uint8)


def strip(images: Sequence[Tensor]) -> Tensor:
    """Images of one content (the first may be smaller) side by side; below them the busiest part, ZOOM times as large.

    uint8 [3, H, W] each -> [3, 2 SIDE, SIDE * len(images)].
    """
    height, width = images[-1].shape[-2:]
    full = [_enlarged(image, height, width) for image in images]
    side = min(height, width)
    whole = ((height - side) // 2, (width - side) // 2, side)
    windows = whole, busiest(images[-1], whole)
    return torch.cat([torch.cat([tile(image, window) for image in full], 2) for window in windows], 1)


def busiest(image: Tensor, whole: tuple[int, int, int]) -> tuple[int, int, int]:
    """The window of 1 / ZOOM of the side, on a grid of half its size inside `whole`, whose brightness varies most.

    `image` is uint8 [3, H, W]; a window is (top, left, side).
    """
    top, left, side = whole
    small = max(side // ZOOM, 1)
    starts = range(0, side - small + 1, max(small // 2, 1))
    grey = image.float().mean(0)
    found = [(float(grey[top + y :, left + x :][:small, :small].std()), -y, -x) for y in starts for x in starts]
    _, y, x = max(found)
    return top - y, left - x, small


def _enlarged(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None].float(), size=(height, width), mode="nearest")[0].to(torch.uint8)


def histogram(probabilities: Sequence[float]) -> list[int]:
    """How many of the probabilities fall into each of BINS equal parts of [0, 1]."""
    return np.histogram(np.asarray(probabilities), bins=BINS, range=(0.0, 1.0))[0].tolist()


def bars(counts: dict[str, list[int]]) -> Any:
    """One row of bars a discriminator, 0 on the left and 1 on the right: uint8 [H, W, 3]."""
    width, height = 12 * BINS, 90
    sheet = np.full((height * len(counts), width, 3), 255, np.uint8)
    for row, values in enumerate(counts.values()):
        base, top = (row + 1) * height - 4, max(max(values), 1)
        sheet[base : base + 1] = 0
        sheet[row * height : base, width // 2] = 200
        for i, value in enumerate(values):
            tall = round((height - 12) * value / top)
            sheet[base - tall : base, i * 12 + 1 : i * 12 + 11] = (60, 90, 160)
    return sheet


def as_hwc(image: Tensor) -> Any:
    """[C, H, W] -> numpy [H, W, C]."""
    return image.permute(1, 2, 0).contiguous().cpu().numpy()
