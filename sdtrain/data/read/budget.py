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

import signal
import threading
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

    Signals reach the main thread alone: in any other one nothing is limited. Not nested; microseconds count here.
    """

    _ready = False

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds if threading.current_thread() is threading.main_thread() else 0.0

    def __enter__(self) -> None:
        if self._seconds:
            if not within._ready:
                signal.signal(signal.SIGVTALRM, _time_is_up)
                within._ready = True
            signal.setitimer(TIMER, self._seconds, 1.0)  # again each second, in case a library has swallowed it

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            signal.setitimer(TIMER, 0)


def _time_is_up(*_: object) -> None:
    raise TooSlow


def available_bytes() -> int:
    """Memory that a process can still get, by Linux's own estimate; elsewhere as much as it likes."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62
