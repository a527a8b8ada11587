"""Time and memory of neighbourhood attention: tiles against one mask over all pixels.

    python tests/benchmarks/bench_attention.py [--sizes 32 64 128] [--repeats 3] [--device cpu]

Kernel 7, 4 heads of 32 numbers, batch 1, forward and backward to inputs and bias table, dilations 1 and side / 8. The
full mask has L^2 entries a head (1 GiB of float32 scores a head at 128 px), so it is left out where --full-limit says.
Memory is the growth of the process's peak (CPU, one fresh process a row) or of the allocator's peak (CUDA).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADS, HEAD_DIM, KERNEL = 4, 32, 7


def measure(form: str, size: int, dilation: int, repeats: int, device: str) -> tuple[float, float]:
    """(seconds, MiB) of a forward and backward pass in this process."""
    import torch

    from sdtrain.models.stylenat.attention import BACKENDS

    attend = BACKENDS[form]  # type: ignore[index]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, size, size, HEADS * HEAD_DIM, generator=g).to(device).requires_grad_() for _ in range(3))
    rpb = torch.randn(HEADS, 2 * KERNEL - 1, 2 * KERNEL - 1, generator=g).to(device).requires_grad_()

    def step() -> float:
        start = time.perf_counter()
        attend(q, k, v, rpb, dilation).square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    before = peak_mib(device)
    step()
    seconds = [step() for _ in range(repeats)]
    return statistics.median(seconds), peak_mib(device) - before


def peak_mib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_fresh_process(form: str, size: int, dilation: int, args: argparse.Namespace) -> tuple[float, float]:
    row = ["--row", form, str(size), str(dilation), "--repeats", str(args.repeats), "--device", args.device]
    done = subprocess.run([sys.executable, __file__, *row], capture_output=True, text=True, check=True)
    seconds, mib = map(float, done.stdout.split())
    return seconds, mib


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-limit", type=int, default=64, help="largest side for the full mask")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(*measure(args.row[0], int(args.row[1]), int(args.row[2]), args.repeats, args.device))
        return 0
    print(f"{'side':>5} {'dilation':>8} {'form':>10} {'seconds':>9} {'MiB':>8}")
    for size in args.sizes:
        for dilation in (1, size // 8):
            for form in ("portable", "full_mask") if size <= args.full_limit else ("portable",):
                seconds, mib = in_fresh_process(form, size, dilation, args)
                print(f"{size:>5} {dilation:>8} {form:>10} {seconds:>9.4f} {mib:>8.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
