"""Gradients that are not finite, treated as the official StyleGAN2-ADA treats them before every optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIMIT = 1e5


@torch.no_grad()
def clamp_nonfinite(grads: Sequence[Tensor]) -> Tensor:
    """Make every element finite in place: nan -> 0, inf -> 1e5, -inf -> -1e5; finite ones stay, however large.

    Returns how many were replaced, an int64 scalar on the device of the gradients: nothing here waits for a GPU. Call
    it on averaged gradients, so that all ranks replace the same elements. Gradients of any shape; one device and dtype
    are handled in one piece, which takes the memory of a second copy for a moment.
    """
    count = torch.zeros((), dtype=torch.int64, device=grads[0].device if grads else None)
    for device, dtype in dict.fromkeys((g.device, g.dtype) for g in grads):
        group = [g for g in grads if (g.device, g.dtype) == (device, dtype)]
        flat = torch.cat([g.reshape(-1) for g in group])
        count += flat.isfinite().logical_not_().sum().to(count.device)
        limit = min(LIMIT, torch.finfo(dtype).max)  # float16 ends at 65504
        flat.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)
        parts = flat.split([g.numel() for g in group])
        torch._foreach_copy_(group, [part.view_as(g) for part, g in zip(parts, group, strict=True)])
    return count
