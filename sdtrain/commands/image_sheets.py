"""Sheets of images for the figures of the papers, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.commands.plots import new_figure
from sdtrain.commands.tables import one_line, shortened

SMALL = 128  # images with fewer pixels a side are shown pixel by pixel
NAME = 34  # characters beside a row


@dataclass(frozen=True)
class ImageRow:
    """Images [N, R, R, 3] uint8 of one run beside each other."""

    name: str
    images: Any


def rows_of_images(rows: Sequence[ImageRow], heads: Sequence[str]) -> Any:
    """Rows below each other; a name stands beside the first of the rows that share it."""
    side = 1.45
    figure = new_figure(side * len(heads) + 1.0, side * len(rows) + 0.4)
    axes = figure.subplots(len(rows), len(heads), squeeze=False)
    for number, (line, row) in enumerate(zip(axes, rows)):
        for ax, image in zip(line, row.images):
            show(ax, image)
        if number == 0 or rows[number - 1].name != row.name:
            line[0].set_ylabel(wrapped(row.name), fontsize=8, parse_math=False)
    for ax, head in zip(axes[0], heads):
        ax.set_title(head, fontsize=9)
    return figure


def side_by_side(sheets: Sequence[ImageRow], columns: int) -> Any:
    """A grid of images for each run, beside each other, names above."""
    from sdtrain.sampling import grid

    rows = -(-len(sheets[0].images) // columns)
    figure = new_figure(1.3 * columns * len(sheets), 1.3 * rows + 0.4)
    axes = figure.subplots(1, len(sheets), squeeze=False)[0]
    for ax, sheet in zip(axes, sheets):
        show(ax, grid(sheet.images, columns), sheet.images.shape[-1])
        ax.set_title(shortened([sheet.name], 60)[sheet.name], fontsize=10, parse_math=False)
    return figure


def show(ax: Any, image: Any, side: int = 0) -> None:
    """An image [H, W, 3] uint8 without axes; `side`: of the images it is put together from."""
    ax.imshow(image, interpolation="nearest" if (side or len(image)) < SMALL else "antialiased")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def wrapped(name: str) -> str:
    """A name beside a row of images, in lines of its words."""
    return "\n".join(shortened([part], NAME)[part] for part in one_line(name).split(", "))
