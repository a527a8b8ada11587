"""PSNR and SSIM as super-resolution papers report them (BasicSR's definitions), for batches of 8-bit images.

Images are RGB, uint8 or whole numbers 0..255 as float, [N, 3, H, W]. All is float64 after the luminance; the border
is cropped first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.errors import DataError

# 16 + (65.481 R + 128.553 G + 24.966 B) / 255: ITU-R BT.601 luminance of 0..255 values, not rounded
LUMA = (65.481, 128.553, 24.966)
PEAK = 255.0


def to_uint8(images: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Clamp float images [...] in [low, high] and round them to 8 bits, as they are when saved."""
    return ((images.float().clamp(low, high) - low) * (PEAK / (high - low))).round().to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """Y of RGB 0..255: [N, 3, H, W] -> [N, 1, H, W], 16..235, computed in float32 as upstream does."""
    # unit values first: the same float32 roundings as upstream's
    unit = images.float() / PEAK
    weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    return (unit * weights).sum(1, keepdim=True) + 16.0


def _prepare(x: Tensor, y: Tensor, crop_border: int, luma: bool) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape:
        raise DataError(f"images of sizes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared pixel by pixel")
    if crop_border:
        if min(x.shape[-2:]) <= 2 * crop_border:
            raise DataError(f"a border of {crop_border} px leaves nothing of images of {tuple(x.shape[-2:])}")
        inner = slice(crop_border, -crop_border)
        x, y = x[..., inner, inner], y[..., inner, inner]
    if luma:
        x, y = luminance(x), luminance(y)
    return x.double(), y.double()


def psnr(x: Tensor, y: Tensor, *, crop_border: int = 0, luma: bool = False) -> Tensor:
    """10 log10(255^2 / mse) of each pair: [N, C, H, W] in 0..255 twice -> [N], float64; infinite where equal.

    Raises DataError for pairs of different sizes, or a border that leaves nothing.
    """
    x, y = _prepare(x, y, crop_border, luma)
    mse = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(PEAK**2 / mse)


def psnr_y(x: Tensor, y: Tensor, *, crop_border: int = 0) -> Tensor:
    """PSNR of the luminance, [N, 3, H, W] in 0..255 twice -> [N]; crop_border is the scale by custom."""
    return psnr(x, y, crop_border=crop_border, luma=True)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of float64 0..255 images: 11x11 Gaussian (sigma 1.5), valid region, mean over pixels and channels; [N]."""
    if min(x.shape[-2:]) < 11:
        raise DataError(f"SSIM needs images of at least 11 px after the border is cropped, got {tuple(x.shape[-2:])}")
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    at = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    taps = torch.exp(-at.square() / (2 * 1.5**2))
    taps = taps / taps.sum()

    def blur(t: Tensor) -> Tensor:
        """[N, C, H, W] -> [N C, 1, H - 10, W - 10]."""
        flat = t.reshape(-1, 1, *t.shape[-2:])
        return F.conv2d(F.conv2d(flat, taps.view(1, 1, 11, 1)), taps.view(1, 1, 1, 11))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.reshape(len(x), -1).mean(1)


def ssim(x: Tensor, y: Tensor, *, crop_border: int = 0, luma: bool = False) -> Tensor:
    """Structural similarity of pairs: [N, C, H, W] in 0..255 twice -> [N], float64. Raises DataError below 11 px."""
    return _ssim(*_prepare(x, y, crop_border, luma))


def ssim_y(x: Tensor, y: Tensor, *, crop_border: int = 0) -> Tensor:
    """SSIM of the luminance: [N, 3, H, W] in 0..255 twice -> [N]."""
    return ssim(x, y, crop_border=crop_border, luma=True)
