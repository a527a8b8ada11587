"""Where the time of a step goes: seconds a section, without making the device wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sdtrain.engine.pulse import PULSE

HELD = 1024  # events that may wait to be read


class Clock:
    """Seconds of work: wall time with the device waited for; processor time where one thread does it all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alone = device.type == "cpu" and torch.get_num_threads() == 1

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.alone else time.perf_counter()

    @property
    def name(self) -> str:
        return "processor time of one thread" if self.alone else "wall time"

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        start = self()
        result = work()
        return self() - start, result


class Timer:
    """Adds up seconds by section. On CUDA the device's own events are used, and read only when somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = {}
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.began = time.perf_counter()

    @contextmanager
    def section(self, name: str, host: bool = False) -> Iterator[None]:
        """Time a block; `host=True` for work that does not involve the device (waiting for data)."""
        with PULSE.section(name), self._timed(name, host):
            yield

    @contextmanager
    def _timed(self, name: str, host: bool) -> Iterator[None]:
        if self.on_gpu and not host:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            if len(self._events) > HELD:  # nobody reads where nothing is logged
                self._add_up()
            return
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def read(self) -> tuple[float, dict[str, float]]:
        """(seconds since `restart`, seconds by section)."""
        if self._events:
            torch.cuda.synchronize()  # an event that has not happened yet has no time
        self._add_up()
        return time.perf_counter() - self.began, dict(self.seconds)

    def _add_up(self) -> None:
        """The events that have happened; the device is not waited for."""
        while self._events and self._events[0][2].query():
            name, start, end = self._events.popleft()
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(end) / 1000


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory in use so far: of the device, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
