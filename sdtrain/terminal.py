"""What reaches the terminal: text alone. Names come from files, and a control character in one would steer it."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any


def visible(text: str) -> str:
    """The text with all that is no sign of its own (controls, halves of characters, turns of direction) written out.

    Line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def printable(text: str) -> str:
    """The text on one line: line ends and tabs are written out too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clip(text: str, width: int = 80) -> str:
    """At most `width` characters of a text, which is not so short when they must be written out, on one line."""
    return printable(text if len(text) <= width else f"{text[: width - 3]}...")


class Visible:
    """A stream that is given `visible` text only; a return to the start of the line counts where a text begins."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""  # progress bars
        shown, encoding = start + visible(text[len(start) :]), getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def text_only() -> Iterator[None]:
    """Whatever is printed or logged inside reaches both streams as `visible` text."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Visible, streams)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def show_fault(kind: type[BaseException], fault: BaseException, where: TracebackType | None) -> None:
    """A `sys.excepthook`: what a fault says may have come from a file too."""
    sys.stderr.write(visible("".join(traceback.format_exception(kind, fault, where))))
