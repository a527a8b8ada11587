"""Stopping on request: a signal to any one rank stops all ranks at the same step.

SIGTERM and SIGUSR1 ask for a stop with a checkpoint; while things load, the process ends when the first step is far
off; a second one, a little later, ends whatever is not a save. Ctrl-C while things load ends the process; the first one
in training asks for a stop, the second ends at once. A time limit that comes near asks for a stop as a signal does.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from sdtrain.engine.positions import positions
from sdtrain.engine.pulse import PULSE
from sdtrain.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from sdtrain.terminal import visible

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OUT_OF_TIME = 1000  # beyond every signal: what `reason` is when the time limit comes near
PATIENCE_SEC = 3.0  # what Python may take to leave a library call by itself
START_SEC = 10.0  # what is left to loading, after a stop signal, to reach the first step
SECOND_SEC = 10.0  # what a second stop signal leaves to the step that runs
ECHO_SEC = 2.0  # a launcher hands on the signal that the scheduler has sent to its ranks too: that is no second one
FIRST_SAVE_SEC = 30.0  # the guess for a save until one was measured
MARGIN_SEC = 10.0
EARLY = "Ctrl-C before the first step: this start has trained and saved nothing"
FIRST = (
    "Ctrl-C: stopping after this step, or after the part of an evaluation in progress, with a checkpoint; "
    "once more ends at once"
)


class StopRequest:
    """Remembers that a stop signal came; the loop asks at a step boundary and all ranks agree.

    Inside `with`, signals are listened to. A thread hears of them even while the main one is inside a collective, where
    Python's own handlers wait.
    """

    def __init__(self, checkpoints: Path | None = None) -> None:
        self.signal = 0
        self.training = False  # from here on there are steps to stop between
        self.checkpoints = checkpoints
        self.ends_at = end_of_time(0.0, 0.0)  # of the clock time.time(): when the machine will be taken away
        self._started = time.time()
        self._saving, self._save_began = False, 0.0
        self._save_sec = FIRST_SAVE_SEC
        self._before: dict[int, Any] = {}
        self._presses, self._told_at = 0, 0.0
        self._leave_at: float | None = None

    def __enter__(self) -> StopRequest:
        handlers = {**dict.fromkeys(STOP_SIGNALS, self._note), signal.SIGINT: self._interrupted}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        heard, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)  # set_wakeup_fd wants it so
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(heard,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *problem: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> int:
        """The signal that came, or OUT_OF_TIME when no more is left than a step and a save take; 0 = go on."""
        if not self.signal and self.ends_at is not None and time.time() + self.reserve_sec() > self.ends_at:
            self.signal = OUT_OF_TIME
        return self.signal

    def reserve_sec(self) -> float:
        """What stopping may take: a step that has just begun, and a save, each slower than any before."""
        return 2 * PULSE.step_sec + 1.5 * self._save_sec + MARGIN_SEC

    def save_begins(self) -> None:
        """Until `save_ends`, which a thread may call, only a second Ctrl-C ends the process."""
        self._save_began, self._saving = time.monotonic(), True

    def save_ends(self) -> None:
        """How long it took is remembered."""
        self._saving = False
        took = time.monotonic() - self._save_began
        self._save_sec = took if self._save_sec == FIRST_SAVE_SEC else max(took, self._save_sec)

    def limit(self, max_time_sec: float) -> None:
        """This process may last `max_time_sec` from its start (0 = as long as its job)."""
        self.ends_at = end_of_time(max_time_sec, self._started)

    def begin_training(self) -> None:
        self.training, self._leave_at = True, None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            raise KeyboardInterrupt(EARLY)
        if self.signal != number:
            say(FIRST)
        self.signal = number

    def _watch(self, heard: int) -> None:
        """In a thread: a signal comes as a byte, from the moment it is sent."""
        while self._wait_for_news(heard):
            pass
        os.close(heard)

    def _wait_for_news(self, heard: int) -> bool:
        left = None if self._leave_at is None else max(self._leave_at - time.monotonic(), 0.0)
        if select.select([heard], [], [], left)[0]:
            news = os.read(heard, 64)
            for number in news:
                (self._pressed if number == signal.SIGINT else self._told)(number)
            return bool(news)
        if self._saving:  # it is worth waiting for
            self._leave_at = time.monotonic() + 1.0
        elif self._leave_at is not None:
            self._give_up()
        return True

    def _pressed(self, number: int) -> None:
        self._presses += self.training
        if self._presses > 1:
            leave(f"ended at once by a second Ctrl-C; {self.kept()}", EXIT_INTERRUPTED)
        if not self.training:
            self._leave_at = time.monotonic() + PATIENCE_SEC

    def _told(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        now = time.monotonic()
        first, self._told_at = not self._told_at, self._told_at or now
        self.signal = self.signal or number
        if not self.training:
            self._leave_at = self._leave_at or now + START_SEC
        elif not first and now - self._told_at > ECHO_SEC:
            self._leave_at = self._leave_at or now + SECOND_SEC

    def _give_up(self) -> None:
        if not self.signal:
            leave(EARLY, EXIT_INTERRUPTED)
        name = name_of(self.signal)
        if self.training:
            leave(f"{name} twice: the step in progress was left; {self.kept()}", EXIT_REQUEUE)
        leave(f"{name} before the first step: this start has trained and saved nothing", EXIT_REQUEUE)

    def kept(self) -> str:
        """What a process that ends now leaves behind, as a sentence."""
        kept = positions(self.checkpoints) if self.checkpoints else []
        if not kept:
            return "nothing was kept"
        return f"nothing newer than {kept[-1]} was kept; the same command goes on from there"


def name_of(reason: int) -> str:
    """SIGTERM, or that time is up."""
    return "the time limit is near" if reason == OUT_OF_TIME else signal.Signals(reason).name


def end_of_time(max_time_sec: float, started: float, env: Mapping[str, str] = os.environ) -> float | None:
    """When this process must have ended, by time.time(): after `max_time_sec` (0 = no limit), or with its Slurm job."""
    limits = [started + max_time_sec] if max_time_sec else []
    slurm = env.get("SLURM_JOB_END_TIME", "")
    return min([*limits, *([float(slurm)] if slurm.isdecimal() else [])], default=None)


def say(sentence: str) -> None:
    """On the first rank alone: a launcher hands the signal to all of them."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"sdtrain: {visible(sentence)}\n".encode())  # not print: a handler may stand inside one


def leave(sentence: str, code: int) -> None:
    say(sentence)
    os._exit(code)  # sys.exit would end this thread alone, and the main one may sit in a collective
