"""Path-length regularisation (Karras et al. 2020, StyleGAN2, Eq. 4), exact for any cut of the batch."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor


def path_lengths(ws: Tensor, images: Tensor, noise: Tensor) -> Tensor:
    """Length of J_w^T y per sample, y = noise / sqrt(H W): [N, L, D], [N, C, H, W], [N, C, H, W] -> [N].

    l_n = sqrt(mean over the L layers of sum_d (d<G(w), y>/dw_nld)^2). `noise` is standard normal; `images` depends on
    `ws`. The result stays in the graph: its gradient is a second derivative of the generator.
    """
    y = noise / sqrt(images.shape[2] * images.shape[3])
    (slope,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)
    return slope.square().sum(2).mean(1).sqrt()


def path_length_penalty(
    lengths: Tensor,
    pl_mean: Tensor | float,
    decay: float = 0.01,
    weight: float = 2.0,
    global_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean of weight (l_n - a)^2, new a), with a = lerp(pl_mean, mean l, decay): [N] -> scalar, detached scalar.

    The gradient flows through a as well. With lengths l_1..l_N of the whole batch and r_n = l_n - a,

        L = weight / N sum_n r_n^2,   a = (1 - decay) pl_mean + decay / N sum_m l_m
        dL/dl_n = 2 weight / N (r_n - decay / N sum_m r_m),   sum_m r_m / N = mean l - a.

    A rank or chunk knows its own l_n only. Given `global_mean` (mean l over all of them, a constant), the value is that
    of its own samples and the gradient the one above, so the average over equal chunks equals one process.
    """
    own_mean = lengths.mean() if global_mean is None else global_mean.detach()
    a = torch.lerp(torch.as_tensor(pl_mean, dtype=lengths.dtype, device=lengths.device), own_mean, decay)
    loss = weight * (lengths - a).square().mean()
    if global_mean is not None:
        through_a = -2 * weight * decay * (own_mean - a) * lengths.mean()
        loss = loss + through_a - through_a.detach()
    return loss, a.detach()


def lazy_adam(lr: float, betas: tuple[float, float], interval: int | None) -> tuple[float, tuple[float, float]]:
    """Adam's settings when a regulariser runs every `interval` steps only (StyleGAN2, section 3.1).

    lr' = k/(k+1) lr, beta' = beta^(k/(k+1)): with k + 1 optimizer steps instead of k, time passes as before.
    """
    ratio = 1.0 if not interval else interval / (interval + 1)
    return lr * ratio, (betas[0] ** ratio, betas[1] ** ratio)
