"""Images of a generator, each a function of (seed, index) alone: the same on any rank, in any batch, on any day."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdtrain.rng import Draws


def to_uint8(images: Tensor) -> Tensor:
    """[...] in [-1, 1] -> uint8 as the official tools do: clamp(x * 127.5 + 128, 0, 255), truncated."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def draws_for(indices: Sequence[int], seed: int, device: torch.device | str, purpose: str = "sample") -> Draws:
    """Every index has numbers of its own."""
    return Draws(seed=seed, step=0, ghosts=tuple(indices), ghost_batch=1, device=device, path=purpose)


def labels_for(draws: Draws, class_counts: Sequence[int]) -> Tensor | None:
    """One-hot labels [N, num_classes] in the proportions of the training set; None without classes.

    `class_counts`: samples of each class. Labels belong to the draws, so a student and its teacher get the same ones.
    """
    if not class_counts:
        return None
    shares = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    chance = replace(draws, device="cpu").uniform("label").double()
    picked = torch.searchsorted(shares / shares[-1], chance, right=True)
    picked = picked.clamp(max=len(class_counts) - 1)
    return torch.nn.functional.one_hot(picked, len(class_counts)).float().to(draws.device, non_blocking=True)


@torch.no_grad()
def generate(
    module: Any,
    indices: Sequence[int],
    *,
    seed: int,
    class_counts: Sequence[int] = (),
    device: torch.device | str,
    **style: Any,
) -> Tensor:
    """Images [N, 3, R, R] in [-1, 1] of the latents with these indices, in eval mode; `style` goes to the generator."""
    draws = draws_for(indices, seed, device)
    was_training = module.training
    module.eval()
    try:
        return module(draws.normal("z", module.z_dim), labels_for(draws, class_counts), draws.sub("noise"), **style)
    finally:
        module.train(was_training)


def sampler(
    module: Any,
    *,
    seed: int,
    class_counts: Sequence[int],
    device: torch.device | str,
    batch_size: int = 32,
    **style: Any,
) -> Callable[[Sequence[int]], Tensor]:
    """A function from sample indices to uint8 images [N, 3, R, R] on the CPU."""

    def sample(indices: Sequence[int]) -> Tensor:
        """uint8 [len(indices), 3, R, R] on the CPU."""
        parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        more = {"seed": seed, "class_counts": class_counts, "device": device, **style}
        return torch.cat([to_uint8(generate(module, part, **more)).cpu() for part in parts])

    return sample


def grid(images: Tensor, columns: int) -> Any:
    """uint8 [N, 3, H, W] -> one HWC picture with `columns` images a row; missing ones are black."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = images.new_zeros(rows * columns, c, h, w)
    sheet[:n] = images
    return sheet.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c).numpy()
