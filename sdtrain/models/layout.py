"""How images lie in memory, where that decides how fast they are convolved."""

from __future__ import annotations

import torch
from torch import Tensor


def for_convolutions(x: Tensor) -> Tensor:
    """x [N, C, H, W], on a CPU with the channels of a pixel side by side: up to a third less time for what follows.

    Weights may stay as they are; convolutions hand the layout on.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x
