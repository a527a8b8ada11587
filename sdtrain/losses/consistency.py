"""Balanced consistency regularisation (Zhao et al. 2021, "Improved Consistency Regularization for GANs", Eq. 1-2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def balanced_consistency(
    real: Tensor, real_aug: Tensor, fake: Tensor, fake_aug: Tensor, lambda_real: float = 10.0, lambda_fake: float = 10.0
) -> Tensor:
    """lambda_real mean (D(T(x)) - D(x))^2 + lambda_fake mean (D(T(G(z))) - D(G(z)))^2, a scalar.

    The arguments are logits of equal shape per pair; gradients flow through both sides. A weight of 0 drops its term.
    """
    terms = [(lambda_real, real_aug, real), (lambda_fake, fake_aug, fake)]
    return sum((weight * F.mse_loss(a, b) for weight, a, b in terms if weight), real.new_zeros(()))
