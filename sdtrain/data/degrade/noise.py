"""Gaussian and Poisson noise of the second-order degradation, coloured or gray, one strength a sample.

Where the numbers come from is the caller's choice: a `Source` hands out normal maps and Poisson counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from sdtrain.rng import Draws

LUMA = (0.2989, 0.587, 0.114)


class Source(Protocol):
    """Random maps by name; asking twice for one name gives the same map."""

    def normal(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal numbers of `shape`."""

    def poisson(self, name: str, rate: Tensor) -> Tensor:
        """Counts of the shape of `rate` [...], its mean, 0 or more."""


@dataclass(frozen=True)
class DrawnSource:
    """Random maps of the one ghost of `draws`, made on the device that needs them."""

    draws: Draws

    def normal(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """See `Source.normal`."""
        return torch.randn(shape, generator=self._generator(name, device), device=device)

    def poisson(self, name: str, rate: Tensor) -> Tensor:
        """Counts of the shape of `rate` [...]."""
        return torch.poisson(rate, generator=self._generator(name, rate.device))

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        (ghost,) = self.draws.ghosts
        return self.draws.generator(name, ghost, device)


@dataclass(frozen=True)
class FixedSource:
    """Given maps by name, to repeat a known degradation. Poisson maps hold counts."""

    maps: dict[str, Tensor] = field(default_factory=dict)

    def normal(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The given map, viewed as `shape`."""
        return self.maps[name].to(device).view(shape)

    def poisson(self, name: str, rate: Tensor) -> Tensor:
        """The given counts, viewed in the shape of `rate` [...]."""
        return self.maps[name].to(rate).view(rate.shape)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is added to B images: `level` [B] is sigma in 1/255 (gaussian) or the factor on the shot noise (poisson)."""

    kind: Literal["gaussian", "poisson"]
    level: Tensor
    gray: tuple[bool, ...]
    """Which samples get one map for all three channels."""
    source: Source


def luminance(x: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W], ITU-R 601 weights to four digits as in torchvision."""
    r, g, b = x.split(1, 1)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def eight_bit(x: Tensor) -> Tensor:
    """The nearest of the 256 levels of an 8-bit file, [...] -> the same shape: clamp(round(255 x), 0, 255) / 255."""
    return (x * 255).round_().clamp_(0, 255).div_(255)


def photon_count(x: Tensor) -> Tensor:
    """v = 2^ceil(log2(number of distinct levels)) of each 8-bit image in [N, C, H, W] -> [N, 1, 1, 1]."""
    levels = (x * 255).round_().long().flatten(1)
    seen = torch.zeros(len(x), 256, device=x.device).scatter_(1, levels, 1.0)
    powers = 2.0 ** torch.arange(9, device=x.device)
    return powers[torch.searchsorted(powers, seen.sum(1))].view(-1, 1, 1, 1)


def shot_noise(x: Tensor, source: Source, name: str) -> Tensor:
    """Poisson(x v) / v - x for the 8-bit version of images [N, C, H, W] in [0, 1] -> the same shape."""
    x = eight_bit(x)
    count = photon_count(x)
    return source.poisson(name, x * count).div_(count).sub_(x)


def gaussian_maps(x: Tensor, noise: Noise, gray: bool) -> Tensor:
    """Standard normal maps for [N, C, H, W]: the same shape, or gray [1, 1, H, W].

    A gray one is drawn once and shared by all samples, as published.
    """
    height, width = x.shape[-2:]
    if gray:
        return noise.source.normal("gray", (1, 1, height, width), x.device)
    return noise.source.normal("colour", tuple(x.shape), x.device)


def noise_of(x: Tensor, noise: Noise, gray: bool) -> Tensor:
    """Unscaled noise for images [N, 3, H, W] in [0, 1] that are all gray-noised or all colour-noised.

    Colour has the images' shape; gray [N, 1, H, W] (poisson) or [1, 1, H, W] (gaussian).
    """
    if noise.kind == "gaussian":
        return gaussian_maps(x, noise, gray) / 255
    return shot_noise(luminance(x) if gray else x, noise.source, "gray" if gray else "colour")


def add_noise(x: Tensor, noise: Noise) -> Tensor:
    """clip(x + level * noise, 0, 1) for images [B, 3, H, W] in [0, 1]; only what a sample needs is drawn for it."""
    level = noise.level.to(x.device, x.dtype, non_blocking=True).view(-1, 1, 1, 1)
    done: dict[int, Tensor] = {}
    for gray in (False, True):
        rows = [i for i, g in enumerate(noise.gray) if g == gray]
        if len(rows) == len(x):
            return (x + level * noise_of(x, noise, gray)).clamp_(0, 1)
        if rows:
            # taken one by one: a list of rows would be copied to the device, which waits for it
            some, strength = (torch.stack([t[i] for i in rows]) for t in (x, level))
            done |= dict(zip(rows, (some + strength * noise_of(some, noise, gray)).clamp_(0, 1), strict=True))
    return torch.stack([done[i] for i in range(len(x))])
