"""Evaluation speed: images per second on one and on several ranks, and the cost of the Frechet step.

The bar is 1.8 times the speed on two ranks, where two cores are free. Ranks run one thread each. On a busy machine the
speed-up by processor time (of one rank / of the slowest of several) says what free cores would give.

usage: python tests/benchmarks/bench_metrics.py [--ranks 1,2] [--images 96] [--tap 2048]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def worker(num: int, tap: int, batch: int) -> None:
    """One rank: time the features of generated images only (real statistics and networks are made before)."""
    import torch
    import torch.distributed as dist

    from sdtrain.metrics.evaluate import Evaluator

    dist.init_process_group("gloo")
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)

    class Real:
        num_samples, hash, source, resolution = 8, "none", "none", 64

    judge = Evaluator(Real(), num_fake=num, extractor="random-inception", tap=tap, batch_size=batch)
    judge._calibration = lambda: [image.expand(8, -1, -1, -1)]  # type: ignore[method-assign]
    judge.extractors()
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    judge._collect("bench", range(num), lambda blocks: (image.expand(len(b), -1, -1, -1) for b in blocks))
    wall, busy = time.perf_counter() - start, time.process_time() - cpu
    slowest = torch.tensor([wall, busy])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps({"wall": slowest[0].item(), "cpu": slowest[1].item()}))
    dist.destroy_process_group()


def launch(ranks: int, args: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__]
    words += ["--worker", "--images", str(args.images), "--tap", str(args.tap), "--batch", str(args.batch)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def frechet_seconds(width: int) -> float:
    import torch

    from sdtrain.metrics.fid import fid_of_sums
    from sdtrain.metrics.sums import FeatureSums

    sums = [FeatureSums(width).add(torch.rand(2 * width, width)) for _ in "ab"]
    start = time.perf_counter()
    fid_of_sums(sums[0], sums[1])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--tap", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.images, args.tap, args.batch)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.images} images, tap {args.tap}")
    first = None
    for ranks in map(int, args.ranks.split(",")):
        found = launch(ranks, args)
        first = first or found
        print(
            f"{ranks} ranks: {args.images / found['wall']:.2f} images/s, {first['wall'] / found['wall']:.2f} times the "
            f"first by the clock, {first['cpu'] / found['cpu']:.2f} by processor time ({found['cpu']:.1f} s a rank)"
        )
    print(f"Frechet step of {args.tap} features: {frechet_seconds(args.tap):.2f} s")


if __name__ == "__main__":
    main()
