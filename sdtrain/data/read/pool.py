"""Decoding processes behind two calls: `submit` requests to a slot of shared memory, `wait` for their pixels."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from sdtrain.data.read.dataset import Dataset
from sdtrain.data.read.decoder import NUM_COLUMNS, Decoder
from sdtrain.errors import MachineError, ShardChanged

STUCK_SEC = 1800.0
LOOK_UP_SEC = 0.5
Bad = list[tuple[int, str]]


class WorkerError(MachineError):
    """A decoding process died or is stuck: a fault of the machine, worth a retry, not a mistake in the data."""


class Pool:
    """`num_workers` processes that decode into `num_slots` slots of `slot_bytes`; 0 processes decodes in `wait`."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_workers: int,
        num_slots: int,
        slot_bytes: int,
        pad: bool = False,
        stuck_sec: float = STUCK_SEC,
        enough: Callable[[float], bool] = lambda waited_sec: False,
    ) -> None:
        """`wait` gives up after `stuck_sec`, or when `enough`, asked now and then, says so; what it raises goes on."""
        self.slot_bytes, self._stuck_sec, self._enough = slot_bytes, stuck_sec, enough
        self._fd = _anonymous_file(num_slots * slot_bytes)
        self._memory = mmap.mmap(self._fd, num_slots * slot_bytes)
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._setup = {"fd": self._fd, "num_bytes": num_slots * slot_bytes, "shards": list(dataset.shards)}
        self._setup |= {"sha256": list(dataset.sha256), "cache": str(dataset.cache), "pad": pad}
        self._setup |= {"allow_pipe": dataset.allow_pipe, "limits": asdict(dataset.limits)}
        self._setup |= {"sizes": dataset.index.shard_sizes.tolist(), "stamps": dataset.stamps}
        self.decoder = Decoder.of(self._setup)
        self._answers: queue.Queue[tuple[int, bytes]] = queue.Queue()
        self._pending: dict[int, set[int]] = {}  # by ticket: the workers that owe an answer
        self._bad: dict[int, Bad] = {}
        self._here: dict[int, np.ndarray] = {}
        self.workers: list[subprocess.Popen[bytes]] = []
        # Python keeps a dropped Popen and its pipe until the child ends, so a dropped pool must end its children.
        self._ending = weakref.finalize(self, _end, self.workers)
        for number in range(num_workers):
            self.workers.append(self._start(number))

    def slot(self, slot: int) -> np.ndarray:
        """The bytes of a slot, uint8 [slot_bytes]; valid until the slot is submitted again."""
        return self._buffer[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def submit(self, ticket: int, slot: int, requests: np.ndarray) -> None:
        """Start decoding requests [n, NUM_COLUMNS] whose `dest` counts from the start of the slot."""
        requests = requests.copy()
        requests[:, 0] += slot * self.slot_bytes
        self._bad[ticket] = []
        if not self.workers:
            self._here[ticket] = requests
            return
        parts = shared_out(requests, len(self.workers))
        self._pending[ticket] = {number for number, (_, part) in enumerate(parts) if len(part)}
        for number, (first, part) in enumerate(parts):
            if len(part):
                self._send(number, {"ticket": ticket, "first": first, "num": len(part)}, part)

    def wait(self, ticket: int) -> Bad:
        """Return when the pixels are there, with (row, reason) of those that are not.

        Raises WorkerError, and ShardChanged.
        """
        if ticket in self._here:
            self._bad[ticket] = self.decoder.run(self._here.pop(ticket), self._buffer)
        while owing := self._pending.get(ticket):
            self._receive(owing)
        self._pending.pop(ticket, None)
        return sorted(self._bad.pop(ticket))

    def close(self) -> None:
        """End the processes; safe to call twice."""
        self._ending()
        self.decoder.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", "sdtrain.data.read.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._fd],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        threading.Thread(target=_listen, args=(number, process.stdout, self._answers), daemon=True).start()
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._setup).encode() + b"\n")
        process.stdin.flush()
        return process

    def _send(self, number: int, header: dict[str, Any], rows: np.ndarray) -> None:
        stdin = self.workers[number].stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(header).encode() + b"\n")
            stdin.write(np.ascontiguousarray(rows, np.int64).tobytes())
            stdin.flush()
        except BrokenPipeError:
            self._report_death(number)

    def _receive(self, owing: set[int]) -> None:
        number, line = self._next_answer(owing)
        if not line:
            self._report_death(number)
        answer = json.loads(line)
        if changed := answer.get("changed"):
            raise ShardChanged(changed)
        self._pending[answer["ticket"]].discard(number)
        self._bad[answer["ticket"]].extend((answer["first"] + row, reason) for row, reason in answer["bad"])

    def _next_answer(self, owing: set[int]) -> tuple[int, bytes]:
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            if waited > self._stuck_sec or self._enough(waited):
                break
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=min(self._stuck_sec, LOOK_UP_SEC))
        names = ", ".join(f"{number} (pid {self.workers[number].pid})" for number in sorted(owing))
        raise WorkerError(
            f"no decoding process answered for {min(waited, self._stuck_sec):.3g} s; is the storage of the shards "
            f"stuck? The answer of decoding worker {names} is missing"
        )

    def _report_death(self, number: int) -> None:
        code = self.workers[number].wait(timeout=10)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = (
            "the machine may be out of memory; lower data.workers or data.prefetch"
            if code == -9
            else "its own message is above"
        )
        raise WorkerError(f"decoding worker {number} (pid {self.workers[number].pid}) {how}; {hint}")


def shared_out(requests: np.ndarray, num_workers: int) -> list[tuple[int, np.ndarray]]:
    """Requests [n, NUM_COLUMNS] in equal runs: of each worker the number of its first, and its own [m, NUM_COLUMNS]."""
    cuts = np.linspace(0, len(requests), num_workers + 1).astype(int)
    return [(int(a), requests[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for process in workers:
        if process.stdin:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # it is gone already, which is what is wanted
    for process in workers:
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listen(number: int, stdout: IO[bytes], answers: queue.Queue[tuple[int, bytes]]) -> None:
    # Holds no reference to the pool: dropping the pool must end its processes.
    with stdout:
        for line in stdout:
            answers.put((number, line))
    answers.put((number, b""))


def _anonymous_file(num_bytes: int) -> int:
    """Memory to share by descriptor; unlike /dev/shm its size is not limited by a container's mount."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("sdtrain-batches")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, max(num_bytes, 1))
    return fd


def requests_of(dataset: Dataset, indices: np.ndarray, side: int, *, lq: bool = False) -> np.ndarray:
    """Plain requests for whole images [n, NUM_COLUMNS], laid behind one another from byte 0."""
    index = dataset.index
    rows = np.zeros((len(indices), NUM_COLUMNS), np.int64)
    rows[:, 0] = np.arange(len(indices)) * (3 * side * side)
    rows[:, 1] = index.shard[indices]
    rows[:, 2] = (index.lq_offset if lq else index.offset)[indices]
    rows[:, 3] = (index.lq_size if lq else index.size)[indices]
    rows[:, 4] = side
    rows[:, 6:8] = -1
    rows[:, 8] = 1
    return rows
