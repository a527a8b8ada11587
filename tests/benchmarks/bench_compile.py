"""What `compile: frozen` gains: processor time of one thread, plain and compiled calls interleaved, and how far apart.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_compile.py [--rounds 7] [--device cpu]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.engine.compiled import compile_parts, parts_of
from sdtrain.engine.ema import freeze
from sdtrain.losses.feature import VGGFeatures
from sdtrain.losses.perceptual import LPIPS
from sdtrain.models.projected.networks import FeatureNetwork
from sdtrain.models.projected.options import DiscriminatorOptions
from sdtrain.models.rrdbnet import networks as rrdbnet
from sdtrain.models.stylegan2 import networks as stylegan2
from sdtrain.rng import Draws

Call = Callable[[nn.Module], list[Tensor]]


def slopes(call: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """What a distance costs a generator: forward, and the slope to its images [N, 3, H, W]."""
    x = x.clone().requires_grad_(True)
    found = call(x)
    parts = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else [found]
    total = torch.stack([part.float().square().mean() for part in parts]).sum()
    return [*parts, *torch.autograd.grad(total, x)]


@torch.no_grad()
def images(net: nn.Module, *args: Any) -> list[Tensor]:
    return [net(*args)]


def cases(device: str) -> dict[str, tuple[nn.Module, Call]]:
    torch.manual_seed(0)
    x, y, lq = (torch.rand(4, 3, side, side, device=device) * 2 - 1 for side in (64, 64, 32))
    z = torch.randn(4, 512, device=device)
    draws = Draws(seed=0, step=0, ghosts=(0,), ghost_batch=4, device=device)
    width = stylegan2.GeneratorOptions(channel_base=4096)
    return {
        "LPIPS (VGG) with slope, 64 px": (LPIPS(None), lambda net: slopes(lambda x: net(x, y), x)),
        "VGG19 features with slope, 64 px": (VGGFeatures(["conv5_4"]), lambda net: slopes(net, x)),
        "features of projected D with slope, 64 px": (
            FeatureNetwork(DiscriminatorOptions(), 64, None),
            lambda net: slopes(net, x),
        ),
        "StyleGAN2 average, 64 px": (
            stylegan2.Generator(width, resolution=64),
            lambda net: images(net, z, None, draws),
        ),
        "RRDBNet average (4 blocks), 32 px": (
            rrdbnet.Generator(rrdbnet.GeneratorOptions(num_block=4)),
            lambda net: images(net, lq),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    for name, (net, call) in cases(args.device).items():
        plain = freeze(net.to(args.device))
        compiled = copy.deepcopy(plain)
        compile_parts(dict(parts_of("net", compiled)))
        began = clock()
        pairs = list(zip(call(plain), call(compiled), strict=True))
        first = clock() - began
        seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
        for _ in range(args.rounds):
            for kind, one in (("plain", plain), ("compiled", compiled)):
                began = clock()
                call(one)
                if args.device != "cpu":
                    torch.cuda.synchronize()
                seconds[kind].append(clock() - began)
        best = {kind: min(values) for kind, values in seconds.items()}
        ratio = best["compiled"] / best["plain"]
        apart = [float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in pairs]
        times = f"{best['plain'] * 1e3:8.1f} ms plain, x {ratio:.2f} compiled, first call {first:.0f} s"
        print(f"{name:<45} {times}, apart {', '.join(f'{value:.0e}' for value in apart)}")


if __name__ == "__main__":
    main()
