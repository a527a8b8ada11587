"""Starting one process after another, and handing signals on to the one at work."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from sdtrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE, EXIT_USER_ERROR, ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
OWN_CODES = (EXIT_OK, EXIT_USER_ERROR, EXIT_REQUEUE, EXIT_INTERRUPTED)
LEAVING_SEC = 60.0  # what ranks may take to save when their launcher has left before them


class Relay:
    """Inside `with`, a signal goes to the process at work; one that comes between two of them lets none begin.

    Each process leads a session of its own, so that Ctrl-C reaches it once, through here.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._waiting: list[int] = []
        self._group = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Relay:
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], lock: int) -> int:
        """Its exit code, those of sdtrain where a launcher hides them. The process inherits the descriptor `lock`.

        Raises ConfigError for a program that cannot be started.
        """
        if self.seen:
            return self._outcome(-self.seen[-1])
        try:
            process = subprocess.Popen(command, start_new_session=True, pass_fds=(lock,))
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started ({error.strerror}); see --launcher") from None
        self._group = process.pid
        self._hand_on()
        code = process.wait()
        self._wait_for_group()
        self._group = 0
        return self._outcome(code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen.append(number)
        self._waiting.append(number)
        self._hand_on()

    def _hand_on(self) -> None:
        while self._group and self._waiting:
            self._send(self._waiting.pop(0))

    def _send(self, number: int) -> bool:
        """Whether there still was somebody to hear it."""
        try:
            os.killpg(self._group, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _wait_for_group(self) -> None:
        """`accelerate launch` of one process does not wait for it when a signal comes."""
        end = time.monotonic() + (LEAVING_SEC if self.seen else 0)
        while time.monotonic() < end and self._send(0):
            time.sleep(0.05)

    def _outcome(self, code: int) -> int:
        if not self.seen or code in OWN_CODES:
            return code if code >= 0 else 128 - code
        return EXIT_INTERRUPTED if signal.SIGINT in self.seen else EXIT_REQUEUE
