"""Measures what torch's DataLoader would do in the place of `sdtrain/data/read/pool.py`.

python tests/benchmarks/bench_loader.py [--rounds 15]

order      whether it gives the same batches, from the middle of the order, with bad samples
start      seconds to the first batch, private memory of a worker
speed      processor seconds of worker and trainer an image, against ours, in turns
faults     a worker killed, one stopped, a trainer killed, little /dev/shm (root alone)
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import SIDE, cpu_sec, make_set  # beside this file
from torch.utils.data import DataLoader

from sdtrain.data.read.dataset import Dataset, open_dataset
from sdtrain.data.read.decoder import Decoder
from sdtrain.data.read.order import order, substitute
from sdtrain.data.read.pool import requests_of
from sdtrain.data.read.reader import planes_of
from sdtrain.data.read.stream import Stream

BATCH, PREFETCH = 32, 3
WAYS = {"fork": {}, "spawn": {"context": "spawn"}, "fork, planes there": {"planes": True}}


class Steps:
    """Positions of each step from `start` on, for ever: a batch sampler."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[range]:
        return (range(step * BATCH, (step + 1) * BATCH) for step in itertools.count(self.start))


class Samples(torch.utils.data.Dataset):
    """Position -> sample, a whole step at once; `planes` are separated by the worker, else by the trainer."""

    def __init__(self, dataset: Dataset, planes: bool) -> None:
        self.dataset, self.planes, self.decoder = dataset, planes, None

    def __getitems__(self, positions: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        d = self.dataset
        setup = {name: getattr(d, name) for name in ("shards", "sha256", "cache", "allow_pipe", "stamps")}
        setup |= {"pad": False, "sizes": d.index.shard_sizes, "limits": asdict(d.limits)}
        self.decoder = self.decoder or Decoder.of(setup)
        indices = order(0, np.asarray(positions), d.num_samples)
        pixels = torch.empty(len(indices) * 3 * SIDE * SIDE, dtype=torch.uint8)
        for row, _ in self.decoder.run(requests_of(d, indices, SIDE), pixels.numpy()):
            place = pixels.numpy()[row * 3 * SIDE * SIDE :]
            for attempt in range(64):
                indices[row] = substitute(0, positions[row], attempt, d.num_samples)
                if not self.decoder.run(requests_of(d, indices[row : row + 1], SIDE), place):
                    break
        return planes_of(pixels.numpy(), len(indices), SIDE) if self.planes else pixels, indices.tolist()


def leave_stops_to_the_trainer(worker: int) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    return batch


def loader(
    dataset: Dataset, workers: int, start: int = 0, context: str = "fork", planes: bool = False, timeout: float = 120
) -> Any:
    """An iterator of the DataLoader over (pixels, indices)."""
    how = {"worker_init_fn": leave_stops_to_the_trainer, "collate_fn": as_it_is, "persistent_workers": True}
    how |= {"multiprocessing_context": context, "prefetch_factor": max(1, PREFETCH // workers), "timeout": timeout}
    batches: Any = Steps(start)
    return iter(DataLoader(Samples(dataset, planes), batch_sampler=batches, num_workers=workers, **how))


def stream(dataset: Dataset, workers: int, start: int = 0) -> Stream:
    options = {"batch_size": BATCH, "ghost_batch": BATCH, "ghosts": [0], "prefetch": PREFETCH, "max_bad": 0.9}
    return Stream(dataset, seed=0, workers=workers, start_step=start, **options)


def private_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def same_batches(dataset: Dataset) -> bool:
    """Whether both give the same samples from the sixth step on."""
    theirs = loader(dataset, 2, start=5)
    with stream(dataset, 2, start=5) as ours:
        return all(next(ours).indices.tolist() == next(theirs)[1] for _ in range(8))


def starts(dataset: Dataset, workers: int) -> None:
    for name in ("ours", "fork", "forkserver", "spawn"):
        begun = time.perf_counter()
        batches = stream(dataset, workers) if name == "ours" else loader(dataset, workers, context=name)
        next(batches)
        took = time.perf_counter() - begun
        first = (batches._pool.workers if name == "ours" else batches._workers)[0]
        print(f"  {name}, {workers} workers: first batch after {took:.2f} s, worker {private_mb(first.pid):.0f} MB")
        batches.close() if name == "ours" else batches._shutdown_workers()


def took(step: Callable[[], torch.Tensor], worker: int) -> tuple[float, float]:
    """Processor microseconds an image: of the worker, and of worker and trainer."""
    for _ in range(PREFETCH + 1):
        step()
    begun, own, count = cpu_sec(worker), time.process_time(), 0
    for _ in range(20):
        images = step()
        images.reshape(-1)[::4096].sum()  # each page is met
        count += BATCH
    theirs = cpu_sec(worker) - begun
    return theirs / count * 1e6, (theirs + time.process_time() - own) / count * 1e6


def speeds(dataset: Dataset, rounds: int) -> None:
    own = stream(dataset, 1)
    steps_of: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
        "ours": (lambda: next(own).images, own._pool.workers[0].pid)
    }
    for name, how in WAYS.items():
        it = loader(dataset, 1, **how)  # type: ignore[arg-type]
        split = as_it_is if "planes" in how else lambda pixels: planes_of(pixels.numpy(), BATCH, SIDE)
        steps_of[name] = (lambda it=it, split=split: split(next(it)[0])), it._workers[0].pid
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps_of}
    for _ in range(rounds):
        for name, step in steps_of.items():
            found[name].append(took(*step))
    for name, rows in found.items():
        worker, both = (
            statistics.median(row[i] / ours[i] for row, ours in zip(rows, found["ours"], strict=True)) for i in (0, 1)
        )
        least = min(row[0] for row in rows)
        print(f"  {name}: worker {least:.0f} us an image, {worker:.2f} of ours; with the trainer {both:.2f}")


def killed_in_a_step(dataset: Dataset) -> str:
    it = loader(dataset, 2)
    next(it)
    try:
        os.kill(it._workers[1].pid, signal.SIGKILL)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            torch.ones(100).sum()
    except RuntimeError as error:
        return f"raises where the trainer is: {error}"
    return "is not noticed in a step"


def stopped(dataset: Dataset) -> str:
    it = loader(dataset, 2, timeout=3)
    next(it)
    worker = it._workers[1]
    os.kill(worker.pid, signal.SIGSTOP)
    said = ""
    try:
        for _ in range(10):
            next(it)
    except RuntimeError as error:
        said = str(error)
    begun = time.monotonic()
    it._shutdown_workers()
    left = f"closed after {time.monotonic() - begun:.1f} s, the process is {'left' if worker.is_alive() else 'gone'}"
    worker.kill()
    return f"'{said}'; {left}"


def little_memory(dataset: Dataset, ours: bool) -> str:
    here = f"sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}"
    make = f"bench_loader.{'stream' if ours else 'loader'}(open_dataset({str(dataset.source)!r}), 2)"
    code = f"import sys; {here}; import bench_loader; from bench_loader import open_dataset\nit = {make}\n"
    code += "for _ in range(8): next(it)\n"
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$0" "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, sys.executable, "-c", code]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            code_found: object = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            return "nothing came within 60 s"
        log.seek(0)
        return f"ended with {code_found}: {(log.read().splitlines() or ['8 batches'])[-1][:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        dataset = make_set(Path(name), 256, SIDE)
        for workers in (1, 4):
            starts(dataset, workers)
        speeds(dataset, rounds)
        print(f"  a killed worker: {killed_in_a_step(dataset)}")
        print(f"  a stopped worker: {stopped(dataset)}")
        for ours in (True, False):
            print(f"  8 MB of /dev/shm, {'ours' if ours else 'DataLoader'}: {little_memory(dataset, ours)}")
        os.truncate(dataset.shards[1], 5000)
        print(f"  same samples, with a shard cut short: {same_batches(open_dataset(dataset.source))}")


if __name__ == "__main__":
    main()
