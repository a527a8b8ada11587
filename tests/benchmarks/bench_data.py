"""Measures what the data path promises.

    python tests/benchmarks/bench_data.py [--seconds 1] [--rounds 9] [--epochs 10]

    stream     images a second of one worker, against Pillow alone decoding the same bytes to arrays, taken in turns;
               by processor time of the worker (true on a busy machine) and by the clock (needs an idle core)
    index      seconds to load the index of 100,000 samples
    memory     resident memory of trainer and workers after each of ten epochs

Each line ends with the bar and whether it was met; the exit code counts the bars that were not.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sdtrain.data.pack.packing import finish, plan_jobs, run_job
from sdtrain.data.pack.shaping import Shape
from sdtrain.data.pack.sources import list_source
from sdtrain.data.read.dataset import Dataset, open_dataset
from sdtrain.data.read.index import Index, load_index
from sdtrain.data.read.stream import Stream

SIDE = 256
SPEED_BAR = 0.9
INDEX_BAR_SEC = 1.0
GROWTH_BAR_MB = 8.0


def natural(number: int, side: int) -> Image.Image:
    """A smooth image with fine grain: its JPEG has about the size of a photograph's (25 kB at 256 px)."""
    noise = np.random.default_rng(number)
    coarse = Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side), 3)
    grain = noise.integers(-12, 13, (side, side, 3))
    return Image.fromarray((np.asarray(coarse, np.int64) + grain).clip(0, 255).astype(np.uint8))


def make_set(folder: Path, num: int, side: int) -> Dataset:
    source, out = folder / f"source{side}", folder / f"shards{side}"
    source.mkdir()
    for number in range(num):
        natural(number, side).save(source / f"{number:05d}.jpg", quality=90)
    (out / ".pack").mkdir(parents=True)
    shape = Shape(format="keep")
    markers = [run_job(job) for job in plan_jobs(source, out, list_source(source), shape, 4)]
    finish(out, markers, {"resolution": side}, [])
    return open_dataset(out)


def decode_alone(files: list[bytes], seconds: float) -> tuple[float, float]:
    """Images a processor second, and a second, of Pillow here: bytes in memory to arrays and nothing else."""
    start, cpu_start, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        np.asarray(Image.open(io.BytesIO(files[count % len(files)])).convert("RGB"))
        count += 1
    return count / (time.process_time() - cpu_start), count / (time.perf_counter() - start)


def cpu_sec(pid: int) -> float:
    """Processor seconds of a process so far, to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def stream_speed(stream: Stream, seconds: float) -> tuple[float, float]:
    """Images a processor second of the worker, and a second; what was ready beforehand is not counted."""
    worker = stream._pool.workers[0].pid
    for _ in range(stream.prefetch + 1):
        next(stream)
    start, cpu_start, count = time.perf_counter(), cpu_sec(worker), 0
    while time.perf_counter() - start < seconds:
        count += len(next(stream).images)
    return count / (cpu_sec(worker) - cpu_start), count / (time.perf_counter() - start)


def verdict(line: str, good: bool) -> bool:
    print(f"{line}: {'met' if good else 'MISSED'}")
    return good


def bench_speed(folder: Path, seconds: float, rounds: int) -> bool:
    dataset = make_set(folder, 256, SIDE)
    files = [dataset.read(i) for i in range(dataset.num_samples)]
    ratios = []
    options = {"seed": 0, "batch_size": 32, "ghost_batch": 32, "ghosts": [0], "workers": 1, "prefetch": 3}
    with Stream(dataset, **options) as stream:
        for _ in range(rounds):
            before = decode_alone(files, seconds / 2)
            streamed = stream_speed(stream, seconds)
            after = decode_alone(files, seconds / 2)
            ratios.append([2 * s / (b + a) for s, b, a in zip(streamed, before, after, strict=True)])
            clock = f"by the clock {streamed[1]:.0f} img/s"
            print(f"  Pillow {after[0]:.0f} img/cpu-s, worker {streamed[0]:.0f} img/cpu-s, {clock}")
    by_cpu, by_clock = (statistics.median(column) for column in zip(*ratios, strict=True))
    line = f"stream, one worker, {SIDE} px: {by_cpu:.2f} of Pillow alone (bar {SPEED_BAR}); by the clock {by_clock:.2f}"
    return verdict(line, by_cpu >= SPEED_BAR)


def bench_index(folder: Path, num: int = 100_000) -> bool:
    keys = [f"{n:08d}-photograph" for n in range(num)]
    numbers = np.arange(num, dtype=np.int64)
    blob = np.frombuffer("".join(keys).encode(), np.uint8)
    names = np.array([f"shard-{n:06d}.tar" for n in range(100)])
    zeros = np.zeros(num, np.int64)
    index = Index(
        names,
        np.full(100, 1 << 28),
        blob,
        np.cumsum([len(k) for k in keys]),
        (numbers // 1000).astype(np.int32),
        numbers % 1000 * 30_000,
        zeros + 29_000,
        zeros.astype(np.int32),
        zeros,
        zeros,
    )
    index.save(folder / "index.npz")
    start = time.perf_counter()
    assert load_index(folder / "index.npz").key(num - 1) == keys[-1]
    took = time.perf_counter() - start
    return verdict(f"index of {num} samples loads in {took:.3f} s (bar {INDEX_BAR_SEC:g} s)", took < INDEX_BAR_SEC)


def resident_mb(pid: int | str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS line")


def bench_memory(folder: Path, epochs: int) -> bool:
    dataset = make_set(folder, 1024, 128)
    figures = []
    with Stream(
        dataset, seed=0, batch_size=32, ghost_batch=32, ghosts=[0], workers=2, prefetch=3, xflip=True
    ) as stream:
        for _ in range(epochs):
            for _ in range(dataset.num_samples // 32):
                next(stream)
            figures.append(sum(resident_mb(pid) for pid in ("self", *(w.pid for w in stream._pool.workers))))
    print(f"  resident MB after each epoch: {', '.join(f'{f:.1f}' for f in figures)}")
    growth = figures[-1] - figures[1]
    grows = f"grows by {growth:.1f} MB from the second on (bar {GROWTH_BAR_MB:g} MB)"
    line = f"memory over {epochs} epochs of 1024 images {grows}"
    return verdict(line, growth < GROWTH_BAR_MB)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bars = [bench_speed(folder, args.seconds, args.rounds), bench_index(folder), bench_memory(folder, args.epochs)]
    return bars.count(False)


if __name__ == "__main__":
    sys.exit(main())
