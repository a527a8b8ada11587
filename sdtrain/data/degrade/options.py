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
    keep_sharpened: bool = False
    """The high-quality half of a pair is the sharpened image (the L1-only stage) instead of the raw one."""
    source_size: int = 400
    """[pixels] Side that is degraded; smaller images are reflected up to it."""
    crop_size: int = 256
    """[pixels] Side of the high-quality crop taken at the end."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip, per image."""
    pool_size: int = 180
    """[pairs] Pairs that wait in each ghost's pool; a multiple of ghost_batch; 0 = no pool."""

    kernel_size: tuple[int, int] = (7, 21)
    """[pixels] Smallest and largest blur kernel, odd; all odd sizes between are equally likely."""
    kind_prob: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Weights of iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso."""
    sinc_prob1: float = 0.1
    """First order: probability of a sinc kernel in place of a Gaussian one."""
    sinc_prob2: float = 0.1
    """Second order: probability of a sinc kernel in place of a Gaussian one."""
    final_sinc_prob: float = 0.8
    """Probability that the last filter is a sinc and not the identity."""
    sigma1: tuple[float, float] = (0.2, 3.0)
    """[pixels] First order: range of the Gaussian widths."""
    sigma2: tuple[float, float] = (0.2, 1.5)
    """[pixels] Second order: range of the Gaussian widths."""
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    """Range of the exponent of generalized kernels: half of the draws lie below 1, half above."""
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    """Range of the exponent of plateau kernels: half of the draws lie below 1, half above."""
    second_blur_prob: float = 0.8
    """Probability that the second order blurs at all."""

    resize_prob1: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """First order: weights of up, down, keep."""
    resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3)
    """Second order: weights of up, down, keep."""
    resize_range1: tuple[float, float] = (0.15, 1.5)
    """First order: smallest factor of down and largest of up."""
    resize_range2: tuple[float, float] = (0.3, 1.2)
    """Second order: the same, counted from the final low-quality size."""
    gaussian_prob1: float = 0.5
    """First order: probability of Gaussian noise; otherwise it is Poisson."""
    gaussian_prob2: float = 0.5
    """Second order: probability of Gaussian noise; otherwise it is Poisson."""
    noise_sigma1: tuple[float, float] = (1.0, 30.0)
    """[1/255] First order: range of the Gaussian noise."""
    noise_sigma2: tuple[float, float] = (1.0, 25.0)
    """[1/255] Second order: range of the Gaussian noise."""
    poisson_scale1: tuple[float, float] = (0.05, 3.0)
    """First order: range of the factor on Poisson noise."""
    poisson_scale2: tuple[float, float] = (0.05, 2.5)
    """Second order: range of the factor on Poisson noise."""
    gray_prob1: float = 0.4
    """First order: probability of one noise map for all channels."""
    gray_prob2: float = 0.4
    """Second order: probability of one noise map for all channels."""
    jpeg_quality1: tuple[float, float] = (30.0, 95.0)
    """First order: range of the JPEG quality, inside (0, 100)."""
    jpeg_quality2: tuple[float, float] = (30.0, 95.0)
    """Second order: range of the JPEG quality, inside (0, 100)."""
