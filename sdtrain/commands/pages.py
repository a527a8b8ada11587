"""Tables and figures as files: a page in one of four forms with its pictures beside it, or pictures alone.

PAGE.md, .html, .tex, .csv   tables, captions, notes; .csv also has the numbers behind the figures
PAGE_NAME.png                the figures of a page
PAGE.png, PAGE.svg           the only table or figure, as a picture; of several PAGE_NAME.png, .svg each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.commands import plots
from sdtrain.commands.tables import PAGES, Block, Heading, Picture, Table
from sdtrain.errors import ConfigError
from sdtrain.files import write_bytes

PICTURES = (".png", ".svg")
SUFFIXES = (*PAGES, *PICTURES)


@dataclass(frozen=True)
class Figure:
    """A picture that is still to be drawn."""

    caption: str
    draw: Callable[[], Any]
    """Returns a figure of matplotlib."""
    points: Table | None = None
    """The numbers behind it, for a page of CSV."""


@dataclass(frozen=True)
class Part:
    """What belongs to one table or figure of a paper."""

    name: str
    """Added to the names of its pictures."""
    title: str
    blocks: Sequence[Table | Figure]


def check_out(out: Path) -> None:
    """Raises ConfigError for an ending that is none of ours."""
    if out.suffix not in SUFFIXES:
        pages, pictures = ", ".join(PAGES), ", ".join(PICTURES)
        raise ConfigError(f"--out {out} ends in neither {pages} (a page) nor {pictures} (pictures alone)")


def publish(parts: Sequence[Part], notes: list[str], out: Path) -> list[Path]:
    """Write everything; the files, the page first. Raises ConfigError when they cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix in PICTURES:
            return alone(parts, out)
        blocks: list[Block] = []
        for part in parts:
            blocks += [Heading(part.title)] if len(parts) > 1 else []
            blocks += [shown for block, name in named(part.blocks, part) for shown in placed(block, name, out, notes)]
        write(out, PAGES[out.suffix](blocks, notes, ()))
        return [out, *(block.file for block in blocks if isinstance(block, Picture))]
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None


def named(blocks: Sequence[Table | Figure], part: Part) -> list[tuple[Table | Figure, str]]:
    """Each block with the name of its picture: that of the part, numbered where it has several figures."""
    figures = [block for block in blocks if isinstance(block, Figure)]
    names = {id(figure): f"{part.name}_{number}" for number, figure in enumerate(figures, 1)} if figures[1:] else {}
    return [(block, names.get(id(block), part.name)) for block in blocks]


def placed(block: Table | Figure, name: str, out: Path, notes: list[str]) -> list[Table | Picture]:
    """The block as it stands in a page: a figure as a PNG beside it, in a page of CSV also as its numbers.

    Without matplotlib there is a note instead.
    """
    if isinstance(block, Table):
        return [block]
    file = out.with_name(f"{out.stem}_{name}.png")
    points = [block.points] if block.points and out.suffix == ".csv" else []
    try:
        plots.save(block.draw(), file)
    except ImportError as error:
        notes[:] = dict.fromkeys([*notes, f"there are no pictures: {error}; install matplotlib"])
        return [*points]
    return [*points, Picture(file, block.caption)]


def alone(parts: Sequence[Part], out: Path) -> list[Path]:
    """The figures of each part, or its first table, as pictures. Raises ConfigError without matplotlib."""
    wanted = []
    for part in parts:
        figures = [block for block in part.blocks if isinstance(block, Figure)]
        wanted += named(figures or part.blocks[:1], part)
    files = [out if len(wanted) == 1 else out.with_name(f"{out.stem}_{name}{out.suffix}") for _, name in wanted]
    try:
        for (block, _), file in zip(wanted, files):
            plots.save(block.draw() if isinstance(block, Figure) else plots.sheet(block), file)
    except ImportError as error:
        raise ConfigError(f"--out {out}: a picture needs matplotlib ({error}); install it") from None
    return files


def write(path: Path, page: str) -> None:
    """Write the page. Raises ConfigError when that fails."""
    try:
        write_bytes(path, (page + "\n").encode(errors="replace"))
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written ({error.strerror}); name another file") from None
