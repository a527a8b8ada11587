"""Adaptive discriminator augmentation (Karras et al. 2020): the whole pipeline as a function of images, p and draws.

Geometric operations are collected in one inverse transform, colour operations in one matrix, so each image is resampled
once. Any GAN can use it: `AdaPipe(options)(images, p, draws)`; gradients of every order flow through the images.

A sample's result depends on its ghost alone. Only the reflection margin looks beyond a single sample: it is the largest
any sample of the ghost needs, as on an official device of that batch size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.augment.ada_filters import filter_bank, geometry_filter
from sdtrain.augment.ada_transforms import (
    apply_color,
    apply_filter,
    apply_geometry,
    beside,
    grey_rotation,
    matrix,
    needed_margins,
    rotation,
    scaling,
    shift,
)
from sdtrain.errors import ConfigError
from sdtrain.precision import full_precision
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
PRESETS: dict[str, dict[str, float]] = {
    "blit": dict.fromkeys(_BLIT, 1.0),
    "geom": dict.fromkeys(_GEOM, 1.0),
    "color": dict.fromkeys(_COLOR, 1.0),
    "filter": {"imgfilter": 1.0},
    "noise": {"noise": 1.0},
    "cutout": {"cutout": 1.0},
    "bg": dict.fromkeys((*_BLIT, *_GEOM), 1.0),
    "bgc": dict.fromkeys((*_BLIT, *_GEOM, *_COLOR), 1.0),
    "bgcf": dict.fromkeys((*_BLIT, *_GEOM, *_COLOR, "imgfilter"), 1.0),
    "bgcfn": dict.fromkeys((*_BLIT, *_GEOM, *_COLOR, "imgfilter", "noise"), 1.0),
    "bgcfnc": dict.fromkeys((*_BLIT, *_GEOM, *_COLOR, "imgfilter", "noise", "cutout"), 1.0),
    "r3gan": dict.fromkeys((*_BLIT, *_GEOM, "cutout"), 1.0) | dict.fromkeys(_COLOR, 0.5),
}


def preset(name: str, options: AdaOptions | None = None) -> AdaOptions:
    """Options with the multipliers of a named pipeline ('bgc' is the official default of ADA, 'r3gan' of R3GAN).

    Raises ConfigError for a name that does not exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"augmentation pipeline '{name}' is unknown; choose one of {', '.join(PRESETS)}")
    multipliers: dict[str, Any] = dict(PRESETS[name])
    return replace(options or AdaOptions(), **multipliers)


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

    def __init__(
        self, draws: Draws | None, p: Tensor, num: int, quantile: float | None, pixel_draws: Draws | None = None
    ):
        """`pixel_draws`: `draws` on the device of the images, where they are not there already."""
        self.draws, self.p, self.num, self.quantile = draws, p, num, quantile
        self.pixel_draws = draws if pixel_draws is None else pixel_draws
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
        """[N, *shape], standard normal."""
        if self.normal_quantile is not None:
            return self.p.new_full((self.num, *shape), self.normal_quantile)
        return self._drawn().normal(name, *shape)

    def gated(self, name: str, multiplier: float, value: Tensor, neutral: float) -> Tensor:
        """`value` [N, ...] for the samples that the transform hits, `neutral` for the others."""
        return self.chosen(name, multiplier * self.p, value, neutral)

    def chosen(self, name: str, probability: Tensor, value: Tensor, neutral: float) -> Tensor:
        """`value` [N, ...] for samples whose draw is below `probability`, a scalar in [0, 1]; `neutral` elsewhere."""
        if self.quantile is not None:
            return value
        hit = self._drawn().uniform(f"{name}/gate") < probability
        return torch.where(hit.view(-1, *[1] * (value.ndim - 1)), value, torch.full_like(value, neutral))


def _erfinv(x: float) -> float:
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float32)))


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
        c = matrix([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]], b) @ c
    if o.contrast:
        k = chance.gated("contrast", o.contrast, torch.exp2(chance.normal("contrast") * o.contrast_std), 1)
        c = matrix([[k, 0, 0, 0], [0, k, 0, 0], [0, 0, k, 0], [0, 0, 0, 1]], k) @ c
    if o.lumaflip:
        i = chance.gated("lumaflip", o.lumaflip, (chance.uniform("lumaflip") * 2).floor(), 0)
        c = (eye - 2 * along * i[:, None, None]) @ c
    if o.hue and channels > 1:
        angle = chance.gated("hue", o.hue, (chance.uniform("hue") * 2 - 1) * (pi * o.hue_max), 0)
        c = grey_rotation(angle) @ c
    if o.saturation and channels > 1:
        s = chance.gated("saturation", o.saturation, torch.exp2(chance.normal("saturation") * o.saturation_std), 1)
        c = (along + (eye - along) * s[:, None, None]) @ c
    return c


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


def add_noise(o: AdaOptions, images: Tensor, chance: Chance) -> Tensor:
    """Images [N, C, H, W] plus normal noise of a sigma |N(0, noise_std)| that each sample draws; not clamped."""
    if chance.quantile is None:
        sigma = chance.gated("noise", o.noise, chance.normal("noise").abs() * o.noise_std, 0)
    else:
        sigma = chance.p.new_full((chance.num,), _erfinv(chance.quantile) * o.noise_std)
    draws = chance.pixel_draws
    pixels = torch.zeros_like(images) if draws is None else draws.normal("noise/pixels", *images.shape[1:])
    return images + pixels * beside(images, sigma)[:, None, None, None]


def cut_out(o: AdaOptions, images: Tensor, chance: Chance) -> Tensor:
    """Set a square with its centre anywhere in the image to 0, grey in [-1, 1]: [N, C, H, W] -> the same shape."""
    height, width = images.shape[2:]
    size = chance.gated("cutout", o.cutout, chance.p.new_full((chance.num,), o.cutout_size), 0)[:, None] / 2
    size, centre = beside(images, size), beside(images, chance.uniform("cutout", 2))
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
        with full_precision(images.device):
            # matrices and margins are made beside a GPU: small, many, and the host decides by them
            strength = torch.as_tensor(self.p if p is None else p, dtype=torch.float32)
            host = draws if draws is None or not images.is_cuda else replace(draws, device="cpu")
            chance = Chance(host, strength, len(images), debug_percentile, draws)
            return self.augmented(images.float(), chance)

    def augmented(self, x: Tensor, chance: Chance) -> Tensor:
        """The pipeline on [N, C, H, W] float32 in [-1, 1] -> the same shape, not clamped.

        Raises DataError for a number of channels or a size that a transform cannot take.
        """
        o = self.options
        if any(getattr(o, name) for name in (*_BLIT, *_GEOM)):
            g_inv = inverse_geometry(o, chance, x.shape[3], x.shape[2])
            x = self.warp(x, g_inv, None if chance.draws is None else chance.draws.ghost_batch)
        if any(getattr(o, name) for name in _COLOR):
            x = apply_color(x, beside(x, color_matrix(o, chance, x.shape[1])))
        if o.imgfilter:
            x = apply_filter(x, beside(x, band_gains(o, chance)) @ self.Hz_fbank)
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
