"""Multi-scale SSIM (Wang et al. 2003) as L_SD of the SD-GAN ablation (Fig. 5): 1 - MS-SSIM on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.precision import full_precision

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def min_side(window: int, num_scales: int) -> int:
    """Smallest image side for which the window still fits into the coarsest scale with a pixel to spare."""
    return (window - 1) * 2 ** (num_scales - 1) + 1


def default_window(side: int) -> int:
    """11, the usual window, where five scales of it fit; 7 below that (the authors' choice at 128 px)."""
    return 11 if side >= min_side(11, len(SCALE_WEIGHTS)) else 7


def ms_ssim(x: Tensor, y: Tensor, *, window: int | None = None, weights: Sequence[float] = SCALE_WEIGHTS) -> Tensor:
    """MS-SSIM of each pair: [N, C, H, W] in [0, 1] twice -> [N], fp32; mean over channels; 1 for equal images.

    `window` is the odd side of the Gaussian (None: `default_window`); one scale for every entry of `weights`. Contrast
    terms below zero count as zero, with a zero gradient instead of the NaN of pow at zero. Raises ConfigError when the
    images are too small for window and scales.
    """
    window = window or default_window(min(x.shape[2:]))
    _check(x, window, len(weights))
    with full_precision(x.device):
        x, y = x.float(), y.float()
        taps = gaussian(window, x.device)
        value = torch.ones(x.shape[:2], device=x.device)
        for scale, weight in enumerate(weights):
            similarity, contrast = ssim_terms(x, y, taps)
            last = scale == len(weights) - 1
            value = value * positive_power(similarity if last else contrast, weight)
            if not last:
                x, y = halve(x), halve(y)
        return value.mean(1)


def ms_ssim_loss(
    x: Tensor, target: Tensor, *, window: int | None = None, weights: Sequence[float] = SCALE_WEIGHTS
) -> Tensor:
    """1 - MS-SSIM for images in [-1, 1]: [N, C, H, W] twice -> [N]. The gradient reaches `x` alone."""
    return 1 - ms_ssim((x + 1) / 2, (target.detach() + 1) / 2, window=window, weights=weights)


def ssim_terms(x: Tensor, y: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM = l * cs and its contrast-structure part cs, each the mean over the valid region: two [N, C]."""
    c1, c2 = K1**2, K2**2
    mu_x, mu_y = blur(x, taps), blur(y, taps)
    var_x = blur(x * x, taps) - mu_x**2
    var_y = blur(y * y, taps) - mu_y**2
    cov = blur(x * y, taps) - mu_x * mu_y
    contrast = (2 * cov + c2) / (var_x + var_y + c2)
    luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
    return (luminance * contrast).mean((2, 3)), contrast.mean((2, 3))


def gaussian(window: int, device: torch.device | str = "cpu") -> Tensor:
    """Normalised Gaussian of sigma 1.5, [window]."""
    at = torch.arange(window, dtype=torch.float32, device=device) - window // 2
    taps = torch.exp(-(at**2) / (2 * SIGMA**2))
    return taps / taps.sum()


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """Separable filter of every channel, valid region only: [N, C, H, W], taps [K] -> [N, C, H - K + 1, W - K + 1]."""
    channels = x.shape[1]
    kernel = taps.expand(channels, 1, -1)
    return F.conv2d(F.conv2d(x, kernel.unsqueeze(3), groups=channels), kernel.unsqueeze(2), groups=channels)


def halve(x: Tensor) -> Tensor:
    """Average pool by 2: [N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)].

    Odd sides get a line of zeros on both ends, as pytorch-msssim pads them.
    """
    return F.avg_pool2d(x, 2, padding=(x.shape[2] % 2, x.shape[3] % 2))


def positive_power(base: Tensor, exponent: float) -> Tensor:
    """max(base, 0) ** exponent, element by element [...], with a zero gradient where base <= 0."""
    alive = base > 0
    return torch.where(alive, torch.where(alive, base, 1.0) ** exponent, 0.0)


def _check(x: Tensor, window: int, num_scales: int) -> None:
    side, need = min(x.shape[2:]), min_side(window, num_scales)
    if window % 2 == 0 or window < 3:
        raise ConfigError(f"The MS-SSIM window must be odd and at least 3, got {window}.")
    if side < need:
        fitting = [w for w in (11, 7, 3) if min_side(w, num_scales) <= side]
        cure = f"use window {fitting[0]}" if fitting else "use fewer scales"
        raise ConfigError(
            f"MS-SSIM with window {window} and {num_scales} scales needs images of at least {need} px, "
            f"got {side}; {cure}."
        )
