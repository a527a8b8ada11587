"""What balanced consistency compares an image with (StyleNAT): a mirror, a shift, colours and a hole of half the size.

The published augmentation acts on images normalised by ImageNet's mean and deviation: there brightness moves a channel
by up to half a deviation, and what a shift or the hole leaves blank has the colour of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdtrain.augment.diffaug import diff_augment
from sdtrain.rng import Draws

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY, CUTOUT_RATIO = "translation,color,cutout", 0.5


def consistent_augment(x: Tensor, draws: Draws) -> Tensor:
    """Augment images [N, 3, H, W] in [-1, 1] -> the same range, not clamped; every sample has its own draws."""
    mean, std = (2 * x.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))  # of images in [0, 2]
    mirrored = draws.uniform("flip") < 0.5
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    x = diff_augment((x + 1 - mean) / std, draws, policy=POLICY, cutout_ratio=CUTOUT_RATIO)
    return x * std + mean - 1
