"""Settings of the second-order degradation. Imports nothing, so that a configuration is checked without torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DegradationOptions:
    """How training images are made worse. Defaults are those of Real-ESRGAN; `1` and `2` are the two orders."""

    decisions: Literal["ghost", "sample"] = "ghost"
    """Who shares resize, noise kind, order and crop: a whole ghost (published) or nobody (varied without a pool)."""
    sharpen: bool = True
    """Degrade the unsharp-masked image instead of the raw one."""
    source_size: int = 400
    """Pixels of the side that is degraded; smaller images are reflected up to it."""
    crop_size: int = 256
    """Pixels of the side of the high-quality crop taken at the end."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip, per image."""
    pool_size: int = 180
    """Pairs that wait in each ghost's pool; a multiple of ghost_batch; 0 = no pool."""

    kernel_size: tuple[int, int] = (7, 21)
    """Smallest and largest blur kernel, pixels, odd; all odd sizes between are equally likely."""
    kind_prob: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Weights of iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso."""
    sinc_prob1: float = 0.1
    sinc_prob2: float = 0.1
    """Probability of a sinc kernel in place of a Gaussian one."""
    final_sinc_prob: float = 0.8
    """Probability that the last filter is a sinc and not the identity."""
    sigma1: tuple[float, float] = (0.2, 3.0)
    sigma2: tuple[float, float] = (0.2, 1.5)
    """Range of the Gaussian widths, pixels."""
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    """Range of the exponent: half of the draws lie below 1, half above."""
    second_blur_prob: float = 0.8
    """Probability that the second order blurs at all."""

    resize_prob1: tuple[float, float, float] = (0.2, 0.7, 0.1)
    resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3)
    """Weights of up, down, keep."""
    resize_range1: tuple[float, float] = (0.15, 1.5)
    resize_range2: tuple[float, float] = (0.3, 1.2)
    """Smallest factor of down and largest of up; the second order counts from the final low-quality size."""
    gaussian_prob1: float = 0.5
    gaussian_prob2: float = 0.5
    """Probability of Gaussian noise; otherwise it is Poisson."""
    noise_sigma1: tuple[float, float] = (1.0, 30.0)
    noise_sigma2: tuple[float, float] = (1.0, 25.0)
    """Range of the Gaussian noise, 1/255."""
    poisson_scale1: tuple[float, float] = (0.05, 3.0)
    poisson_scale2: tuple[float, float] = (0.05, 2.5)
    """Range of the factor on Poisson noise."""
    gray_prob1: float = 0.4
    gray_prob2: float = 0.4
    """Probability of one noise map for all channels."""
    jpeg_quality1: tuple[float, float] = (30.0, 95.0)
    jpeg_quality2: tuple[float, float] = (30.0, 95.0)
    """Range of the JPEG quality, inside (0, 100)."""
