"""Adversarial losses: what D and G minimise as functions of logits of any shape. Means run over all logits.

D's two terms are kept apart because they are reported apart and because official code sends them backward one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def hinge_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(mean relu(1 - D(real)), mean relu(1 + D(fake))); Lim & Ye 2017, ProjectedGAN."""
    return F.relu(1 - real_logits).mean(), F.relu(1 + fake_logits).mean()


def hinge_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-mean D(fake)."""
    return -fake_logits.mean()


def logistic_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(mean -log sigmoid(D(real)), mean -log(1 - sigmoid(D(fake)))); Goodfellow et al. 2014."""
    return F.softplus(-real_logits).mean(), F.softplus(fake_logits).mean()


def logistic_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Non-saturating: mean -log sigmoid(D(fake)); Goodfellow et al. 2014, StyleGAN2."""
    return F.softplus(-fake_logits).mean()


def least_squares_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D(real) - 1)^2, mean D(fake)^2) without the factor 1/2; Mao et al. 2017, Eq. 9."""
    return (real_logits - 1).square().mean(), fake_logits.square().mean()


def least_squares_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """mean (D(fake) - 1)^2."""
    return (fake_logits - 1).square().mean()


def wasserstein_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(-mean D(real), mean D(fake)); Arjovsky et al. 2017, Eq. 2. Needs a Lipschitz constraint elsewhere."""
    return -real_logits.mean(), fake_logits.mean()


def wasserstein_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-mean D(fake)."""
    return -fake_logits.mean()


class Adversarial(NamedTuple):
    """One game. Both sides may see real and fake logits of the same number of samples."""

    d: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(real_logits, fake_logits) -> (loss on real, loss on fake), whose sum D minimises."""
    g: Callable[[Tensor, Tensor | None], Tensor]
    """(fake_logits, real_logits) -> what G minimises."""
    relativistic: bool = False
    """G's side looks at real logits; elsewhere they are not computed and None is given."""


ADVERSARIAL: dict[str, Adversarial] = {
    "hinge": Adversarial(hinge_d, hinge_g),
    "logistic": Adversarial(logistic_d, logistic_g),
    "least-squares": Adversarial(least_squares_d, least_squares_g),
    "wasserstein": Adversarial(wasserstein_d, wasserstein_g),
}


def gradient_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """mean over samples of ||grad_x D(x)||^2, differentiable again: R1 on real images, R2 on generated ones.

    (Mescheder et al. 2018, Eq. 9, without gamma/2.) images [N, C, H, W] must require grad and logits [N, K] or [N] come
    from them; D(x) is the mean of a sample's logits.
    Samples must not influence each other's logits, or their cross terms count too (as in the official code).
    """
    scores = logits.flatten(1).mean(1) if logits.ndim > 1 else logits
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
