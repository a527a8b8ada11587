"""Perceptual variation along training (SD-GAN, Table 3): how much the picture of a latent still changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Pairs = Literal["consecutive", "all_pairs"]


@torch.no_grad()
def variation_per_latent(
    images_by_checkpoint: Sequence[Tensor],
    lpips: Callable[[Tensor, Tensor], Tensor],
    *,
    mode: Pairs = "consecutive",
    batch_size: int = 32,
) -> Tensor:
    """v [K]: v_k = mean over pairs of checkpoints of LPIPS(x_{t,k}, x_{u,k}).

    `images_by_checkpoint[t]` holds the images [K, ...] of the same K latents, in [-1, 1]; at least two checkpoints. The
    paper's wording admits consecutive checkpoints (default) and all pairs.
    """
    numbers = range(len(images_by_checkpoint))
    pairs = itertools.pairwise(numbers) if mode == "consecutive" else itertools.combinations(numbers, 2)
    rows = [_distances(images_by_checkpoint[t], images_by_checkpoint[u], lpips, batch_size) for t, u in pairs]
    return torch.stack(rows).mean(0)


def perceptual_variation(
    images_by_checkpoint: Sequence[Tensor],
    lpips: Callable[[Tensor, Tensor], Tensor],
    *,
    mode: Pairs = "consecutive",
    ddof: int = 0,
    batch_size: int = 32,
) -> tuple[float, float]:
    """Mean and standard deviation of `variation_per_latent` over latents.

    `images_by_checkpoint[t]`: [K, 3, H, W] in [-1, 1], the same K latents each.
    """
    per_latent = variation_per_latent(images_by_checkpoint, lpips, mode=mode, batch_size=batch_size)
    return per_latent.mean().item(), per_latent.std(correction=ddof).item()


def _distances(x: Tensor, y: Tensor, lpips: Callable[[Tensor, Tensor], Tensor], batch_size: int) -> Tensor:
    parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([lpips(a, b).double() for a, b in parts])
