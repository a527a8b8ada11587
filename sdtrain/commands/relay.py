"""Starting processes, one after another or some at once, and handing signals on to those at work."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any

from sdtrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE, EXIT_USER_ERROR, ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
OWN_CODES = (EXIT_OK, EXIT_USER_ERROR, EXIT_REQUEUE, EXIT_INTERRUPTED)
LEAVING_SEC = 60.0  # what ranks may take to save when their launcher has left before them


class Relay:
    """Inside `with`, a signal goes to every process at work; after one no other process begins.

    Each process leads a session of its own, so that Ctrl-C reaches it once, through here. Threads may call `run`.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._told: dict[int, int] = {}  # how many of them each group at work has been sent
        self._telling = threading.RLock()  # a handler may come in between, in the same thread
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Relay:
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(
        self, command: Sequence[str], lock: int, env: Mapping[str, str] | None = None, log: IO[bytes] | None = None
    ) -> int:
        """Its exit code, those of sdtrain where a launcher hides them. The process inherits the descriptor `lock`.

        What it says goes to `log`, if there is one. Raises ConfigError for a program that cannot be started.
        """
        if self.seen:
            return self._outcome(-self.seen[-1])
        more: dict[str, Any] = {"stdout": log, "stderr": log} if log else {}
        try:
            process = subprocess.Popen(command, start_new_session=True, pass_fds=(lock,), env=env, **more)
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started ({error.strerror}); see --launcher") from None
        self._told[process.pid] = 0
        self._hand_on()
        code = process.wait()
        self._wait_for_group(process.pid)
        del self._told[process.pid]
        return self._outcome(code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen.append(number)
        self._hand_on()

    def _hand_on(self) -> None:
        with self._telling:
            for group in [*self._told]:
                while (told := self._told.get(group, len(self.seen))) < len(self.seen):
                    self._told[group] = told + 1
                    self._send(group, self.seen[told])

    def _send(self, group: int, number: int) -> bool:
        """Whether there still was somebody to hear it."""
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _wait_for_group(self, group: int) -> None:
        """`accelerate launch` of one process does not wait for it when a signal comes."""
        end = time.monotonic() + (LEAVING_SEC if self.seen else 0)
        while time.monotonic() < end and self._send(group, 0):
            time.sleep(0.05)

    def _outcome(self, code: int) -> int:
        if not self.seen or code in OWN_CODES:
            return code if code >= 0 else 128 - code
        return EXIT_INTERRUPTED if signal.SIGINT in self.seen else EXIT_REQUEUE
