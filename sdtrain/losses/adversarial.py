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
    """(mean relu(1 - D(real)), mean relu(1 + D(fake))), two scalars; Lim & Ye 2017, ProjectedGAN."""
    return F.relu(1 - real_logits).mean(), F.relu(1 + fake_logits).mean()


def hinge_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-mean D(fake), a scalar."""
    return -fake_logits.mean()


def logistic_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(mean -log sigmoid(D(real)), mean -log(1 - sigmoid(D(fake)))), two scalars; Goodfellow et al. 2014."""
    return F.softplus(-real_logits).mean(), F.softplus(fake_logits).mean()


def logistic_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """Non-saturating: mean -log sigmoid(D(fake)), a scalar; Goodfellow et al. 2014, StyleGAN2."""
    return F.softplus(-fake_logits).mean()


def least_squares_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D(real) - 1)^2, mean D(fake)^2), two scalars without the factor 1/2; Mao et al. 2017, Eq. 9."""
    return (real_logits - 1).square().mean(), fake_logits.square().mean()


def least_squares_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """mean (D(fake) - 1)^2, a scalar."""
    return (fake_logits - 1).square().mean()


def wasserstein_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(-mean D(real), mean D(fake)), two scalars; Arjovsky et al. 2017, Eq. 2.

    Needs a Lipschitz constraint elsewhere.
    """
    return -real_logits.mean(), fake_logits.mean()


def wasserstein_g(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-mean D(fake), a scalar."""
    return -fake_logits.mean()


def relativistic_d(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor]:
    """mean over samples of softplus(-(D(real_i) - D(fake_i))); Jolicoeur-Martineau 2019, R3GAN (Huang et al. 2024).

        for i in range(N): total += log(1 + exp(fake_logits[i] - real_logits[i]))

    Real i meets fake i alone, so they must share their label and the order of both batches matters.
    Logits of one shape -> a scalar, in a tuple of one.
    """
    return (F.softplus(fake_logits - real_logits).mean(),)


def relativistic_g(fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
    """mean over samples of softplus(-(D(fake_i) - D(real_i))): the mirror of `relativistic_d`.

    Logits of one shape -> a scalar.
    """
    assert real_logits is not None
    return F.softplus(real_logits - fake_logits).mean()


class Adversarial(NamedTuple):
    """One game. Both sides may see real and fake logits of the same number of samples."""

    d: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    """(real_logits, fake_logits) -> terms whose sum D minimises."""
    g: Callable[[Tensor, Tensor | None], Tensor]
    """(fake_logits, real_logits) -> what G minimises."""
    parts: tuple[str, ...] = ("real", "fake")
    """What D's terms are about, for the log."""
    relativistic: bool = False
    """G's side looks at real logits; elsewhere they are not computed and None is given."""


ADVERSARIAL: dict[str, Adversarial] = {
    "hinge": Adversarial(hinge_d, hinge_g),
    "logistic": Adversarial(logistic_d, logistic_g),
    "least-squares": Adversarial(least_squares_d, least_squares_g),
    "wasserstein": Adversarial(wasserstein_d, wasserstein_g),
    "relativistic": Adversarial(relativistic_d, relativistic_g, parts=("pair",), relativistic=True),
}


def d_loss(game: Adversarial, real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What D minimises, a scalar, and its terms by their names in the log (D/real, D/fake, or D/pair)."""
    parts = game.d(real_logits, fake_logits)
    terms = {f"D/{name}": term for name, term in zip(game.parts, parts, strict=True)}
    return torch.stack(parts).sum(), terms


def gradient_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """mean over samples of ||grad_x D(x)||^2, differentiable again: R1 on real images, R2 on generated ones.

    (Mescheder et al. 2018, Eq. 9, without gamma/2.) images [N, C, H, W] must require grad and logits [N, K] or [N] come
    from them; D(x) is the mean of a sample's logits.
    Samples must not influence each other's logits, or their cross terms count too (as in the official code).
    """
    scores = logits.flatten(1).mean(1) if logits.ndim > 1 else logits
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
