"""One writer a run folder.

    RUN/.lock   who holds it: host, pid, since when; empty when nobody does. The lock is on the file, not in it

A lock of the kernel (fcntl, byte ranges), for these reasons: it ends with its process however that dies, so that a
crash leaves nothing stale; servers of NFS keep it for all hosts (version 4 by itself, 3 with lockd) and drop it when a
host is gone, after the lease of about 90 s; child processes do not inherit it, so that no orphaned decoder holds a run.
A file that is merely there, or a pid in it, can do none of this. What the file says is for the message alone.

The main rank holds it. Opening and closing `.lock` a second time in the process that holds it would let it go: nobody
else opens it. Commands that only read a run do not ask.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from sdtrain.engine.ranks import from_main, is_main
from sdtrain.errors import RunError

NAME = ".lock"
HELD = (BlockingIOError, PermissionError)  # what systems answer when another process has it
NOT_YET_SEC = 1.0  # a holder may have the lock and not have written who it is

log = logging.getLogger("sdtrain")


class FolderLock:
    """Hold a run folder inside `with`, on all ranks or on none.

    Raises `RunError` on every rank when another process has it or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self._made = False  # whether the folder is ours alone, and to be taken away when nothing comes of it

    def __enter__(self) -> FolderLock:
        problem = from_main(self._take() if is_main() else None)
        if problem:
            self._close()
            raise RunError(problem)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
        if kind and self._made:
            with contextlib.suppress(OSError):  # gone already
                self._take_away()
        self._close()

    def _take_away(self) -> None:
        if os.listdir(self._folder) == [NAME]:
            (self._folder / NAME).unlink()
            self._folder.rmdir()

    def _take(self) -> str | None:
        """Why it cannot be had, or None."""
        try:
            self._made = self._made or not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{self._folder}: the run folder cannot be written ({error.strerror}); choose another with --out"
        try:
            self._fd = os.open(self._folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            problem = self._lock()
        except OSError as error:
            return f"{self._folder / NAME} cannot be locked ({error.strerror}); choose another run folder with --out"
        if problem or self._is_there():
            return problem
        self._close()
        return self._take()  # the one who held it has taken file and folder away

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._folder / NAME), os.fstat(self._fd))
        except OSError:
            return False

    def _lock(self) -> str | None:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except HELD:
            return self._in_use()
        except OSError as error:  # some network file systems are mounted without locks
            log.warning("%s: no locks here (%s); nothing keeps a second run out", self._folder, error.strerror)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(me).encode(), 0)
        os.fsync(self._fd)
        return None

    def _in_use(self) -> str:
        deadline = time.monotonic() + NOT_YET_SEC
        while (who := self._holder()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return (
            f"{self._folder} is in use by {who or 'another process'}; wait until it has ended or end it, or choose "
            "another run folder with --out"
        )

    def _holder(self) -> str | None:
        try:
            found = json.loads(os.pread(self._fd, 4096, 0))
            return f"process {int(found['pid'])} on {str(found['host'])[:100]!s} since {str(found['since'])[:40]}"
        except (ValueError, KeyError, TypeError):
            return None

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
