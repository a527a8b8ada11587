"""What a user types for shards - a folder, a glob, a brace pattern, an address - as a list of them."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from sdtrain.data.read.remote import is_remote
from sdtrain.errors import DataError

BRACE = re.compile(r"\{([^{}]*)\}")


def expand(source: str) -> list[str]:
    """Shards that a folder, a glob or brace pattern names, in order. Raises DataError when there are none."""
    if os.path.isdir(source):
        _refuse_unfinished(Path(source))
        source = os.path.join(glob.escape(source), "*.tar")
    found: list[str] = []
    for pattern in [source] if source.startswith("pipe:") and not BRACE.search(source) else _braces(source):
        found.extend([pattern] if is_remote(pattern) else _matches(pattern))
    if not found:
        raise DataError(
            f"no shard matches {source} (looked from {os.getcwd()}); check the path, or make shards with: sdtrain pack"
        )
    return list(dict.fromkeys(found))


def _matches(pattern: str) -> list[str]:
    """Files of a glob; one whose name looks like an address stays a file."""
    names = sorted(glob.glob(pattern))
    return [os.path.join(".", name) if is_remote(name) else name for name in names]


def _refuse_unfinished(folder: Path) -> None:
    if (folder / ".pack").is_dir():
        raise DataError(f"packing into {folder} has not finished; repeat the command that began it")


def _braces(pattern: str) -> list[str]:
    match = BRACE.search(pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        width = len(bounds[1])
        choices = [f"{n:0{width}d}" for n in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        choices = match[1].split(",")
    return [full for choice in choices for full in _braces(pattern[: match.start()] + choice + pattern[match.end() :])]
