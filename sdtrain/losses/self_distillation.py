"""L_SD of SD-GAN, Eq. (2): the distance between what a network and its own average make of the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sdtrain.constants import to_imagenet

Distance = Callable[[Tensor, Tensor], Tensor]
PairedAugment = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]

SEEN: dict[str, Callable[[Tensor], Tensor]] = {"imagenet": to_imagenet, "doubled": lambda x: 2 * x - 1}


def given(images: str, distance: Distance) -> Distance:
    """`distance` of images [N, 3, H, W] in [-1, 1], shown to it as the authors' public code does; "plain": as they are.

    Fact sheet of the metrics, section 8: LPIPS got StyleNAT's ImageNet-normalised images, and at first 2x - 1 of
    ProjectedGAN's.
    """
    if images == "plain":
        return distance
    seen = SEEN[images]
    return lambda x, y: distance(seen(x), seen(y))


def self_distillation(
    fake: Tensor, fake_ema: Tensor, distance: Distance, T: PairedAugment | None = None, draws: Any = None
) -> Tensor:
    """L_SD(T(fake), T(fake_ema)), a mean over samples. Images [N, 3, H, W] in [-1, 1]; T is one draw for both."""
    if T is not None:
        fake, fake_ema = T(fake, fake_ema.detach(), draws.sub("T"))
    return distance(fake, fake_ema.detach()).mean()


@contextmanager
def as_teacher(precision: str | None, device: torch.device) -> Iterator[None]:
    """Without gradients, and in arithmetic of the teacher's own: "fp32" or "bf16"; None = in that of the student."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if precision is not None:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"))
        yield


def lazy_weight(alpha: float, every: int, step: int) -> float:
    """The weight of L_SD in a step: alpha on average, all of it in every `every`-th step."""
    return 0.0 if step % every else alpha * every


def num_compared(share: float, ghost_batch: int) -> int:
    """How many samples of a ghost L_SD is taken over. They are like any others, so its mean stays what it is."""
    return max(round(share * ghost_batch), 1)
