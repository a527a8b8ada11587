"""Bicubic resizing as MATLAB's imresize does it, by two matrix products, and GCFSR's down-up pair.

Cubic kernel a = -0.5, widened by 1/scale when shrinking (antialiasing), symmetric border, height first. The matrices
are built once in float64 per size, scale and device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdtrain.data.degrade.exact import exact_math, matmul_exact
from sdtrain.data.degrade.noise import eight_bit
from sdtrain.errors import ConfigError
from sdtrain.rng import Draws

# Which down-scaling factors the published training draws, uniformly from the list, by image size.
GCFSR_FACTORS = {1024: (64, 64, 64, 64, 32, 32, 16, 16, 8, 4), 512: (32, 32, 32, 32, 16, 16, 8, 8, 4)}
GCFSR_RANGE = (4, 64)


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, support 4, element by element at x [...] pixels from the centre."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, 0.0))


@functools.lru_cache(maxsize=256)
def resize_matrix(size: int, scale: float, antialias: bool, device: torch.device) -> Tensor:
    """The linear map of one axis, [ceil(size * scale), size], float32.

    Output pixel x (from 1) lies at x / scale + (1 - 1 / scale) / 2; its weights are normalised and indices beyond an
    edge are mirrored with the edge pixel repeated.
    """
    out = math.ceil(round(size * scale, 9))
    shrink = min(scale, 1.0) if antialias else 1.0
    x = torch.arange(1, out + 1, dtype=torch.float64)
    centre = x / scale + 0.5 * (1 - 1 / scale)
    taps = math.ceil(4 / shrink) + 2
    index = (centre - 2 / shrink).floor().view(-1, 1) + torch.arange(taps)
    weight = shrink * cubic((centre.view(-1, 1) - index) * shrink)
    weight /= weight.sum(1, keepdim=True)
    mirrored = (index.long() - 1) % (2 * size)
    mirrored = torch.where(mirrored < size, mirrored, 2 * size - 1 - mirrored)
    return torch.zeros(out, size, dtype=torch.float64).scatter_add_(1, mirrored, weight).float().to(device)


def imresize(x: Tensor, scale: float, antialias: bool = True) -> Tensor:
    """Resize [..., H, W] to [..., ceil(H scale), ceil(W scale)]; no clipping, no rounding."""
    rows = resize_matrix(x.shape[-2], scale, antialias, x.device)
    cols = resize_matrix(x.shape[-1], scale, antialias, x.device)
    with exact_math(x.device):
        return matmul_exact(matmul_exact(rows, x), cols.t())


def down_up(x: Tensor, factor: int) -> Tensor:
    """imresize by 1/factor and back, cut to the size of x [..., H, W] (sizes off the factor are rounded up first)."""
    return imresize(imresize(x, 1 / factor), factor)[..., : x.shape[-2], : x.shape[-1]]


def check_factor(factor: int) -> None:
    """Raises ConfigError for a factor outside GCFSR_RANGE."""
    low, high = GCFSR_RANGE
    if not low <= factor <= high:
        raise ConfigError(f"down-scaling factor {factor} is outside [{low}, {high}]: choose one of 4, 8, 16, 32, 64")


def draw_factors(draws: Draws, factors: Sequence[int]) -> list[int]:
    """One down-scaling factor an image, uniformly from the list (repeat entries to weight them).

    Raises ConfigError for an empty list or a factor outside GCFSR_RANGE.
    """
    for factor in factors:
        check_factor(factor)
    if not factors:
        raise ConfigError("the list of down-scaling factors is empty: give at least one, for example [16, 32, 64]")
    return [factors[i] for i in replace(draws, device="cpu").integers("factor", 0, len(factors)).tolist()]


def gcfsr_train_input(hq: Tensor, factors: Sequence[int]) -> Tensor:
    """Training input of GCFSR at full size [N, 3, H, W] in [0, 1]: down, up, then one rounding to 8 bits.

    `factors` has one entry an image. Images of one factor go through the matrices together.
    """
    done: dict[int, Tensor] = {}
    for factor in sorted(set(factors)):
        check_factor(factor)
        rows = [i for i, f in enumerate(factors) if f == factor]
        # single images are taken and put together: a list of rows would be copied to the device, which waits for it
        some = eight_bit(down_up(torch.stack([hq[i] for i in rows]), factor))
        done |= dict(zip(rows, some, strict=True))
    return torch.stack([done[i] for i in range(len(hq))])


def gcfsr_test_small(hq: Tensor, factor: int) -> Tensor:
    """The stored 8-bit test image, 1/factor of the size of [N, 3, H, W] in [0, 1]."""
    check_factor(factor)
    return eight_bit(imresize(hq, 1 / factor))


def gcfsr_test_input(small: Tensor, factor: int) -> Tensor:
    """What GCFSR sees at test time: the stored 8-bit image enlarged and rounded AGAIN (training rounds only once).

    [N, 3, h, w] in [0, 1] -> [N, 3, factor h, factor w]. Raises ConfigError for a factor outside GCFSR_RANGE.
    """
    check_factor(factor)
    return eight_bit(imresize(small, factor))
