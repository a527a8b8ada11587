"""A 3x3 convolution of an image enlarged twofold by repeating its pixels, without the enlarged image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sdtrain.models.stylegan2.fir import correlate


def conv_of_doubled(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(interpolate(x, 2, "nearest"), weight, padding=1), for a quarter of the products.

    x [N, I, H, W], weight [O, I, 3, 3] -> [N, O, 2H, 2W]. Repeating pixels is to put zeros between them and to sum over
    windows of 2x2. Sums and convolution may change places, and the convolution then has nothing to do at the zeros.
    """
    apart = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2)
    return correlate(apart, apart.new_ones(apart.shape[1], 1, 2, 2), (1, 1), (0, 0))
