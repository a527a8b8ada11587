"""Kernel distance (Binkowski et al. 2018): unbiased MMD with the cubic kernel, averaged over subsets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NUM_SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # torch-fidelity's, so that both draw the same subsets


def kid(
    real: Tensor, fake: Tensor, *, num_subsets: int = NUM_SUBSETS, subset_size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0) over subsets of feature rows [n, d]; subsets shrink to the smaller set."""
    size = min(subset_size, len(real), len(fake))
    picks = np.random.RandomState(SEED)
    values = []
    for _ in range(num_subsets):
        some_fake = fake[torch.from_numpy(picks.choice(len(fake), size, replace=False)).to(fake.device)]
        some_real = real[torch.from_numpy(picks.choice(len(real), size, replace=False)).to(real.device)]
        values.append(mmd2(some_fake.double(), some_real.double()))
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / d + 1)^3 for all pairs of rows [n, d] and [m, d] -> [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy of two sets of m rows [m, d], a scalar."""
    m = len(x)
    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return within / (m * (m - 1)) - 2 * kernel(x, y).mean()
