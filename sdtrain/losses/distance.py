"""Distances without a feature network: the simple forms of L_SD (SD-GAN, Sec. 4 and the ablation of Fig. 5)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sdtrain.losses.ms_ssim import ms_ssim_loss


def l1(x: Tensor, target: Tensor) -> Tensor:
    """Mean |x - target| over the pixels of each image: [N, C, H, W] twice -> [N], float32."""
    return (x.float() - target.detach().float()).abs().flatten(1).mean(1)


def l2(x: Tensor, target: Tensor) -> Tensor:
    """Mean (x - target)^2 over the pixels of each image: [N, C, H, W] twice -> [N], float32."""
    return (x.float() - target.detach().float()).square().flatten(1).mean(1)


# images in [-1, 1] twice -> [N]; the gradient reaches the first alone
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "l2": l2, "ms-ssim": ms_ssim_loss}
