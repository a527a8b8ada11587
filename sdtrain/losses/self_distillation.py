"""L_SD of SD-GAN, Eq. (2): the distance between what a network and its own average make of the same input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
PairedAugment = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


def self_distillation(
    fake: Tensor, fake_ema: Tensor, distance: Distance, T: PairedAugment | None = None, draws: Any = None
) -> Tensor:
    """L_SD(T(fake), T(fake_ema)), a mean over samples. Images [N, 3, H, W] in [-1, 1]; T is one draw for both."""
    if T is not None:
        fake, fake_ema = T(fake, fake_ema.detach(), draws.sub("T"))
    return distance(fake, fake_ema.detach()).mean()


def lazy_weight(alpha: float, every: int, step: int) -> float:
    """The weight of L_SD in a step: alpha on average, all of it in every `every`-th step."""
    return 0.0 if step % every else alpha * every


def num_compared(share: float, ghost_batch: int) -> int:
    """How many samples of a ghost L_SD is taken over. They are like any others, so its mean stays what it is."""
    return max(round(share * ghost_batch), 1)
