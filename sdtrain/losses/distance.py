"""Distances without a feature network: the simple forms of L_SD (SD-GAN, Sec. 4 and the ablation of Fig. 5)."""

from __future__ import annotations

from torch import Tensor


def l1(x: Tensor, target: Tensor) -> Tensor:
    """Mean |x - target| over the pixels of each image: [N, C, H, W] twice -> [N], float32."""
    return (x.float() - target.detach().float()).abs().flatten(1).mean(1)


def l2(x: Tensor, target: Tensor) -> Tensor:
    """Mean (x - target)^2 over the pixels of each image: [N, C, H, W] twice -> [N], float32."""
    return (x.float() - target.detach().float()).square().flatten(1).mean(1)
