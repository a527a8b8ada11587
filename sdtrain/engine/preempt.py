"""Stopping on request: a signal to any one rank stops all ranks at the same step."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a stop signal came; the loop asks at a step boundary and all ranks agree."""

    def __init__(self) -> None:
        self.signal = 0

    def listen(self) -> StopRequest:
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
