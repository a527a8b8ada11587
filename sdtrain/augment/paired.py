"""T, the augmentation both images share before L_SD compares them (SD-GAN, Sec. 3 and the listing of Appendix C).

Two of {horizontal flip, rotation, translation} in random order. The order is drawn once a ghost, like the listing
draws it once a batch on every device; gates and amounts are drawn per sample. The operations are composed into one
affine map, so both batches are resampled once, through the same grid.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.precision import full_precision
from sdtrain.rng import Draws

FLIP, ROTATE, TRANSLATE = range(3)
ORDERS = tuple(itertools.permutations((FLIP, ROTATE, TRANSLATE), 2))
GATE_PROBABILITY = 0.5


class PairedAugment:
    """T of the paper.

    `hflip`: probability of the flip; `degrees`: rotation uniform in +-degrees; `translate`: shift uniform in
    +-translate of the image side. An operation acts on a sample when it is among the two of its ghost (2 in 3) and its
    own gate is open (1 in 2). `padding` fills what comes in from outside: the authors' code reflects, the listing
    leaves kornia's default of zeros (grey in [-1, 1]).
    """

    def __init__(
        self,
        hflip: float = 0.5,
        degrees: float = 5.0,
        translate: float = 0.01,
        padding: Literal["zeros", "border", "reflection"] = "reflection",
    ):
        self.hflip, self.degrees, self.translate, self.padding = hflip, degrees, translate, padding

    def __call__(self, x: Tensor, y: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """T(x), T(y) with the same numbers for both: [N, C, H, W] twice -> the same shapes.

        N must be `draws.num_samples`; `draws=None` means T = identity. y takes no gradient.
        """
        y = y.detach()
        if draws is None:
            return x, y
        with full_precision("cpu"):  # few and small: made beside a GPU, which is not waited for
            maps = self.matrices(replace(draws, device="cpu") if x.is_cuda else draws, x.shape[2:])
        grid = affine_grid(maps, x)
        return warp(x, grid, self.padding), warp(y, grid, self.padding)

    def matrices(self, draws: Draws, size: torch.Size | tuple[int, int]) -> Tensor:
        """Where each sample's pixels go: maps [N, 3, 3] of pixel offsets (x, y, 1) from the image centre."""
        height, width = size
        gates = draws.uniform("gates", 3) < torch.tensor(
            [self.hflip, GATE_PROBABILITY, GATE_PROBABILITY], device=draws.device
        )
        angle = torch.deg2rad((2 * draws.uniform("angle") - 1) * self.degrees)
        shift = (2 * draws.uniform("shift", 2) - 1) * self.translate
        shift = shift * torch.tensor([width, height], dtype=shift.dtype, device=shift.device)
        ops = torch.stack([flipping(angle), rotation(angle), translation(shift)], 1)
        eye = torch.eye(3, device=ops.device)
        ops = torch.where(gates[:, :, None, None], ops, eye)
        order = torch.tensor(ORDERS, device=ops.device)[self.orders(draws)]
        first, second = (ops[torch.arange(len(ops), device=ops.device), order[:, k]] for k in (0, 1))
        return second @ first

    def orders(self, draws: Draws) -> Tensor:
        """Which entry of ORDERS each sample follows, [N]: the same for a whole ghost."""
        picks = (draws.uniform_per_ghost("order") * len(ORDERS)).long()
        return picks.repeat_interleave(draws.ghost_batch)


def flipping(like: Tensor) -> Tensor:
    """Mirror left and right: [N] -> [N, 3, 3]."""
    return torch.diag(torch.tensor([-1.0, 1.0, 1.0], device=like.device)).expand(len(like), 3, 3)


def rotation(angle: Tensor) -> Tensor:
    """Turn clockwise on the screen (y points down) by `angle` [N] in radians: [N, 3, 3]."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1).view(-1, 3, 3)


def translation(shift: Tensor) -> Tensor:
    """Move by `shift` [N, 2] pixels (right, down): [N, 3, 3]."""
    maps = torch.eye(3, device=shift.device).repeat(len(shift), 1, 1)
    maps[:, :2, 2] = shift
    return maps


def affine_grid(maps: Tensor, like: Tensor) -> Tensor:
    """Sampling grid [N, H, W, 2] that moves the pixels of `like` by `maps` (bilinear, align_corners False).

    Offsets are divided by (side - 1) / 2 as in kornia, although the grid without aligned corners spans side / 2: a
    shift of t pixels moves the picture by t * side / (side - 1). Kept: published results were trained with it.
    """
    height, width = like.shape[2:]
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2, 1.0], device=maps.device)
    with full_precision(maps.device), full_precision(like.device):
        back = torch.linalg.inv(maps) * half / half[:, None]
        there = back[:, :2].to(like.device, non_blocking=True)
        return F.affine_grid(there, list(like.shape), align_corners=False)


def warp(images: Tensor, grid: Tensor, padding: str) -> Tensor:
    """[N, C, H, W] at grid [N, h, w, 2] (the image is [-1, 1]) -> [N, C, h, w], in fp32; the images' data type."""
    with full_precision(images.device):
        out = F.grid_sample(images.float(), grid.float(), mode="bilinear", padding_mode=padding, align_corners=False)
    return out.to(images.dtype)
