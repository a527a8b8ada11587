"""Stopping on request: a signal to any one rank stops all ranks at the same step.

Ctrl-C while things load ends the process; the first one in training asks for a stop, the second ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from sdtrain.errors import EXIT_INTERRUPTED
from sdtrain.terminal import visible

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE_SEC = 3.0  # what Python may take to leave a library call by itself
EARLY = "Ctrl-C before the first step: this start has trained and saved nothing"
FIRST = (
    "Ctrl-C: stopping after this step, or after the evaluation in progress, with a checkpoint; once more ends at once"
)


class StopRequest:
    """Remembers that a stop signal came; the loop asks at a step boundary and all ranks agree.

    Inside `with`, signals are listened to. A thread hears of Ctrl-C even while the main one is inside a collective,
    where Python's own handlers wait.
    """

    def __init__(self, checkpoints: Path | None = None) -> None:
        self.signal = 0
        self.training = False  # from here on there are steps to stop between
        self._checkpoints = checkpoints
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> StopRequest:
        handlers = {**dict.fromkeys(STOP_SIGNALS, self._note), signal.SIGINT: self._interrupted}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        heard, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)  # set_wakeup_fd wants it so
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(heard,), name="ctrl-c", daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            raise KeyboardInterrupt(EARLY)
        if self.signal != number:
            say(FIRST)
        self.signal = number

    def _watch(self, heard: int) -> None:
        """In a thread: Ctrl-C comes as a byte, from the moment it is pressed."""
        times = 0
        while news := os.read(heard, 64):
            if not (count := news.count(signal.SIGINT)):
                continue
            if not self.training:
                if self._over.wait(PATIENCE_SEC):
                    break
                leave(EARLY)
            times += count
            if times > 1:
                leave(f"ended at once by a second Ctrl-C; {self._kept()}")
        os.close(heard)

    def _kept(self) -> str:
        kept = sorted(path for path in self._checkpoints.glob("img_*")) if self._checkpoints else []
        if not kept:
            return "nothing was kept"
        return f"nothing newer than {kept[-1]} was kept; the same command goes on from there"


def say(sentence: str) -> None:
    """On the first rank alone: a launcher hands the signal to all of them."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"sdtrain: {visible(sentence)}\n".encode())  # not print: a handler may stand inside one


def leave(sentence: str) -> None:
    say(sentence)
    os._exit(EXIT_INTERRUPTED)  # sys.exit would end this thread alone, and the main one may sit in a collective
