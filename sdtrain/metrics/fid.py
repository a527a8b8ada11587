"""Frechet distance of two Gaussians: FID (Heusel et al. 2017) and, with random features, rFID."""

from __future__ import annotations

import torch
from torch import Tensor

from sdtrain.metrics.sums import FeatureSums


def frechet(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)) of means [d] and covariances [d, d], float64.

    The cross term is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no
    complex square root, no jitter on the diagonal, negative rounding errors count as zero.
    """
    gap = (mean_1 - mean_2).square().sum() + torch.trace(cov_1) + torch.trace(cov_2)
    return (gap - 2 * cross_term(cov_1, cov_2)).item()


def cross_term(cov_1: Tensor, cov_2: Tensor) -> Tensor:
    """tr((C1 C2)^(1/2)) of two covariances [d, d], a scalar."""
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ cov_2 @ root
    return torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()


def fid_of_sums(real: FeatureSums, fake: FeatureSums, ddof: int = 1) -> float:
    """FID of accumulated features; ddof 1 equals torch-fidelity, 0 the StyleGAN2-ADA code."""
    return frechet(*fake.moments(ddof), *real.moments(ddof))


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
