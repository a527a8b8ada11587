"""Numbers that a network or an augmentation looks at in every call: on each device once, not copied there anew."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of channels in [0, 1]


@functools.lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[len(values)]. Not to be changed."""
    with torch.inference_mode(False):  # training may use it after an evaluation has made it
        return torch.tensor(values, dtype=dtype, device=device)


def to_imagenet(x: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1], normalised by the statistics of ImageNet."""
    mean, std = (constant(v, x.device, x.dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x + 1) / 2 - mean) / std


def from_imagenet(y: Tensor) -> Tensor:
    """ImageNet-normalised images [N, 3, H, W] to [-1, 1]; not clamped."""
    mean, std = (constant(v, y.device, y.dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (y * std + mean) * 2 - 1
