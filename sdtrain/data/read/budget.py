"""What one input may cost: bytes, items, depth and time, known before anything is decoded or built. Free of numpy.

| input                | budget                                                                                       |
|----------------------|----------------------------------------------------------------------------------------------|
| picture              | its file + pixels * (bytes a pixel as decoded + the larger of: 4 if converted or turned,     |
|                      | what the codec holds beside) <= PictureLimits.megabytes; SCANS passes (JPEG), PAGES;         |
|                      | PictureLimits.seconds of processor time                                                      |
| tar shard            | headers only, one a member: as many as the file has blocks; MAX_NAME_BYTES, MAX_PAX_BYTES,   |
|                      | MAX_MEMBER_BYTES each (tars.py)                                                              |
| index.npz            | INDEX_BYTES; arrays are stored as they are and have exactly the bytes of their member        |
| manifest.json        | MAX_JSON bytes, MAX_ITEMS, Python's depth (files.py)                                         |
| list of names        | LIST_BYTES                                                                                   |
| zip for `pack`       | its table, 46 bytes an entry or more; an entry is unfolded like the file of a picture  |
| .cls label           | 32 bytes; below the number of classes, or of samples where no table says how many there are  |
| brace pattern        | SHARDS                                                                                       |
| download             | the size that a manifest gives, else the budget of its kind; DOWNLOAD_SEC + bytes / SLOWEST; |
|                      | STALL_SEC without a byte                                                                     |
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from dataclasses import dataclass

MB = 1 << 20
SCANS = 100  # a progressive JPEG of any known encoder has about 10
PAGES = 100  # after which pages are no longer counted; two are too many already
INDEX_BYTES = 2048 * MB  # 25 million samples
LIST_BYTES = 1024 * MB
SHARDS = 1_000_000
DOWNLOAD_BYTES = 1 << 38  # a shard of which no manifest says the size
DOWNLOAD_SEC = 120.0
SLOWEST = 50_000  # bytes a second
STALL_SEC = 60.0
TIMER = int(signal.ITIMER_VIRTUAL)


@dataclass(frozen=True)
class PictureLimits:
    """Most pixels, MB of memory and seconds of processor time that one picture may cost."""

    pixels: int = 1 << 26
    megabytes: int = 512
    seconds: float = 20.0

    @property
    def num_bytes(self) -> int:
        return self.megabytes * MB


LIMITS = PictureLimits()


class TooSlow(BaseException):
    """The time of a `within` block is up. No Exception, so that no library takes it for one of its own."""


class within:
    """Raise TooSlow when the block has used so much processor time; a machine under load makes nothing too slow.

    Not nested; microseconds count here. In the main thread a signal tells, and counts what all threads do; in another
    one a thread that watches it. Where the system does not count the time of a thread nothing is limited there.
    """

    _ready = False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watch = None if threading.current_thread() is threading.main_thread() else _Watch(seconds)

    def __enter__(self) -> None:
        if self._watch:
            return self._watch.start()
        if not within._ready:
            signal.signal(signal.SIGVTALRM, _time_is_up)
            within._ready = True
        signal.setitimer(TIMER, self._seconds, 1.0)  # again each second, in case a library has swallowed it

    def __exit__(self, *_: object) -> None:
        if self._watch:
            return self._watch.end()
        signal.setitimer(TIMER, 0)


_starting = threading.Lock()  # until it runs, a new thread has the number of its starter and would be struck for it


class _Watch:
    """Strikes the thread that made it with TooSlow, once it has worked for so long, and again each second."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._thread = seconds, threading.current_thread()
        self._over, self._striking = threading.Event(), threading.Lock()
        self._watcher = threading.Thread(target=self._look, name="watching", daemon=True)

    def start(self) -> None:
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
            self._end = time.clock_gettime(self._clock) + self._seconds
            with _starting:
                self._watcher.start()

    def end(self) -> None:
        """From here on nothing strikes, also what has not arrived yet."""
        with self._striking:
            self._over.set()
            strike(self._thread, None)
        if self._watcher.is_alive():
            self._watcher.join()  # it asks for the clock of a thread that must be there

    def _look(self) -> None:
        left = self._seconds
        while not self._over.wait(max(left, 0.001)):
            try:
                left = self._end - time.clock_gettime(self._clock)
            except OSError:  # the thread was struck by somebody else, and has ended
                return
            with self._striking:
                if left <= 0 and not self._over.is_set():
                    strike(self._thread, TooSlow)
                    left = 1.0


def strike(thread: threading.Thread, error: type[BaseException] | None) -> None:
    """Have another thread raise `error` when it next runs Python; None takes back what has not arrived."""
    number, what = ctypes.c_ulong(thread.ident or 0), None if error is None else ctypes.py_object(error)
    with _starting:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, what)


def _time_is_up(*_: object) -> None:
    raise TooSlow


def available_bytes() -> int:
    """Memory that a process can still get, by Linux's own estimate; elsewhere as much as it likes."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62
