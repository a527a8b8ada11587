"""Names, values and lists of problems as messages show them: short, printable, with the nearest name that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from sdtrain.terminal import clip

MAX_WORD, MAX_PROBLEMS = 100, 30  # longer words resemble no name; more lines help nobody


def is_address(value: object) -> bool:
    """Whether a value may name something to fetch or run: http://, s3://, pipe:, or braces that make one."""
    if not isinstance(value, str):
        return False
    return "://" in value or value.startswith("pipe:") or ("{" in value and ":" in value)


def dotted(path: Iterable[str]) -> str:
    return clip(".".join(path), 120)


def show_plain(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def show(value: Any) -> str:
    """A value as the message names it."""
    if isinstance(value, str):
        return f"the text '{clip(value)}'"
    if isinstance(value, list):
        return "a list"
    return "a section" if isinstance(value, dict) else show_plain(value)


def nearest(word: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' or nothing."""
    if len(word) > MAX_WORD:
        return ""
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean '{lower[close[0]]}'?)" if close else ""


def report(texts: list[str]) -> str:
    """All problems as one text, in the order of the files."""
    lines = sorted(dict.fromkeys(texts), key=_file_and_line)
    if len(lines) == 1:
        return lines[0]
    more = [f"and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
    return "\n  ".join([f"{len(lines)} problems in the configuration:", *lines[:MAX_PROBLEMS], *more])


def _file_and_line(text: str) -> tuple[str, int]:
    place, _, rest = text.partition(":")
    line = rest.partition(":")[0]
    return place, int(line) if line.isdigit() else 0
