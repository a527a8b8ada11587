"""JPEG compression as arithmetic on the training device: what quantisation does to an image, without a bit stream.

ITU-T T.81 baseline with 4:2:0 chroma, as simulated in Real-ESRGAN's training code. All 64 basis functions of a block
are one matrix, so that the transform is a matrix product over all blocks of the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.data.degrade.exact import matmul_exact

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # 99 elsewhere
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@functools.lru_cache(maxsize=32)
def matrix(name: str, device: torch.device) -> Tensor:
    """A constant of the format on a device: `dct` [64, 64], `luminance` [64], `chrominance` [64], `ycbcr`, `rgb`."""
    build = {
        "dct": dct_matrix,
        # the published simulator indexes the standard table by (column, row) frequency
        "luminance": lambda: torch.tensor(LUMINANCE).t().flatten(),
        "chrominance": lambda: F.pad(torch.tensor(CHROMINANCE), (0, 4, 0, 4), value=99).flatten(),
        "ycbcr": lambda: torch.tensor(TO_YCBCR) * 255,
        "rgb": lambda: torch.tensor(TO_RGB),
    }[name]
    return build().float().to(device)


def dct_matrix() -> Tensor:
    """The orthonormal 2-D DCT-II of an 8 x 8 block as [64 pixels, 64 coefficients]; its transpose inverts it."""
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos((2 * n.view(8, 1) + 1) * n * math.pi / 16) / 2
    basis[:, 0] /= math.sqrt(2)
    return torch.kron(basis, basis)


def quality_factor(quality: Tensor) -> Tensor:
    """Multiplier of the tables for quality [B] in (0, 100) -> [B]: 50/q below 50, else 2 - q/50."""
    return torch.where(quality < 50, 50 / quality, 2 - quality / 50)


def soft_round(x: Tensor) -> Tensor:
    """The differentiable stand-in for rounding (Shin and Song 2017): round(x) + (x - round(x))^3.

    Element by element: [...] -> the same shape.
    """
    whole = x.round()
    return whole + (x - whole) ** 3


def to_blocks(plane: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H/8, W/8, 64], row by row."""
    b, c, h, w = plane.shape
    return plane.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4).reshape(b, c, h // 8, w // 8, 64)


def from_blocks(blocks: Tensor) -> Tensor:
    """Inverse of `to_blocks`: [B, C, H/8, W/8, 64] -> [B, C, H, W]."""
    b, c, rows, cols, _ = blocks.shape
    return blocks.view(b, c, rows, cols, 8, 8).transpose(3, 4).reshape(b, c, rows * 8, cols * 8)


def quantised(plane: Tensor, table: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Round the DCT coefficients of [B, C, H, W] to multiples of `table` [B, 64] and come back."""
    dct = matrix("dct", plane.device)
    step = table.view(len(table), 1, 1, 1, 64)
    coefficients = rounding(matmul_exact(to_blocks(plane), dct) / step) * step
    return from_blocks(matmul_exact(coefficients, dct.t()))


def recolour(x: Tensor, name: str) -> Tensor:
    """[B, 3, H, W] under a `matrix`: `ycbcr` takes RGB in [0, 1] to Y in 0..255 and Cb, Cr about 0; `rgb` to 0..255."""
    return matmul_exact(matrix(name, x.device), x.flatten(2)).view(x.shape)


def jpeg(x: Tensor, quality: Tensor, rounding: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] after compression at `quality` [B] (real numbers in (0, 100)) -> the same shape.

    Any H and W: the image is zero-padded to a multiple of 16 and cut again, as published.
    """
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % 16, 0, -height % 16))
    factor = quality_factor(quality.to(x.device, x.dtype, non_blocking=True)).view(-1, 1)
    luma, chroma = recolour(x, "ycbcr").split((1, 2), 1)
    luma = quantised(luma - 128, factor * matrix("luminance", x.device), rounding) + 128
    chroma = quantised(F.avg_pool2d(chroma, 2), factor * matrix("chrominance", x.device), rounding)
    chroma = F.interpolate(chroma, scale_factor=2, mode="nearest")
    rgb = recolour(torch.cat([luma, chroma], 1), "rgb")[..., :height, :width]
    return rgb.clamp(0, 255).div_(255)
