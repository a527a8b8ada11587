"""A 3x3 convolution of an image enlarged twofold by repeating its pixels, without the enlarged image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sdtrain.constants import constant
from sdtrain.precision import full_precision

ALONG = ((0, 0, 1, 1), (0, 1, 1, 0), (1, 1, 0, 0))  # three weights -> sums of those that meet one pixel, back to front
WINDOW_SUMS = tuple(float(a * b) for rows in ALONG for columns in ALONG for a in rows for b in columns)


def conv_of_doubled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d(interpolate(x, 2, "nearest"), weight, bias, padding=1), for 4/9 of the products.

    x [N, I, H, W], weight [O, I, 3, 3], bias [O] -> [N, O, 2H, 2W]. The nine pixels under a window are only four
    different ones of x, so their weights are added up first; which four is different for even and odd places, as in a
    transposed convolution of stride 2.
    """
    with full_precision(x.device):
        sums = weight.flatten(2) @ constant(WINDOW_SUMS, weight.device, weight.dtype).view(9, 16)
    return F.conv_transpose2d(x, sums.unflatten(2, (4, 4)).transpose(0, 1), bias, stride=2, padding=1)
