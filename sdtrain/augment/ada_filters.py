"""Wavelet filters of adaptive discriminator augmentation (Karras et al. 2020, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor

# least asymmetric Daubechies low-pass filters (symlets) with 6 and 2 vanishing moments
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)


def geometry_filter() -> Tensor:
    """Low-pass of the geometric resampling, [12], sum one."""
    taps = torch.tensor(SYM6, dtype=torch.float64)
    return (taps / taps.sum()).float()


def filter_bank(octaves: int = 3) -> Tensor:
    """Zero-phase filters of four frequency bands, low to high, that add up to the identity: [4, 43] for 3 octaves.

    Low L and high H are autocorrelations of the wavelet pair, so L + H = 1. Each octave splits the low band again:
    H(z), L(z) H(z^2), L(z) L(z^2) H(z^4), and what is left, L(z) L(z^2) L(z^4).
    """
    low = torch.tensor(SYM2, dtype=torch.float64)
    high = low * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    low, high = _autocorrelation(low), _autocorrelation(high)
    bands, passed = [], torch.ones(1, dtype=torch.float64)
    for octave in range(octaves):
        bands.append(_convolve(passed, _spread(high, 2**octave)))
        passed = _convolve(passed, _spread(low, 2**octave))
    bands.append(passed)
    return torch.stack([_centred(band, len(passed)) for band in reversed(bands)]).float()


def _autocorrelation(taps: Tensor) -> Tensor:
    return _convolve(taps, taps.flip(0)) / 2


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.conv1d(a[None, None], b.flip(0)[None, None], padding=len(b) - 1)[0, 0]


def _spread(taps: Tensor, factor: int) -> Tensor:
    """taps(z) -> taps(z^factor)."""
    spread = taps.new_zeros((len(taps) - 1) * factor + 1)
    spread[::factor] = taps
    return spread


def _centred(taps: Tensor, length: int) -> Tensor:
    margin = (length - len(taps)) // 2
    return torch.nn.functional.pad(taps, (margin, margin))
