"""Adaptive discriminator augmentation (Karras et al. 2020): the whole pipeline as a function of images, p and draws.

Geometric operations are collected in one inverse transform, colour operations in one matrix, so each image is resampled
once. Any GAN can use it: `AdaPipe(options)(images, p, draws)`; gradients of every order flow through the images.

A sample's result depends on its ghost alone. Only the reflection margin looks beyond a single sample: it is the largest
any sample of the ghost needs, as on an official device of that batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.augment.ada_filters import filter_bank, geometry_filter
from sdtrain.errors import ConfigError, DataError
from sdtrain.models.stylegan2_ops import upfirdn2d
from sdtrain.rng import Draws

# average power of natural images in the four bands of the filter bank
EXPECTED_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)


@dataclass(frozen=True, kw_only=True)
class AdaOptions:
    """Which transforms run (each with probability multiplier * p) and how strong they are."""

    xflip: float = 0.0  # multiplier: mirror
    rotate90: float = 0.0  # multiplier: rotation by quarter turns
    xint: float = 0.0  # multiplier: shift by whole pixels
    scale: float = 0.0  # multiplier: isotropic scaling
    rotate: float = 0.0  # multiplier: rotation by any angle
    aniso: float = 0.0  # multiplier: anisotropic scaling
    xfrac: float = 0.0  # multiplier: shift by fractions of a pixel
    brightness: float = 0.0  # multiplier: brightness
    contrast: float = 0.0  # multiplier: contrast
    lumaflip: float = 0.0  # multiplier: reflection about the grey axis
    hue: float = 0.0  # multiplier: rotation about the grey axis
    saturation: float = 0.0  # multiplier: scaling of the chroma
    imgfilter: float = 0.0  # multiplier: gain of frequency bands
    noise: float = 0.0  # multiplier: additive noise
    cutout: float = 0.0  # multiplier: blacked-out square
    xint_max: float = 0.125  # largest whole-pixel shift, fraction of the size
    scale_std: float = 0.2  # log2 standard deviation of the scale
    rotate_max: float = 1.0  # largest angle, fraction of half a turn
    aniso_std: float = 0.2  # log2 standard deviation of the aspect
    xfrac_std: float = 0.125  # standard deviation of the shift, fraction of the size
    brightness_std: float = 0.2  # standard deviation of the brightness
    contrast_std: float = 0.5  # log2 standard deviation of the contrast
    hue_max: float = 1.0  # largest hue angle, fraction of half a turn
    saturation_std: float = 1.0  # log2 standard deviation of the saturation
    imgfilter_bands: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # multiplier of each band, low to high
    imgfilter_std: float = 1.0  # log2 standard deviation of a band's gain
    noise_std: float = 0.1  # standard deviation of the noise's standard deviation
    cutout_size: float = 0.5  # side of the square, fraction of the size


_BLIT = ("xflip", "rotate90", "xint")
_GEOM = ("scale", "rotate", "aniso", "xfrac")
_COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
PRESETS: dict[str, tuple[str, ...]] = {
    "blit": _BLIT,
    "geom": _GEOM,
    "color": _COLOR,
    "filter": ("imgfilter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
    "bg": (*_BLIT, *_GEOM),
    "bgc": (*_BLIT, *_GEOM, *_COLOR),
    "bgcf": (*_BLIT, *_GEOM, *_COLOR, "imgfilter"),
    "bgcfn": (*_BLIT, *_GEOM, *_COLOR, "imgfilter", "noise"),
    "bgcfnc": (*_BLIT, *_GEOM, *_COLOR, "imgfilter", "noise", "cutout"),
}


def preset(name: str, options: AdaOptions | None = None) -> AdaOptions:
    """Options with the multipliers of a named pipeline set to one ('bgc' is the official default)."""
    if name not in PRESETS:
        raise ConfigError(f"augmentation pipeline '{name}' is unknown; choose one of {', '.join(PRESETS)}")
    switched_on: dict[str, Any] = dict.fromkeys(PRESETS[name], 1.0)
    return replace(options or AdaOptions(), **switched_on)


def update_p(
    p: float,
    signs_sum: float,
    signs_count: float,
    batch_size: int,
    interval: int = 4,
    target: float = 0.6,
    ada_kimg: float = 500.0,
) -> float:
    """ADA's controller: p <- max(0, p + sign(r_t - target) * batch * interval / (1000 ada_kimg)).

    r_t = mean sign(D(real)) over all logits since the last adjustment, given as sum and count over all ranks; without
    logits p stays. `interval` counts steps between adjustments.
    """
    if signs_count == 0:
        return p
    above = signs_sum / signs_count - target
    direction = (above > 0) - (above < 0)
    return max(0.0, p + direction * batch_size * interval / (ada_kimg * 1000))


class Chance:
    """Values and gates of one call: drawn from `draws`, or every value its q-quantile and every gate open."""

    def __init__(self, draws: Draws | None, p: Tensor, num: int, quantile: float | None):
        self.draws, self.p, self.num, self.quantile = draws, p, num, quantile
        # the official pipeline takes erfinv(2q - 1) for the normal quantile, without the factor sqrt 2
        self.normal_quantile = None if quantile is None else _erfinv(2 * quantile - 1)

    def _drawn(self) -> Draws:
        assert self.draws is not None
        return self.draws

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[N, *shape] in [0, 1)."""
        if self.quantile is not None:
            return self.p.new_full((self.num, *shape), self.quantile)
        return self._drawn().uniform(name, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        if self.normal_quantile is not None:
            return self.p.new_full((self.num, *shape), self.normal_quantile)
        return self._drawn().normal(name, *shape)

    def gated(self, name: str, multiplier: float, value: Tensor, neutral: float) -> Tensor:
        """`value` [N, ...] for the samples that the transform hits, `neutral` for the others."""
        return self.chosen(name, multiplier * self.p, value, neutral)

    def chosen(self, name: str, probability: Tensor, value: Tensor, neutral: float) -> Tensor:
        if self.quantile is not None:
            return value
        hit = self._drawn().uniform(f"{name}/gate") < probability
        return torch.where(hit.view(-1, *[1] * (value.ndim - 1)), value, torch.full_like(value, neutral))


def _erfinv(x: float) -> float:
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float32)))


