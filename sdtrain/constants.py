"""Numbers that a network or an augmentation looks at in every call: on each device once, not copied there anew."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(values)]. Not to be changed."""
    with torch.inference_mode(False):  # training may use it after an evaluation has made it
        return torch.tensor(values, dtype=dtype, device=device)
