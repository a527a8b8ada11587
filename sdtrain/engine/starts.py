"""What a run folder says of its starts (environment.json), read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "environment.json"


def starts_of(run: Path) -> list[dict[str, Any]]:
    """One entry a start, the newest last; [] for a folder without."""
    path = run / FILE
    found = json.loads(path.read_bytes())["starts"] if path.is_file() else []
    assert isinstance(found, list)
    return found


def last_start(run: Path) -> dict[str, Any]:
    """The newest start: time, command, weights and, when it has come to its end, `finished`. {} where none is noted."""
    try:
        return starts_of(run)[-1]
    except (OSError, ValueError, LookupError, TypeError, AssertionError):
        return {}
