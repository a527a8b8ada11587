"""What L_SD costs: LPIPS value and gradient at 64 and 256 px, fp32 and bf16 trunk, and the share of the trunk.

On a CPU processor time is measured, which is the wall time of one thread on a free core.

usage: python tests/benchmarks/bench_lpips.py [--sides 64,256] [--batch 4] [--repeats 3] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sdtrain.losses.perceptual import LPIPS  # noqa: E402


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Fastest of `repeats` runs after one that warms up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - start)
    return min(taken[1:])


def measure(net: LPIPS, side: int, batch: int, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Seconds of the value, of value and gradient, and of the two trunk passes alone."""
    x, y = (torch.rand(batch, 3, side, side, device=device) * 2 - 1 for _ in "xy")
    x.requires_grad_()

    def value() -> None:
        with torch.no_grad():
            net(x, y)

    def loss() -> None:
        x.grad = None
        net(x, y).mean().backward()

    def trunk() -> None:
        with torch.no_grad():
            for image in (x, y):
                list(net._features(image))

    return tuple(seconds(work, repeats, device) for work in (value, loss, trunk))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", default="64,256")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {device}, batch {args.batch}")
    print("side  trunk   value ms/img  value+gradient ms/img  trunk share of value")
    for side in map(int, args.sides.split(",")):
        for dtype in (torch.float32, torch.bfloat16):
            net = LPIPS(trunk_dtype=dtype).to(device)
            value, loss, trunk = measure(net, side, args.batch, args.repeats, device)
            name, each = str(dtype)[6:], 1000 / args.batch
            print(f"{side:4}  {name:9}{value * each:10.1f}{loss * each:18.1f}{trunk / value:22.0%}")


if __name__ == "__main__":
    main()