def _matrix(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Stack scalars and [N] tensors into [N, rows, columns]."""
    entries = [torch.stack([torch.as_tensor(v, dtype=like.dtype, device=like.device).expand_as(like) for v in row], 1)
               for row in rows]  # fmt: skip
    return torch.stack(entries, 1)


def scaling(sx: Tensor, sy: Tensor) -> Tensor:
    return _matrix([[sx, 0, 0], [0, sy, 0], [0, 0, 1]], sx)


def shift(tx: Tensor, ty: Tensor) -> Tensor:
    return _matrix([[1, 0, tx], [0, 1, ty], [0, 0, 1]], tx)


def rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], angle)


def inverse_geometry(o: AdaOptions, chance: Chance, width: int, height: int) -> Tensor:
    """The transform from output to input coordinates, in pixels about the image centre: [N, 3, 3].

    Every factor is the inverse of one operation, in the order in which the operations happen.
    """
    return _inverse_blit(o, chance, width, height) @ _inverse_general(o, chance, width, height)


def _inverse_blit(o: AdaOptions, chance: Chance, width: int, height: int) -> Tensor:
    """Operations that map pixels onto pixels."""
    g = torch.eye(3, device=chance.p.device).expand(chance.num, 3, 3)
    if o.xflip:
        flip = chance.gated("xflip", o.xflip, (chance.uniform("xflip") * 2).floor(), 0)
        g = g @ scaling(1 - 2 * flip, torch.ones_like(flip))
    if o.rotate90:
        quarter = chance.gated("rotate90", o.rotate90, (chance.uniform("rotate90") * 4).floor(), 0)
        g = g @ rotation(quarter * (pi / 2))
    if o.xint:
        t = chance.gated("xint", o.xint, (chance.uniform("xint", 2) * 2 - 1) * o.xint_max, 0)
        g = g @ shift(-(t[:, 0] * width).round(), -(t[:, 1] * height).round())
    return g


def _inverse_general(o: AdaOptions, chance: Chance, width: int, height: int) -> Tensor:
    """Scaling, rotation and shift by any amount.

    The rotations before and after the anisotropic scaling happen together with probability rotate * p.
    """
    g = torch.eye(3, device=chance.p.device).expand(chance.num, 3, 3)
    once = 1 - (1 - o.rotate * chance.p).clamp(0, 1).sqrt()
    if o.scale:
        s = chance.gated("scale", o.scale, torch.exp2(chance.normal("scale") * o.scale_std), 1)
        g = g @ scaling(1 / s, 1 / s)
    if o.rotate:
        angle = (chance.uniform("rotate") * 2 - 1) * (pi * o.rotate_max)
        g = g @ rotation(chance.chosen("rotate", once, angle, 0))
    if o.aniso:
        s = chance.gated("aniso", o.aniso, torch.exp2(chance.normal("aniso") * o.aniso_std), 1)
        g = g @ scaling(1 / s, s)
    if o.rotate and chance.quantile is None:
        angle = (chance.uniform("rotate_post") * 2 - 1) * (pi * o.rotate_max)
        g = g @ rotation(chance.chosen("rotate_post", once, angle, 0))
    if o.xfrac:
        t = chance.gated("xfrac", o.xfrac, chance.normal("xfrac", 2) * o.xfrac_std, 0)
        g = g @ shift(-t[:, 0] * width, -t[:, 1] * height)
    return g


def color_matrix(o: AdaOptions, chance: Chance, channels: int) -> Tensor:
    """Affine colour transform in homogeneous coordinates: [N, 4, 4]. Hue and saturation need RGB."""
    eye = torch.eye(4, device=chance.p.device)
    c = eye.expand(chance.num, 4, 4)
    grey = torch.tensor([1.0, 1.0, 1.0, 0.0], device=chance.p.device) / sqrt(3)
    along = torch.outer(grey, grey)  # projection onto the grey axis
    if o.brightness:
        b = chance.gated("brightness", o.brightness, chance.normal("brightness") * o.brightness_std, 0)
        c = _matrix([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]], b) @ c
    if o.contrast:
        k = chance.gated("contrast", o.contrast, torch.exp2(chance.normal("contrast") * o.contrast_std), 1)
        c = _matrix([[k, 0, 0, 0], [0, k, 0, 0], [0, 0, k, 0], [0, 0, 0, 1]], k) @ c
    if o.lumaflip:
        i = chance.gated("lumaflip", o.lumaflip, (chance.uniform("lumaflip") * 2).floor(), 0)
        c = (eye - 2 * along * i[:, None, None]) @ c
    if o.hue and channels > 1:
        angle = chance.gated("hue", o.hue, (chance.uniform("hue") * 2 - 1) * (pi * o.hue_max), 0)
        c = _grey_rotation(angle) @ c
    if o.saturation and channels > 1:
        s = chance.gated("saturation", o.saturation, torch.exp2(chance.normal("saturation") * o.saturation_std), 1)
        c = (along + (eye - along) * s[:, None, None]) @ c
    return c


def _grey_rotation(angle: Tensor) -> Tensor:
    """Rodrigues' rotation about (1, 1, 1) / sqrt 3: [N] -> [N, 4, 4]."""
    cos, sin = angle.cos(), angle.sin()
    same, before, after = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin / sqrt(3), (1 - cos) / 3 + sin / sqrt(3)
    rows: list[list[Tensor | float]] = [
        [same, before, after, 0],
        [after, same, before, 0],
        [before, after, same, 0],
        [0, 0, 0, 1],
    ]
    return _matrix(rows, angle)


def apply_color(images: Tensor, c: Tensor) -> Tensor:
    """[N, 3 or 1, H, W] under the matrices [N, 4, 4]; a grey image takes the mean over the rows."""
    n, channels, height, width = images.shape
    flat = images.reshape(n, channels, height * width)
    if channels == 3:
        flat = torch.baddbmm(c[:, :3, 3:], c[:, :3, :3], flat)
    elif channels == 1:
        mean = c[:, :3].mean(1, keepdim=True)
        flat = flat * mean[:, :, :3].sum(2, keepdim=True) + mean[:, :, 3:]
    else:
        raise DataError(f"colour augmentation works on 1 or 3 channels, not {channels}; choose a pipeline without it")
    return flat.reshape(n, channels, height, width)


class _Sample(torch.autograd.Function):
    """Bilinear sampling on a constant grid: linear, so it and its adjoint are each other's derivatives."""

    @staticmethod
    def forward(ctx, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = images.shape
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:
        return _SampleAdjoint.apply(slope, ctx.saved_tensors[0], ctx.size), None


class _SampleAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slope: Tensor, grid: Tensor, size: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        images = slope.new_empty(size)  # the kernel wants it for the grid's gradient, which is not asked for
        kernel = torch.ops.aten.grid_sampler_2d_backward
        return kernel(slope.contiguous(), images, grid, 0, 0, False, [True, False])[0]

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        return _Sample.apply(slope, ctx.saved_tensors[0]), None, None


def needed_margins(g_inv: Tensor, width: int, height: int, support: int) -> list[tuple[int, int, int, int]]:
    """Pixels (left, right, top, bottom) that each sample's transform reaches beyond its image, at most size - 1.

    g_inv [N, 3, 3]; `support` is what the resampling filters reach in addition.
    """
    half = g_inv.new_tensor([(width - 1) / 2, (height - 1) / 2])
    signs = g_inv.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    corners = F.pad(signs * half, (0, 1), value=1.0)
    reached = (g_inv @ corners.t())[:, :2]
    beyond = torch.stack([(-reached).amax(2), reached.amax(2)], 2) - half[:, None] + support
    limit = g_inv.new_tensor([[width - 1], [height - 1]])
    margins = torch.minimum(beyond.clamp(min=0), limit).ceil().int().flatten(1).tolist()
    return [(m[0], m[1], m[2], m[3]) for m in margins]


def apply_geometry(images: Tensor, g_inv: Tensor, taps: Tensor, margin: tuple[int, int, int, int]) -> Tensor:
    """Resample [N, C, H, W] by [N, 3, 3]: reflect, double, sample bilinearly, halve; both filters are `taps`."""
    n, channels, height, width = images.shape
    reach = len(taps) // 4  # what the halving filter needs around the result, in pixels
    left, right, top, bottom = margin
    x = F.pad(images, margin, mode="reflect")
    pad_up = ((len(taps) + 1) // 2, (len(taps) - 2) // 2)
    x = upfirdn2d(x, taps, up=2, padding=pad_up * 2, gain=4.0)
    size = (n, channels, 2 * (height + 2 * reach), 2 * (width + 2 * reach))
    x = _Sample.apply(x, _grid(g_inv, x.shape, size, (left - right) / 2, (top - bottom) / 2))
    pad_down = ((len(taps) - 1) // 2 - 2 * reach, (len(taps) - 2) // 2 - 2 * reach)
    return upfirdn2d(x, taps, down=2, padding=pad_down * 2, flip_filter=True)


def _grid(g_inv: Tensor, source: torch.Size, target: tuple[int, int, int, int], dx: float, dy: float) -> Tensor:
    """Sampling grid [N, h, w, 2] in grid_sample's units for images of twice the resolution, padded unevenly by dx, dy.

    The wavelet is centred on one tap, half a doubled pixel beside the middle of its twelve, hence the shifts by 1/4.
    """
    n = len(g_inv)
    like = g_inv[:, 0, 0]

    def fixed(a: float, b: float, make: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return make(torch.full_like(like, a), torch.full_like(like, b))

    to_source = fixed(-0.25 + dx, -0.25 + dy, shift)
    g = to_source @ g_inv @ fixed(0.25, 0.25, shift)
    normalise = fixed(4 / source[3], 4 / source[2], scaling)  # pixels about the centre -> [-1, 1]
    spread = fixed(target[3] / 4, target[2] / 4, scaling)
    g = normalise @ g @ spread
    return F.affine_grid(g[:, :2], [n, 1, target[2], target[3]], align_corners=False)


def band_gains(o: AdaOptions, chance: Chance) -> Tensor:
    """Gain of each frequency band [N, 4]; each change alone leaves the expected total power as it was."""
    power = torch.tensor(EXPECTED_POWER, device=chance.p.device)
    gains = torch.ones(chance.num, len(power), device=chance.p.device)
    for i, multiplier in enumerate(o.imgfilter_bands):
        name = f"imgfilter/{i}"
        gain = torch.exp2(chance.normal(name) * o.imgfilter_std)
        gain = chance.gated(name, o.imgfilter * multiplier, gain, 1)
        one = torch.ones_like(gains)
        one[:, i] = gain
        gains = gains * one / (power * one.square()).sum(1, keepdim=True).sqrt()
    return gains


def apply_filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter [N, C, H, W] along both axes with each sample's own zero-phase kernel [N, K]."""
    n, channels, height, width = images.shape
    reach = kernels.shape[1] // 2
    if min(height, width) <= reach:
        raise DataError(f"the image filter of ADA needs sides above {reach} pixels, got {width}x{height}; leave it out")
    kernels = kernels.repeat_interleave(channels, 0)[:, None, None]
    x = F.pad(images.reshape(1, n * channels, height, width), (reach,) * 4, mode="reflect")
    x = F.conv2d(x, kernels, groups=n * channels)
    return F.conv2d(x, kernels.transpose(2, 3), groups=n * channels).reshape(images.shape)


def add_noise(o: AdaOptions, images: Tensor, chance: Chance) -> Tensor:
    if chance.quantile is None:
        sigma = chance.gated("noise", o.noise, chance.normal("noise").abs() * o.noise_std, 0)
    else:
        sigma = chance.p.new_full((chance.num,), _erfinv(chance.quantile) * o.noise_std)
    pixels = (
        torch.zeros_like(images) if chance.draws is None else chance.draws.normal("noise/pixels", *images.shape[1:])
    )
    return images + pixels * sigma[:, None, None, None]


def cut_out(o: AdaOptions, images: Tensor, chance: Chance) -> Tensor:
    """Black out a square with its centre anywhere in the image."""
    height, width = images.shape[2:]
    size = chance.gated("cutout", o.cutout, chance.p.new_full((chance.num,), o.cutout_size), 0)[:, None] / 2
    centre = chance.uniform("cutout", 2)
    x, y = ((torch.arange(n, device=images.device) + 0.5) / n for n in (width, height))
    inside_x = (x - centre[:, :1]).abs() < size
    inside_y = (y - centre[:, 1:]).abs() < size
    return images * ~(inside_y[:, :, None] & inside_x[:, None])[:, None]


class AdaPipe(nn.Module):
    """The augmentation pipeline, from options or the name of a preset; buffers carry the official names."""

    p: Tensor
    Hz_geom: Tensor
    Hz_fbank: Tensor

    def __init__(self, options: AdaOptions | str = "bgc"):
        super().__init__()
        self.options = preset(options) if isinstance(options, str) else options
        self.register_buffer("p", torch.zeros([]))
        self.register_buffer("Hz_geom", geometry_filter())
        self.register_buffer("Hz_fbank", filter_bank())

    def forward(
        self,
        images: Tensor,
        p: float | Tensor | None = None,
        draws: Draws | None = None,
        debug_percentile: float | None = None,
    ) -> Tensor:
        """Augment [N, C, H, W] in [-1, 1], not clamped, with strength p (None: the buffer); no draws, no change.

        `debug_percentile` replaces every draw by that quantile and applies every transform.
        """
        if debug_percentile is None and (draws is None or (isinstance(p, (int, float)) and p == 0)):
            return images
        with torch.autocast(images.device.type, enabled=False):
            strength = torch.as_tensor(self.p if p is None else p, dtype=torch.float32, device=images.device)
            chance = Chance(draws, strength, len(images), debug_percentile)
            return self.augmented(images.float(), chance)

    def augmented(self, x: Tensor, chance: Chance) -> Tensor:
        o = self.options
        if any(getattr(o, name) for name in (*_BLIT, *_GEOM)):
            g_inv = inverse_geometry(o, chance, x.shape[3], x.shape[2])
            x = self.warp(x, g_inv, None if chance.draws is None else chance.draws.ghost_batch)
        if any(getattr(o, name) for name in _COLOR):
            x = apply_color(x, color_matrix(o, chance, x.shape[1]))
        if o.imgfilter:
            x = apply_filter(x, band_gains(o, chance) @ self.Hz_fbank)
        if o.noise:
            x = add_noise(o, x, chance)
        return cut_out(o, x, chance) if o.cutout else x

    def warp(self, images: Tensor, g_inv: Tensor, ghost_batch: int | None = None) -> Tensor:
        """Apply inverse transforms [N, 3, 3], one margin for each ghost of `ghost_batch` samples (None: one ghost)."""
        size = ghost_batch or len(images)
        margins = needed_margins(g_inv, images.shape[3], images.shape[2], len(self.Hz_geom) // 2)
        done = []
        for first in range(0, len(images), size):
            ghost = slice(first, first + size)
            margin = tuple(max(side) for side in zip(*margins[ghost], strict=True))
            done.append(apply_geometry(images[ghost], g_inv[ghost], self.Hz_geom, margin))
        return done[0] if len(done) == 1 else torch.cat(done)
