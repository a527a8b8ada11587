"""What balanced consistency compares an image with (StyleNAT): a mirror, a shift, colours and a hole of half the size.

The published augmentation acts on images normalised by ImageNet's mean and deviation: there brightness moves a channel
by up to half a deviation, and what a shift or the hole leaves blank has the colour of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdtrain.augment.diffaug import diff_augment
from sdtrain.constants import from_imagenet, to_imagenet
from sdtrain.rng import Draws

POLICY, CUTOUT_RATIO = "translation,color,cutout", 0.5


def consistent_augment(x: Tensor, draws: Draws) -> Tensor:
    """Augment images [N, 3, H, W] in [-1, 1] -> the same range, not clamped; every sample has its own draws."""
    mirrored = draws.uniform("flip") < 0.5
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return from_imagenet(diff_augment(to_imagenet(x), draws, policy=POLICY, cutout_ratio=CUTOUT_RATIO))
