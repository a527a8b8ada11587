"""The relativistic pairing loss (Jolicoeur-Martineau 2019; Huang et al. 2024, R3GAN, Eq. 2): real i against fake i."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def relativistic_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean over samples of softplus(-(D(real_i) - D(fake_i))); logits [N, ...] of equal shapes -> scalar.

    total = 0
    for i in range(N):
        total += log(1 + exp(fake_logits[i] - real_logits[i]))
    return total / N

    Real i meets fake i alone, so they must share their label and the order of both batches matters.
    """
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_g(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """mean over samples of softplus(-(D(fake_i) - D(real_i))); logits [N, ...] of equal shapes -> scalar.

    total = 0
    for i in range(N):
        total += log(1 + exp(real_logits[i] - fake_logits[i]))
    return total / N

    The mirror of `relativistic_d`: the real logits are constants here, or their gradient is not for the generator.
    """
    return F.softplus(real_logits - fake_logits).mean()
