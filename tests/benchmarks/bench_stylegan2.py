"""Time our StyleGAN2 against the same networks written plainly, all variants taking turns in one run.

    python tests/benchmarks/bench_stylegan2.py [--resolution 64] [--batch 4] [--rounds 3] [--threads 1] [--profile]

`naive`      one modulated copy of the weights per sample (grouped convolution); upsampling inserts zeros, filters and
             convolves at full size; downsampling filters at full size and drops pixels
`reference`  the same per-sample weights, but upsampling convolutions as transposed convolutions, as in official code

One unit of work is loss = softplus(-D(G(z))) forward and backward through both networks. The variants share weights and
must agree in their loss; the ratio printed is the median processor time of a variant over that of ours. Freed memory is
kept, as in training.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from sdtrain.engine.heap import keep_freed_memory  # noqa: E402
from sdtrain.models.stylegan2 import layers as stylegan2_layers  # noqa: E402
from sdtrain.models.stylegan2 import networks as stylegan2  # noqa: E402
from sdtrain.models.stylegan2.ops import zero_insert  # noqa: E402
from sdtrain.rng import Draws  # noqa: E402


def plain_fir(x: Tensor, f: Tensor, up: int, down: int, padding: tuple[int, int], gain: float = 1.0) -> Tensor:
    """Zero insertion, padding, depthwise filter at full size, every `down`-th pixel."""
    x = F.pad(zero_insert(x, up, up), padding * 2)
    kernel = (f * gain).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, groups=x.shape[1])[:, :, ::down, ::down]


def plain_upsample2d(x: Tensor, f: Tensor) -> Tensor:
    return plain_fir(x, f, 2, 1, (2, 1), 4.0)


def plain_conv_down(x: Tensor, weight: Tensor, f: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.shape[-1] == 1:
        return F.conv2d(plain_fir(x, f, 1, 2, (1, 1)), weight, bias)
    return F.conv2d(plain_fir(x, f, 1, 1, (2, 2)), weight, bias, stride=2)


def per_sample_weights(weight: Tensor, styles: Tensor, demodulate: bool) -> Tensor:
    w = weight[None] * styles[:, None, :, None, None]
    return w * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt() if demodulate else w


def grouped(x: Tensor, w: Tensor, convolve: Callable[..., Tensor]) -> Tensor:
    """Convolve sample n with w[n]: the batch becomes groups of one large image."""
    n, o = w.shape[:2]
    y = convolve(x.reshape(1, -1, *x.shape[2:]), w.flatten(0, 1).to(x.dtype), n)
    return y.reshape(n, o, *y.shape[2:])


def up_by_zeros(x: Tensor, w: Tensor, f: Tensor, groups: int) -> Tensor:
    return F.conv2d(plain_fir(x, f, 2, 1, (3, 2), 4.0), w.flip(2, 3), groups=groups)


def up_by_transposed(x: Tensor, w: Tensor, f: Tensor, groups: int) -> Tensor:
    w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return plain_fir(F.conv_transpose2d(x, w, stride=2, groups=groups), f, 1, 1, (1, 1), 4.0)


def plain_modulation(up: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def modulated(x, weight, styles, *, f=None, demodulate=True, noise=None, bias=None, gain=1.0):
        w = per_sample_weights(weight, styles, demodulate)
        if f is None:
            x = grouped(x, w, lambda x, w, n: F.conv2d(x, w, padding=1, groups=n))
        else:
            x = grouped(x, w, lambda x, w, n: up(x, w, f, n))
        if noise is not None:
            x = x + noise.to(x.dtype)
        return (x + bias.to(x.dtype)[None, :, None, None]) * gain

    return modulated


def plain_torgb(self, x: Tensor, w: Tensor) -> Tensor:
    weight = per_sample_weights(self.weight, self.affine(w) / sqrt(x.shape[1]), demodulate=False)
    return grouped(x, weight, lambda x, w, n: F.conv2d(x, w, groups=n)) + self.bias.to(x.dtype)[None, :, None, None]


@contextlib.contextmanager
def written_plainly(up: Callable[..., Tensor]) -> Iterator[None]:
    layers = mock.patch.multiple(stylegan2_layers, modulated_conv2d=plain_modulation(up), conv_down=plain_conv_down)
    images = mock.patch.object(stylegan2, "upsample2d", plain_upsample2d)
    with layers, images, mock.patch.object(stylegan2_layers.ToRGB, "forward", plain_torgb):
        yield


VARIANTS = {
    "ours": contextlib.nullcontext,
    "reference": lambda: written_plainly(up_by_transposed),
    "naive": lambda: written_plainly(up_by_zeros),
}


def networks(resolution: int, low: int) -> tuple[stylegan2.Generator, stylegan2.Discriminator]:
    torch.manual_seed(0)
    G = stylegan2.Generator(stylegan2.GeneratorOptions(num_low_precision_res=low), resolution=resolution)
    D = stylegan2.Discriminator(stylegan2.DiscriminatorOptions(num_low_precision_res=low), resolution=resolution)
    return G.eval(), D.eval()


def work(G: stylegan2.Generator, D: stylegan2.Discriminator, batch: int) -> Callable[[], tuple[float, float, float]]:
    """A function that runs one unit of work and returns (loss, forward seconds, backward seconds)."""
    draws = Draws(seed=0, step=0, ghosts=(0,), ghost_batch=batch)
    z = draws.normal("z", G.z_dim)

    def run() -> tuple[float, float, float]:
        G.zero_grad()
        D.zero_grad()
        start = time.process_time()
        loss = F.softplus(-D(G(z, None, draws))).mean()
        middle = time.process_time()
        loss.backward()
        return float(loss.detach()), middle - start, time.process_time() - middle

    return run


def compare(run: Callable[[], tuple[float, float, float]], rounds: int, title: str, tolerance: float) -> None:
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name, variant in VARIANTS.items():
            with variant():
                result = run()
            if turn:  # the first round warms up
                times[name].append(result)
    ours = statistics.median(f + b for _, f, b in times["ours"])
    for name, rows in times.items():
        forward, backward = (statistics.median(row[i] for row in rows) for i in (1, 2))
        total = statistics.median(row[1] + row[2] for row in rows)
        assert abs(rows[0][0] - times["ours"][0][0]) < tolerance, f"{name} computes another loss"
        ratio = f"{total / ours:5.2f} x ours" if name != "ours" else ""
        print(f"{title}  {name:10s} forward {forward:6.2f} s  backward {backward:6.2f} s  sum {total:6.2f} s  {ratio}")


def profile(run: Callable[[], tuple[float, float, float]]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("resolution", 64), ("batch", 4), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true", help="also list where our time goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"{args.resolution} px, batch {args.batch}, {args.threads} thread(s), median of {args.rounds}")
    for title, low, tolerance in (("fp32", 0, 1e-4), ("bf16", 4, 0.1)):
        run = work(*networks(args.resolution, low), args.batch)
        compare(run, args.rounds, title, tolerance)
        if args.profile:
            profile(run)


if __name__ == "__main__":
    main()
