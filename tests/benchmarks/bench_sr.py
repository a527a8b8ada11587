"""What narrow super-resolution students cost: time beside the teacher, memory of the feature-map loss.

    python tests/benchmarks/bench_sr.py speed [--passes 5] [--size 64]
    python tests/benchmarks/bench_sr.py memory [--sizes 256 512] [--widths 1/2 1/8]

Speed: one CPU thread, the networks take turns within every pass, so that a busy machine slows all alike; medians.
Memory: peak resident memory of a fresh process that runs one GCFSR student step, with and without L_MLP on the last map
(bar: below 2), then the bytes that autograd keeps at 1024 px, counted on the meta device where nothing is allocated.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from sdtrain.losses.feature import FeatureMLP, mlp_loss  # noqa: E402
from sdtrain.models.gcfsr import networks as gcfsr  # noqa: E402
from sdtrain.models.gcfsr import options as gcfsr_options  # noqa: E402
from sdtrain.models.rrdbnet import networks as rrdbnet  # noqa: E402
from sdtrain.models.rrdbnet import options as rrdbnet_options  # noqa: E402

MB = 1 << 20
TILES = 16
WIDTHS = [("1", "scaled"), ("1/2", "scaled"), ("1/4", "scaled"), ("1/8", "scaled"), ("1/4", "fixed")]
WAYS = ("forward", "whole", "tiled")


@torch.inference_mode()
def speed(size: int, passes: int) -> None:
    torch.set_num_threads(1)
    x = torch.rand(1, 3, size, size)
    nets = {w: rrdbnet.Generator(rrdbnet_options.scaled(rrdbnet.GeneratorOptions(), *w)).eval() for w in WIDTHS}
    times: dict[tuple[str, str], list[float]] = {w: [] for w in nets}
    for turn in range(passes + 1):
        for width, net in nets.items():
            start = time.perf_counter()
            net(x)
            if turn:  # the first pass warms up
                times[width].append(time.perf_counter() - start)
    full = statistics.median(times["1", "scaled"])
    for (C, growth), seconds in times.items():
        median = statistics.median(seconds)
        print(f"RRDBNet C={C:4s} growth {growth:7s} {median:.3f} s  x{full / median:.2f}")


def student_step(size: int, C: str, way: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """One student forward, and L_MLP against a teacher's map unless `way` is forward: (image mean, loss)."""
    teacher, student = gcfsr.GeneratorOptions(), gcfsr_options.scaled(gcfsr.GeneratorOptions(), C)
    with torch.device(device):
        net = gcfsr.Generator(student, resolution=size)
        image, maps = net(torch.rand(1, 3, size, size), 16.0, layers=("last_style_conv",))
        if way == "forward":
            return image.mean(), image.new_zeros(())
        widths = gcfsr.channels(student, size)[size], gcfsr.channels(teacher, size)[size]
        mlp, f_t = FeatureMLP(*widths), torch.rand(1, widths[1], size, size)
        return image.mean(), mlp_loss(mlp, maps["last_style_conv"], f_t, tiles=TILES if way == "tiled" else 1)


def peak(size: int, C: str, way: str) -> None:
    """Print the peak resident memory above that of the imports, in MB (run in a process of its own)."""
    torch.set_num_threads(1)
    sum(student_step(32, C, way)).backward()  # first use imports and allocates what is no part of the question
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image, loss = student_step(size, C, way)
    (image + loss).backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measured(size: int, C: str, way: str) -> float:
    # large blocks go back to the system when freed, so that the peak is what was alive at once
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [sys.executable, __file__, "peak", str(size), C, way]
    return float(subprocess.run(words, env=env, check=True, capture_output=True, text=True).stdout)


def counted(size: int, C: str, way: str) -> float:
    """MB that autograd keeps for the backward pass, each storage once."""
    storages: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        storages.setdefault(t.untyped_storage()._cdata, t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        student_step(size, C, way, "meta")
    return sum(t.untyped_storage().nbytes() for t in storages.values()) / MB


def memory(sizes: list[int], widths: list[str]) -> None:
    for C in widths:
        for size in sizes:
            _row(f"GCFSR C={C} {size:4d} px, peak MB", [measured(size, C, way) for way in WAYS])
        for size in (*sizes, 1024):
            _row(f"GCFSR C={C} {size:4d} px, kept MB", [counted(size, C, way) for way in WAYS])


def _row(what: str, megabytes: list[float]) -> None:
    step, whole, tiled = megabytes
    ratios = f"x{whole / step:.2f} with L_MLP, x{tiled / step:.2f} with it in {TILES} tiles"
    print(f"{what}: step {step:.0f}, {whole:.0f}, {tiled:.0f}: {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "peak"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--widths", nargs="+", default=["1/2", "1/8"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.size, args.passes)
    elif args.what == "memory":
        memory(args.sizes, args.widths)
    else:
        peak(int(args.rest[0]), args.rest[1], args.rest[2])


if __name__ == "__main__":
    main()
