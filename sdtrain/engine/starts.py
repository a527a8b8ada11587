"""What a run folder says of its starts (environment.json), read without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdtrain.files import read_json

FILE = "environment.json"


def starts_of(run: Path) -> list[dict[str, Any]]:
    """One entry a start, the newest last; [] for a folder without. Raises OSError, ValueError for a damaged file."""
    if not os.path.lexists(run / FILE):
        return []
    found = read_json(run / FILE)
    starts = found.get("starts") if isinstance(found, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError("no list of starts")
    return starts


def last_start(run: Path) -> dict[str, Any]:
    """The newest start: time, command, weights and, when it has come to its end, `finished`. {} where none is noted."""
    try:
        return starts_of(run)[-1]
    except (OSError, ValueError, LookupError):
        return {}


def noted_weights(run: Path, name: str) -> tuple[Path, str]:
    """Where the newest start read weights from, and their sha256; an empty path where nothing is noted."""
    weights = last_start(run).get("weights")
    noted = weights.get(name) if isinstance(weights, dict) else None
    place, sha256 = (noted.get(key) for key in ("place", "sha256")) if isinstance(noted, dict) else (None, None)
    return (Path(place), sha256) if isinstance(place, str) and isinstance(sha256, str) else (Path(), "")
