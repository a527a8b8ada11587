"""Degradation throughput on the CPU: batched functions against the plain way, one image after the other.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_degrade.py [--batch 8] [--size 256] [--rounds 15] [--profile]

The plain way does the same operations as they are usually written: direct convolutions, an 8 x 8 x 8 x 8 tensor
product a JPEG plane, both noises and a blend. Both sides get the same decisions; before timing, their results are
compared with the noise switched off. Runs are interleaved, wall time, one torch thread.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import pstats
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from sdtrain.data.degrade.chain import Decisions, Degradation, Order, apply_chain, decide  # noqa: E402
from sdtrain.data.degrade.jpeg import CHROMINANCE, LUMINANCE, TO_RGB, TO_YCBCR  # noqa: E402
from sdtrain.data.degrade.kernels import sharpen, usm_kernel  # noqa: E402
from sdtrain.data.degrade.noise import Noise  # noqa: E402
from sdtrain.data.degrade.options import DegradationOptions  # noqa: E402
from sdtrain.rng import Draws  # noqa: E402

BAR = 3.0
LEVELS = 255.0


def plain_filter(x: Tensor, kernel: Tensor) -> Tensor:
    radius = kernel.shape[-1] // 2
    weight = kernel.to(x).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(x, (radius,) * 4, mode="reflect"), weight, groups=3)


def plain_sharpen(x: Tensor) -> Tensor:
    kernel = usm_kernel(x.device)[0]
    residual = x - plain_filter(x, kernel)
    soft = plain_filter((residual.abs() * LEVELS > 10).float(), kernel)
    return soft * (x + 0.5 * residual).clamp(0, 1) + (1 - soft) * x


def cosines() -> Tensor:
    n = torch.arange(8.0)
    basis = torch.cos((2 * n.view(8, 1) + 1) * n * math.pi / 16) / 2
    basis[:, 0] /= math.sqrt(2)
    return torch.einsum("xu,yv->xyuv", basis, basis)


COSINES = cosines()


def plain_plane(plane: Tensor, table: Tensor) -> Tensor:
    height, width = plane.shape
    blocks = plane.view(height // 8, 8, width // 8, 8).permute(0, 2, 1, 3)
    coefficients = torch.tensordot(blocks, COSINES, dims=2)
    coefficients = torch.round(coefficients / table) * table
    blocks = torch.tensordot(coefficients, COSINES.permute(2, 3, 0, 1), dims=2)
    return blocks.permute(0, 2, 1, 3).reshape(height, width)


def plain_jpeg(x: Tensor, quality: float) -> Tensor:
    height, width = x.shape[-2:]
    factor = 50 / quality if quality < 50 else 2 - quality / 50
    padded = F.pad(x, (0, -width % 16, 0, -height % 16))[0] * LEVELS
    y, cb, cr = torch.tensordot(torch.tensor(TO_YCBCR), padded, dims=1)
    table = F.pad(torch.tensor(CHROMINANCE), (0, 4, 0, 4), value=99) * factor
    y = plain_plane(y - 128, torch.tensor(LUMINANCE).t() * factor) + 128
    chroma = [plain_plane(F.avg_pool2d(c[None], 2)[0], table) for c in (cb, cr)]
    chroma = [c.repeat_interleave(2, 0).repeat_interleave(2, 1) for c in chroma]
    rgb = torch.tensordot(torch.tensor(TO_RGB), torch.stack([y, *chroma]), dims=1)
    return (rgb.clamp(0, LEVELS) / LEVELS)[None, :, :height, :width]


def plain_shot(x: Tensor) -> Tensor:
    x = (x * LEVELS).round().clamp(0, LEVELS) / LEVELS
    count = 2 ** math.ceil(math.log2(len(torch.unique(x))))
    return torch.poisson(x * count) / count - x


def plain_noise(x: Tensor, noise: Noise, row: int) -> Tensor:
    gray = float(noise.gray[row])
    if noise.kind == "gaussian":
        colour_map, gray_map = torch.randn(x.shape) / LEVELS, torch.randn(x.shape[-2:]) / LEVELS
    else:
        luma = 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
        colour_map, gray_map = plain_shot(x), plain_shot(luma) if gray else torch.zeros(())
    return (x + (colour_map * (1 - gray) + gray_map * gray) * noise.level[row]).clamp(0, 1)


def plain_chain(x: Tensor, d: Decisions, row: int, scale: int) -> Tensor:
    first, second = d.first, d.second
    lq_size = (x.shape[-2] // scale, x.shape[-1] // scale)
    x = plain_filter(x, first.kernel[row])
    x = F.interpolate(x, scale_factor=first.scale, mode=first.mode)
    x = plain_jpeg(plain_noise(x, first.noise, row), first.quality[row].item())
    if second.kernel is not None:
        x = plain_filter(x, second.kernel[row])
    x = F.interpolate(x, size=[int(side * second.scale) for side in lq_size], mode=second.mode)
    x = plain_noise(x, second.noise, row)
    if not d.jpeg_last:
        x = plain_jpeg(x, second.quality[row].item())
    x = plain_filter(F.interpolate(x, size=lq_size, mode=d.final_mode), d.sinc[row])
    if d.jpeg_last:
        x = plain_jpeg(x.clamp(0, 1), second.quality[row].item())
    return (x * LEVELS).round().clamp(0, LEVELS) / LEVELS


def plain(hq: Tensor, draws: Draws, options: DegradationOptions) -> Tensor:
    decisions = decide(options, draws)
    sources = (plain_sharpen(x) if options.sharpen else x for x in hq.split(1))
    return torch.cat([plain_chain(x, decisions, row, 4) for row, x in enumerate(sources)])


def silent(order: Order) -> Order:
    return replace(order, noise=replace(order.noise, level=torch.zeros_like(order.noise.level)))


def disagreement(hq: Tensor, draws: Draws) -> float:
    """The share of 8-bit values on which the two ways differ without noise."""
    d = decide(DegradationOptions(), draws)
    d = replace(d, first=silent(d.first), second=silent(d.second))
    ours = apply_chain(sharpen(hq), d)
    theirs = torch.cat([plain_chain(plain_sharpen(x), d, row, 4) for row, x in enumerate(hq.split(1))])
    return (ours != theirs).float().mean().item()


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def compare(hq: Tensor, options: DegradationOptions, rounds: int) -> dict[str, float]:
    """Seconds in all by way, interleaved; the first round warms up."""
    ghost, sample = (Degradation(replace(options, decisions=who)) for who in ("ghost", "sample"))
    total = dict.fromkeys(("batched", "per-sample decisions", "plain"), 0.0)
    for step in range(rounds + 1):
        draws = Draws(seed=0, step=step, ghosts=(0,), ghost_batch=len(hq))
        spent = (timed(ghost, hq, draws), timed(sample, hq, draws), timed(plain, hq, draws, options))
        if step:
            total = {way: total[way] + seconds for way, seconds in zip(total, spent, strict=True)}
    return total


def profile(hq: Tensor, rounds: int) -> None:
    degradation = Degradation()
    profiler = cProfile.Profile()
    profiler.enable()
    for step in range(rounds):
        degradation(hq, Draws(seed=0, step=step, ghosts=(0,), ghost_batch=len(hq)))
    profiler.disable()
    pstats.Stats(profiler).sort_stats("cumtime").print_stats("degrade|poisson|interpolate|randn|matmul_exact")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("--batch", 8), ("--size", 256), ("--rounds", 15)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--profile", action="store_true", help="show where the batched way spends its time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    coarse = torch.rand(args.batch, 3, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(0))
    hq = F.interpolate(coarse, size=args.size, mode="bicubic").clamp(0, 1)
    if args.profile:
        profile(hq, args.rounds)
        return 0
    check = disagreement(hq, Draws(seed=1, step=0, ghosts=(0,), ghost_batch=args.batch))
    print(f"same results: {check:.4%} of values differ")
    ratios = []
    for sharpens in (True, False):
        total = compare(hq, DegradationOptions(sharpen=sharpens), args.rounds)
        words = "with" if sharpens else "without"
        print(f"batch {args.batch} at {args.size} px, {words} sharpening, {args.rounds} rounds")
        for way, seconds in total.items():
            print(f"  {way:22s} {args.batch * args.rounds / seconds:8.1f} samples/s")
        ratios.append(total["plain"] / total["batched"])
        print(f"  batched / plain        {ratios[-1]:8.2f}")
    return 0 if ratios[0] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
