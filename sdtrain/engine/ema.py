"""The exponential moving average of a generator, Eq. (1) of the SD-GAN paper; it is also the teacher of Eq. (2)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import torch
from torch import nn

from sdtrain.config.options import Ema
from sdtrain.config.schedule import value_at


def ema_beta(half_life_img: float, rampup: float | None, seen_img: int, batch_size: int) -> float:
    """beta of Eq. (1) for one step of `batch_size` images (specs: beta = 0.5 ** (batch / half-life)).

    The half-life is in images and, while training is young, at most `rampup` times the images seen before this step, so
    that the first step copies G.
    """
    if rampup is not None:
        half_life_img = min(half_life_img, seen_img * rampup)
    return float(0.5 ** (batch_size / max(half_life_img, 1e-8)))  # the first step of a ramp-up would divide by 0


def beta_of(options: Ema, seen_img: int, batch_size: int) -> float:
    if options.decay is not None:
        return options.decay
    half_life_img = value_at(options.half_life_img, seen_img)
    return ema_beta(half_life_img, options.rampup, seen_img, batch_size)


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, beta: float) -> None:
    """theta_ema <- beta * theta_ema + (1 - beta) * theta, Eq. (1). Buffers (statistics, u, v, w_avg) are copied."""
    ours: list[torch.Tensor] = list(ema.parameters())
    theirs = net.parameters()
    torch._foreach_lerp_(ours, [p.to(o.dtype) for o, p in zip(ours, theirs)], 1.0 - beta)
    copy_all(list(ema.buffers()), list(net.buffers()))


@torch.no_grad()
def copy_all(to: Sequence[torch.Tensor], by: Sequence[torch.Tensor]) -> None:
    """Tensors [...] over others of the same shapes, with one call a data type."""
    for dtype in dict.fromkeys(t.dtype for t in to):
        pairs = [(t, s) for t, s in zip(to, by, strict=True) if t.dtype == dtype]
        torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])


def freeze(net: nn.Module) -> nn.Module:
    """Teachers and averages are in eval mode for good: no gradients, and a parent's `.train()` does not reach them."""
    net.eval().requires_grad_(False)
    net.train = MethodType(lambda self, mode=True: self, net)  # type: ignore[method-assign]  # a copy gets its own
    return net
