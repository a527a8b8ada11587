"""The second-order degradation of Real-ESRGAN on the training device: high-quality images in, low-quality images out.

`decide` looks every decision up from (seed, step, ghost); `apply_chain` is a pure function of images and decisions.
What the official code decides once for a batch is decided once for a ghost, and ghosts are worked on one at a time:
so the result does not depend on how many of them a rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.data.degrade.check import check_image, check_options
from sdtrain.data.degrade.exact import exact_math
from sdtrain.data.degrade.jpeg import jpeg
from sdtrain.data.degrade.kernels import filter2d, gaussian_kernels, identity_kernel, sharpen, sinc_kernels
from sdtrain.data.degrade.noise import DrawnSource, Noise, add_noise, eight_bit
from sdtrain.data.degrade.options import DegradationOptions
from sdtrain.data.degrade.resize_matlab import imresize
from sdtrain.errors import ConfigError
from sdtrain.rng import Draws

MODES = ("area", "bilinear", "bicubic")
SMALL_KERNEL = 13  # below it the cutoff of a first- or second-order sinc starts at pi/3, from it on at pi/5


@dataclass(frozen=True, kw_only=True)
class Order:
    """One round of blur, resize, noise and JPEG for B images."""

    kernel: Tensor | None
    """[B, K, K]; None = no blur."""
    scale: float
    mode: str
    noise: Noise
    quality: Tensor
    """JPEG quality [B] in (0, 100)."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """All that is random about the degradation of B images."""

    first: Order
    second: Order
    sinc: Tensor
    """The last filter [B, K, K]."""
    final_mode: str
    jpeg_last: bool
    """Resize and sinc come before the second JPEG (else after it)."""


def between(u: Tensor, limits: Sequence[float]) -> Tensor:
    """Map uniform numbers of any shape in [0, 1) to a range [low, high)."""
    low, high = limits
    return low + (high - low) * u


def choose(u: float, weights: Sequence[float]) -> int:
    """The index whose share of the summed weights holds u in [0, 1)."""
    edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return min(int(torch.searchsorted(edges, u * edges[-1].item(), right=True)), len(weights) - 1)


def draw_sizes(draws: Draws, limits: tuple[int, int]) -> Tensor:
    """Odd kernel sizes [B] between the limits."""
    low, high = limits
    return low + 2 * draws.integers("size", 0, (high - low) // 2 + 1)


def draw_beta(draws: Draws, limits: Sequence[float]) -> Tensor:
    """Exponents [B]: half of them lie in [low, 1], half in [1, high]."""
    u, below = draws.uniform("value"), draws.uniform("half") < 0.5
    return torch.where(below, between(u, (limits[0], 1.0)), between(u, (1.0, limits[1])))


def draw_gaussian_kernels(o: DegradationOptions, draws: Draws, size: Tensor, sigma: Sequence[float]) -> Tensor:
    """[B, K, K] of the six Gaussian kinds (section 3.1 of the paper)."""
    kind = torch.tensor([choose(u, o.kind_prob) for u in draws.uniform("kind").tolist()])
    generalized = draw_beta(draws.sub("generalized"), o.beta_generalized)
    plateau = draw_beta(draws.sub("plateau"), o.beta_plateau)
    sigma_x, sigma_y = (between(draws.uniform(axis).double(), sigma) for axis in ("sigma_x", "sigma_y"))
    theta = between(draws.uniform("theta").double(), (-math.pi, math.pi))
    beta = torch.where(kind >= 4, plateau, generalized).double()
    return gaussian_kernels(kind, size, sigma_x, sigma_y, theta, beta, o.kernel_size[1])


def draw_blur(o: DegradationOptions, draws: Draws, sigma: Sequence[float], sinc_prob: float) -> Tensor:
    """Blur kernels of one order [B, K, K], float64 on the host."""
    size = draw_sizes(draws, o.kernel_size)
    lowest = torch.where(size < SMALL_KERNEL, math.pi / 3, math.pi / 5).double()
    cutoff = lowest + (math.pi - lowest) * draws.uniform("cutoff")
    is_sinc = (draws.uniform("sinc") < sinc_prob).view(-1, 1, 1)
    return torch.where(
        is_sinc, sinc_kernels(cutoff, size, o.kernel_size[1]), draw_gaussian_kernels(o, draws, size, sigma)
    )


def draw_final_sinc(o: DegradationOptions, draws: Draws) -> Tensor:
    """The last filter [B, K, K]: a sinc or the identity."""
    size = draw_sizes(draws, o.kernel_size)
    cutoff = between(draws.uniform("cutoff").double(), (math.pi / 3, math.pi))
    is_sinc = (draws.uniform("sinc") < o.final_sinc_prob).view(-1, 1, 1)
    return torch.where(is_sinc, sinc_kernels(cutoff, size, o.kernel_size[1]), identity_kernel(o.kernel_size[1]))


def draw_scale(shared: Tensor, weights: Sequence[float], limits: tuple[float, float]) -> float:
    """Up U(1, high), down U(low, 1) or keep 1, from the first two of the numbers `shared` [2 or more] in [0, 1)."""
    kind, u = choose(shared[0].item(), weights), shared[1].item()
    return (1 + (limits[1] - 1) * u, limits[0] + (1 - limits[0]) * u, 1.0)[kind]


def draw_mode(u: Tensor) -> str:
    """One of MODES, from a scalar in [0, 1)."""
    return MODES[int(u.item() * len(MODES))]


def draw_noise(draws: Draws, maps: Draws, is_gaussian: bool, limits: Sequence[float], gray_prob: float) -> Noise:
    return Noise(
        kind="gaussian" if is_gaussian else "poisson",
        level=between(draws.uniform("level"), limits),
        gray=tuple((draws.uniform("gray") < gray_prob).tolist()),
        source=DrawnSource(maps),
    )


def draw_first(o: DegradationOptions, draws: Draws, maps: Draws) -> Order:
    shared = draws.uniform_per_ghost("shared", 4)[0]
    is_gaussian = shared[3].item() < o.gaussian_prob1
    limits = o.noise_sigma1 if is_gaussian else o.poisson_scale1
    return Order(
        kernel=draw_blur(o, draws.sub("kernel"), o.sigma1, o.sinc_prob1),
        scale=draw_scale(shared, o.resize_prob1, o.resize_range1),
        mode=draw_mode(shared[2]),
        noise=draw_noise(draws.sub("noise"), maps, is_gaussian, limits, o.gray_prob1),
        quality=between(draws.uniform("quality"), o.jpeg_quality1),
    )


def draw_second(o: DegradationOptions, draws: Draws, maps: Draws) -> Order:
    shared = draws.uniform_per_ghost("shared", 5)[0]
    is_gaussian = shared[3].item() < o.gaussian_prob2
    limits = o.noise_sigma2 if is_gaussian else o.poisson_scale2
    blurs = shared[4].item() < o.second_blur_prob
    return Order(
        kernel=draw_blur(o, draws.sub("kernel"), o.sigma2, o.sinc_prob2) if blurs else None,
        scale=draw_scale(shared, o.resize_prob2, o.resize_range2),
        mode=draw_mode(shared[2]),
        noise=draw_noise(draws.sub("noise"), maps, is_gaussian, limits, o.gray_prob2),
        quality=between(draws.uniform("quality"), o.jpeg_quality2),
    )


def decide(o: DegradationOptions, draws: Draws) -> Decisions:
    """Look up all decisions for the one ghost of `draws`; small numbers live on the host."""
    host = replace(draws, device="cpu").sub("degrade")
    shared = host.uniform_per_ghost("last", 2)[0]
    return Decisions(
        first=draw_first(o, host.sub("first"), host.sub("maps1")),
        second=draw_second(o, host.sub("second"), host.sub("maps2")),
        sinc=draw_final_sinc(o, host.sub("sinc")),
        final_mode=draw_mode(shared[0]),
        jpeg_last=shared[1].item() < 0.5,
    )


def first_order(x: Tensor, order: Order) -> Tensor:
    """Blur, resize by `scale`, noise, JPEG of images [B, 3, H, W] -> [B, 3, floor(H scale), floor(W scale)]."""
    if order.kernel is not None:
        x = filter2d(x, order.kernel)
    if order.scale != 1:
        x = F.interpolate(x, scale_factor=order.scale, mode=order.mode)
    return jpeg(add_noise(x, order.noise), order.quality)


def second_order(x: Tensor, d: Decisions, lq_size: tuple[int, int]) -> Tensor:
    """Blur, resize relative to the final size, noise; then resize + sinc and JPEG in the decided sequence.

    [B, 3, h, w] in [0, 1] -> [B, 3, *lq_size], a little outside [0, 1] where the sinc comes last.
    """
    order = d.second
    if order.kernel is not None:
        x = filter2d(x, order.kernel)
    x = F.interpolate(x, size=[int(side * order.scale) for side in lq_size], mode=order.mode)
    x = add_noise(x, order.noise)
    if d.jpeg_last:
        return jpeg(to_final_size(x, d, lq_size).clamp_(0, 1), order.quality)
    return to_final_size(jpeg(x, order.quality), d, lq_size)


def to_final_size(x: Tensor, d: Decisions, lq_size: tuple[int, int]) -> Tensor:
    """Resize and filter: [B, 3, h, w] -> [B, 3, *lq_size], not clamped."""
    return filter2d(F.interpolate(x, size=lq_size, mode=d.final_mode), d.sinc)


def apply_chain(hq: Tensor, decisions: Decisions, scale: int = 4, *, rounded: bool = True) -> Tensor:
    """Degrade images [B, 3, H, W] in [0, 1] to [B, 3, H // scale, W // scale] on the 256 levels of 8 bits.

    `rounded=False` leaves the last rounding out. The images are taken as they are: sharpen before, where wanted.
    """
    lq_size = (hq.shape[-2] // scale, hq.shape[-1] // scale)
    with exact_math(hq.device):
        lq = second_order(first_order(hq, decisions.first), decisions, lq_size)
        return eight_bit(lq) if rounded else lq


def flip_images(x: Tensor, draws: Draws, prob: float = 0.5) -> Tensor:
    """Mirror each image of [N, 3, H, W] left to right with probability `prob`."""
    flipped = draws.uniform("flip") < prob
    return torch.where(flipped.to(x.device, non_blocking=True).view(-1, 1, 1, 1), x.flip(-1), x)


def reflect_to(x: Tensor, size: int) -> Tensor:
    """Images [..., H, W] whose sides are at least `size`: mirrored at the bottom and right, edge not repeated."""
    for axis in (-2, -1):
        side = x.shape[axis]
        if side < size:
            period = max(2 * side - 2, 1)
            index = torch.arange(size, device=x.device) % period
            x = x.index_select(axis, torch.where(index < side, index, period - index))
    return x


def source_crop(image: Tensor, size: int, u: Tensor) -> Tensor:
    """The [3, size, size] window of an image [3, H, W] that is degraded, placed by u [2] in [0, 1)."""
    image = reflect_to(image, size)
    top, left = (int(v * (side - size + 1)) for v, side in zip(u.tolist(), image.shape[-2:], strict=True))
    return image[..., top : top + size, left : left + size]


def aligned_crop(hq: Tensor, lq: Tensor, size: int, scale: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same window of both: [B, 3, size, size] and [B, 3, size / scale, size / scale], placed by u [2] in [0, 1)."""
    small = size // scale
    top, left = (int(v * (side - small + 1)) for v, side in zip(u.tolist(), lq.shape[-2:], strict=True))
    lq = lq[..., top : top + small, left : left + small]
    return hq[..., top * scale : top * scale + size, left * scale : left * scale + size], lq


def usm(x: Tensor) -> Tensor:
    """Unsharp-masked images [N, 3, H, W] in [0, 1], in float32 whatever the training around computes in."""
    with exact_math(x.device):
        return sharpen(x)


class Degradation:
    """Makes low-quality training images. Raises ConfigError for settings or image sizes that cannot work."""

    def __init__(self, options: DegradationOptions | None = None):
        self.options = options or DegradationOptions()
        check_options(self.options)

    def units(self, draws: Draws) -> Iterator[tuple[slice, Draws]]:
        """The samples that share decisions, and their draws: a ghost, or each sample of it."""
        size = draws.ghost_batch
        for row, ghost in enumerate(draws.ghosts):
            one = draws.select([ghost])
            if self.options.decisions == "ghost":
                yield slice(row * size, (row + 1) * size), one
                continue
            for i in range(size):
                yield slice(row * size + i, row * size + i + 1), replace(one, ghost_batch=1).sub(f"sample{i}")

    def __call__(self, hq: Tensor, draws: Draws, scale: int = 4) -> Tensor:
        """Degrade images [N, 3, H, W] in [0, 1], N = draws.num_samples -> 8-bit [N, 3, H // scale, W // scale]."""
        check_image(self.options, hq, draws, scale)
        return torch.cat([self._degrade(self._source(hq[rows]), unit, scale) for rows, unit in self.units(draws)])

    def pair(self, hq: Tensor, draws: Draws, scale: int = 4, sharpened: bool = False) -> dict[str, Tensor]:
        """Degrade and crop: {"lq": [N, 3, crop / scale, ...], "hq": [N, 3, crop, crop]}, ready for the pool.

        With `sharpened` (the L1-only stage) the crop is one of the sharpened source, under the name "sharp" instead of
        "hq". The GAN stage takes raw crops and sharpens them after the pool, because D judges the raw ones.
        """
        check_image(self.options, hq, draws, scale, cropped=True)
        pairs = [self._pair(hq[rows], unit, scale, sharpened) for rows, unit in self.units(draws)]
        names = ("sharp" if sharpened else "hq", "lq")
        return {name: torch.cat([pair[i] for pair in pairs]) for i, name in enumerate(names)}

    def _pair(self, hq: Tensor, unit: Draws, scale: int, sharpened: bool) -> tuple[Tensor, Tensor]:
        source = self._source(hq)
        lq = self._degrade(source, unit, scale)
        if sharpened:
            hq = source if self.options.sharpen else usm(hq)
        u = replace(unit, device="cpu").uniform_per_ghost("degrade/crop", 2)[0]
        return aligned_crop(hq, lq, self.options.crop_size, scale, u)

    def _degrade(self, source: Tensor, unit: Draws, scale: int) -> Tensor:
        return apply_chain(source, decide(self.options, unit), scale)

    def _source(self, hq: Tensor) -> Tensor:
        return usm(hq) if self.options.sharpen else hq


def fixed_lq(
    hq: Tensor,
    name: str,
    seed: int,
    *,
    kind: str = "second_order",
    scale: int = 4,
    options: DegradationOptions | None = None,
) -> Tensor:
    """The one low-quality version of a validation image [3, H, W] in [0, 1] -> [3, H // scale, W // scale].

    On 8-bit levels. A function of image, name and seed alone; computed on the CPU, on every machine.
    `kind`: "second_order", or "bicubic" for MATLAB's. Raises ConfigError for another kind, or where `scale` does not
    divide H and W.
    """
    if hq.shape[-2] % scale or hq.shape[-1] % scale:
        sides = " x ".join(str(side) for side in hq.shape[-2:])
        raise ConfigError(
            f"validation image {name!r} is {sides} pixels: cut it to multiples of the scale {scale} first"
        )
    hq = hq.detach().float().cpu().unsqueeze(0)
    if kind == "bicubic":
        return eight_bit(imresize(hq, 1 / scale))[0]
    if kind != "second_order":
        raise ConfigError(f"validation degradation {kind!r} is unknown: use 'second_order' or 'bicubic'")
    draws = Draws(seed=seed, step=0, ghosts=(0,), ghost_batch=1, path=f"fixed_lq/{name}")
    return Degradation(options)(hq, draws, scale)[0]
