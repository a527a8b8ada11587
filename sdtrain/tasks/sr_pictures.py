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
HEADER = 28


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


def headed(sheet: Tensor, names: Sequence[str]) -> Tensor:
    """A sheet of strips [3, H, W] uint8 below a row that names its columns: [3, HEADER + H, W]."""
    from PIL import Image, ImageDraw, ImageFont

    band = Image.new("RGB", (sheet.shape[2], HEADER), "white")
    write, font = ImageDraw.Draw(band), ImageFont.load_default(15)
    for column, name in enumerate(names):
        write.text(((column + 0.5) * SIDE, HEADER / 2), name, fill="black", font=font, anchor="mm")
    return torch.cat([torch.from_numpy(np.array(band)).permute(2, 0, 1), sheet], 1)


def bars(counts: dict[str, list[int]], title: str) -> Any:
    """The histogram of each discriminator, one below the other on one axis of P(real): uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.9 + 1.9 * len(counts)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(counts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    left, top = np.arange(BINS) / BINS, max(1, *(max(values) for values in counts.values()))
    for i, (ax, (name, values)) in enumerate(zip(axes, counts.items())):
        ax.bar(left, values, width=1 / BINS, align="edge", label=name, color=f"C{i}", edgecolor="white")
        ax.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
        ax.set(xlim=(0, 1), ylim=(0, 1.3 * top), ylabel="number of images")  # room for the name
        ax.legend(loc="upper right")
    axes[-1].set_xlabel("P(real)")
    figure.suptitle(title, fontsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def as_hwc(image: Tensor) -> Any:
    """[C, H, W] -> numpy [H, W, C]."""
    return image.permute(1, 2, 0).contiguous().cpu().numpy()
