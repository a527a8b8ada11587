"""Frechet distance of two Gaussians: FID (Heusel et al. 2017) and, with other features, rFID, FD-DINOv2, FD-CLIP.

The arithmetic is torch-fidelity's; ours is that it takes sums, which ranks can add up, and both kinds of covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdtrain.metrics.sums import FeatureSums


def frechet(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)) of means [d] and covariances [d, d], float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pairs = ((mean_1, cov_1), (mean_2, cov_2))
    stats = [{"mu": mean.double().cpu().numpy(), "sigma": cov.double().cpu().numpy()} for mean, cov in pairs]
    return float(fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID])


def fid_of_sums(real: FeatureSums, fake: FeatureSums, ddof: int = 1) -> float:
    """FID of accumulated features; ddof 1 equals torch-fidelity, 0 the StyleGAN2-ADA code."""
    return frechet(*fake.moments(ddof), *real.moments(ddof))


def both_fids(real: FeatureSums, fake: FeatureSums) -> tuple[float, float]:
    """`fid_of_sums` with ddof 1 and 0, for the price of one: the root of a multiple is a multiple of the root."""
    unbiased = fid_of_sums(real, fake, 1)
    (mean_r, cov_r), (mean_f, cov_f) = real.moments(1), fake.moments(1)
    gap, spread_r, spread_f = (mean_r - mean_f).square().sum(), torch.trace(cov_r), torch.trace(cov_f)
    cross = (gap + spread_r + spread_f - unbiased) / 2
    less_r, less_f = 1 - 1 / real.count, 1 - 1 / fake.count
    biased = gap + less_r * spread_r + less_f * spread_f - 2 * (less_r * less_f) ** 0.5 * cross
    return unbiased, biased.item()


def fid_of_features(real: Tensor, fake: Tensor, ddof: int = 1) -> float:
    """FID of feature rows [n, d]; with n below d through the nuclear norm, which needs no d x d matrix."""
    if max(len(real), len(fake)) >= real.shape[1]:
        sums = [FeatureSums(real.shape[1], rows.device).add(rows) for rows in (real, fake)]
        return fid_of_sums(sums[0], sums[1], ddof)
    (mean_r, spread_r), (mean_f, spread_f) = centred(real, ddof), centred(fake, ddof)
    gap = (mean_r - mean_f).square().sum() + spread_r.square().sum() + spread_f.square().sum()
    return (gap - 2 * torch.linalg.svdvals(spread_r @ spread_f.T).sum()).item()


def centred(features: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean [d] and A [n, d] of rows, A^T A = covariance: tr((C1 C2)^(1/2)) is then the nuclear norm of A1 A2^T."""
    rows = features.double()
    mean = rows.mean(0)
    return mean, (rows - mean) / (len(rows) - ddof) ** 0.5
