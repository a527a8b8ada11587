"""Blur kernels of the second-order degradation, filtering by them, and unsharp-mask sharpening.

Formulas: Real-ESRGAN (Wang et al. 2021), section 3 and its training code; symbols as in the paper.
Kernels are computed in float64 for the whole batch at once, on a canvas as large as the largest kernel.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
USM_RADIUS = 51  # 50 in the published options, made odd
USM_THRESHOLD = 10.0  # of 255


def offsets(canvas: int) -> Tensor:
    """Integer distances from the centre pixel [canvas], float64."""
    return torch.arange(canvas, dtype=torch.float64) - (canvas - 1) / 2


def mahalanobis(sigma_x: Tensor, sigma_y: Tensor, theta: Tensor, canvas: int) -> Tensor:
    """q = p^T S^-1 p with S = R(theta) diag(sigma_x^2, sigma_y^2) R(theta)^T, p = (column, row) -> [B, K, K]."""
    row, col = torch.meshgrid(offsets(canvas), offsets(canvas), indexing="ij")
    cos, sin = (f(theta).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    along, across = cos * col + sin * row, cos * row - sin * col
    return (along / sigma_x.view(-1, 1, 1)) ** 2 + (across / sigma_y.view(-1, 1, 1)) ** 2


def normalised(values: Tensor, size: Tensor) -> Tensor:
    """Cut each kernel [B, K, K] to its own odd size [B], zero outside, and divide it by its sum."""
    inside = offsets(values.shape[-1]).abs() <= (size.view(-1, 1) - 1) / 2
    values = values * inside.unsqueeze(1) * inside.unsqueeze(2)
    return values / values.sum((1, 2), keepdim=True)


def gaussian_kernels(
    kind: Tensor, size: Tensor, sigma_x: Tensor, sigma_y: Tensor, theta: Tensor, beta: Tensor, canvas: int
) -> Tensor:
    """Kernels of the six Gaussian kinds [B, canvas, canvas], float64, zero-padded around their size.

    All arguments are [B]: `kind` indexes KINDS; sigmas in pixels; theta in radians (ignored by the iso kinds, as is
    sigma_y); beta is the exponent of the generalised and plateau kinds.
    Gaussian exp(-q/2), generalised exp(-q^beta/2), plateau 1/(1 + q^beta).
    """
    iso, shape = kind % 2 == 0, (kind // 2).view(-1, 1, 1)
    q = mahalanobis(sigma_x, torch.where(iso, sigma_x, sigma_y), torch.where(iso, 0.0, theta), canvas)
    q = q ** torch.where(shape == 0, 1.0, beta.view(-1, 1, 1))
    return normalised(torch.where(shape == 2, 1 / (1 + q), torch.exp(-q / 2)), size)


def bessel_j1(z: Tensor) -> Tensor:
    """J1(z) for |z| < 90 to 1e-14: the mean of cos(t - z sin t) over t in [0, pi], by the trapezoidal rule.

    Element by element, float64 [...]. `torch.special.bessel_j1` is only right to 5e-7, also in float64.
    """
    t = torch.linspace(0, math.pi, 65, dtype=torch.float64)
    values = torch.cos(t - z.unsqueeze(-1) * torch.sin(t))
    return (values.sum(-1) - (values[..., 0] + values[..., -1]) / 2) / 64


@functools.lru_cache(maxsize=8)
def distinct_radii(canvas: int) -> tuple[Tensor, Tensor]:
    """The different distances from the centre, without 0 [R], and where each lies [canvas, canvas] (0 = the centre)."""
    squares, place = torch.unique(offsets(canvas).view(-1, 1) ** 2 + offsets(canvas) ** 2, return_inverse=True)
    return squares[1:].sqrt(), place


def sinc_kernels(cutoff: Tensor, size: Tensor, canvas: int) -> Tensor:
    """Circular low-pass filters [B, K, K]: w J1(w r) / (2 pi r), at the centre w^2 / (4 pi); w in rad/pixel."""
    radii, place = distinct_radii(canvas)
    w = cutoff.view(-1, 1)
    values = torch.cat([w**2 / (4 * math.pi), w * bessel_j1(w * radii) / (2 * math.pi * radii)], 1)
    return normalised(values[:, place], size)


def identity_kernel(canvas: int) -> Tensor:
    """A kernel that changes nothing [canvas, canvas]."""
    kernel = torch.zeros(canvas, canvas, dtype=torch.float64)
    kernel[canvas // 2, canvas // 2] = 1
    return kernel


@functools.lru_cache(maxsize=4096)
def fast_length(n: int) -> int:
    """The smallest even length >= n whose prime factors are 2, 3 and 5: such transforms are quick."""
    n += n % 2
    rest = n
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return n if rest == 1 else fast_length(n + 2)


def filter2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Cross-correlate [B, C, H, W] with kernels [B or 1, K, K], the same for all channels, reflecting at the border.

    By FFT: for 21 x 21 taps this takes half the time of the grouped convolution, for 51 x 51 a thirtieth, and no TF32
    switch touches it. H and W must exceed K // 2. On a CPU one image at a time: its spectrum then stays in the cache.
    """
    height, width = x.shape[-2:]
    radius = kernel.shape[-1] // 2
    size = (fast_length(height + 2 * radius), fast_length(width + 2 * radius))
    response = torch.fft.rfft2(kernel.to(x.device, x.dtype, non_blocking=True), s=size).conj_physical().unsqueeze(1)
    if x.is_cuda:
        return correlate(x, response, size, radius)
    pieces = zip(x.split(1), response.expand(len(x), -1, -1, -1).split(1), strict=True)
    return torch.cat([correlate(image, r, size, radius) for image, r in pieces])


def correlate(x: Tensor, response: Tensor, size: tuple[int, int], radius: int) -> Tensor:
    """Multiply the spectrum of the reflected images by the conjugate spectrum of the kernels; keep the valid part.

    x [B, C, H, W], response [B or 1, 1, h, w // 2 + 1] for transforms of `size` (h, w) -> [B, C, H, W].
    """
    height, width = x.shape[-2:]
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    spectrum = torch.fft.fft(torch.fft.rfft(padded, n=size[1]), n=size[0], dim=-2).mul_(response)
    rows = torch.fft.ifft(spectrum, dim=-2)[..., :height, :]
    return torch.fft.irfft(rows, n=size[1])[..., :width]


def gaussian_row(size: int) -> Tensor:
    """One row of the separable Gaussian with OpenCV's automatic sigma, 0.3 ((size - 1) / 2 - 1) + 0.8 -> [size]."""
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    row = torch.exp(-(offsets(size) ** 2) / (2 * sigma**2))
    return row / row.sum()


@functools.lru_cache(maxsize=8)
def usm_kernel(device: torch.device) -> Tensor:
    """The Gaussian of the unsharp mask, [1, USM_RADIUS, USM_RADIUS] float32."""
    row = gaussian_row(USM_RADIUS)
    return torch.outer(row, row).float().unsqueeze(0).to(device)


def sharpen(x: Tensor, weight: float = 0.5) -> Tensor:
    """Unsharp mask of images [N, C, H, W] in [0, 1], H and W > 25; the published `x_gt_usm`.

    B = blur(I), R = I - B, soft = blur(|R| * 255 > 10); result soft * clip(I + weight R, 0, 1) + (1 - soft) I.
    """
    kernel = usm_kernel(x.device)
    residual = x - filter2d(x, kernel)
    soft = filter2d((residual.abs() * 255 > USM_THRESHOLD).to(x.dtype), kernel)
    sharp = (x + weight * residual).clamp_(0, 1)
    return torch.lerp(x, sharp, soft)
