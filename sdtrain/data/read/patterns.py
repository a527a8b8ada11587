"""What a user types for shards - a folder, a glob, a brace pattern, an address - as a list of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sdtrain.data.read.budget import SHARDS
from sdtrain.data.read.remote import is_remote
from sdtrain.errors import DataError

MOST_BRACES = 100
BRACE = re.compile(r"\{([^{}]*)\}")


def expand(source: str) -> list[str]:
    """Shards that a folder, a glob or brace pattern names, in order. Raises DataError when there are none."""
    if os.path.isdir(source):
        _refuse_unfinished(Path(source))
        source = os.path.join(glob.escape(source), "*.tar")
    found: list[str] = []
    tried = 0
    if source.count("{") > MOST_BRACES or "\0" in source:
        raise DataError(f"{source[:80]!r} is no pattern of shards; give one with at most {MOST_BRACES} braces")
    for pattern in [source] if source.startswith("pipe:") and not BRACE.search(source) else _braces(source):
        found.extend([pattern] if is_remote(pattern) else _matches(pattern))
        tried += 1
        if tried > SHARDS:
            raise DataError(f"{source[:80]} stands for more than {SHARDS} names; is one of its numbers too large?")
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


def _braces(pattern: str) -> Iterator[str]:
    match = BRACE.search(pattern)
    if match is None:
        yield pattern
        return
    for choice in _choices(match[1]):
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _choices(inside: str) -> Iterable[str]:
    bounds = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside)
    if bounds is None:
        return inside.split(",")
    width = len(bounds[1])
    return (f"{n:0{width}d}" for n in range(int(bounds[1]), int(bounds[2]) + 1))
