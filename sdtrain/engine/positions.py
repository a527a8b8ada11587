"""Folders named by images seen, in the order of their numbers. Torch is not imported."""

from __future__ import annotations

import re
from pathlib import Path

MARKER = "complete.json"  # what lacks it was interrupted, and does not count


def position(folder: Path) -> int | None:
    """The images seen that a folder's name says; None for any other name."""
    found = re.fullmatch(r"img_([0-9]{1,18})", folder.name)
    return int(found[1]) if found else None


def positions(root: Path) -> list[Path]:
    """What is named by a position, earliest first: names beyond nine digits sort wrongly as text."""
    found = [(at, path.name, path) for path in root.glob("img_*") if (at := position(path)) is not None]
    return [path for *_, path in sorted(found)]


def complete(root: Path) -> list[Path]:
    """Those that have their marker, earliest first."""
    return [path for path in positions(root) if (path / MARKER).exists()]


def saved_img(run: Path) -> int:
    """Images seen at the newest complete checkpoint of a run folder; 0 before there is one."""
    found = complete(run / "checkpoints")
    return (position(found[-1]) or 0) if found else 0
