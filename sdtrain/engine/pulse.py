"""How far this process has come, for whoever watches it: what its main thread does, and since when.

Marking costs a microsecond; nothing here waits for a device or another rank. Torch is not imported.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

LONG = ("start", "evaluate", "pictures", "snapshot", "save")  # may be silent this much longer than anything else
LONGER = 10


class Mark(NamedTuple):
    """What a process last said of itself."""

    step: int = 0
    section: str = "start"
    beats: int = 0
    waiting: str = ""
    """The collective it is inside of."""
    settled: bool = False
    """The first step, which may compile, tune and load, is done."""
    slowest_sec: float = 0.0
    """The longest it has been silent in an ordinary section."""

    def limit_sec(self, timeout_sec: float, slow: Collection[str] = LONG) -> float:
        """How long it may be silent: longer in what is slow, and never less than what it has needed before."""
        long = self.section in slow or not self.settled
        return max(timeout_sec * (LONGER if long else 1), 2 * self.slowest_sec)


class Pulse:
    """Of one process; `PULSE` is the one there is."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A run begins."""
        self.mark, self.since = Mark(), time.monotonic()
        self.step_sec = 0.0  # the longest but for the first

    def beat(self, section: str | None = None, waiting: str = "") -> None:
        """The main thread has come one further; into another section where one is named."""
        now, mark = time.monotonic(), self.mark
        silent, self.since = now - self.since, now
        slowest = mark.slowest_sec if mark.section in ("data", *LONG) else max(silent, mark.slowest_sec)
        self.mark = mark._replace(
            section=section or mark.section, beats=mark.beats + 1, waiting=waiting, slowest_sec=slowest
        )

    def before_first(self, step: int) -> None:
        """The next step is the first of its kind."""
        self.beat("start")
        self.mark = self.mark._replace(step=step, settled=False)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Inside, the main thread takes a step; afterwards it has taken `number` + 1."""
        began = time.monotonic()
        self.beat("step")
        yield
        self.beat("loop")
        if self.mark.settled:
            self.step_sec = max(self.step_sec, time.monotonic() - began)
        self.mark = self.mark._replace(step=number + 1, settled=True)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Inside, the main thread is busy with `name`."""
        outer = self.mark.section
        self.beat(name)
        try:
            yield
        except BaseException as error:
            error.__dict__.setdefault("section", name)  # the innermost that it has left
            raise
        finally:
            self.beat(outer)


PULSE = Pulse()
