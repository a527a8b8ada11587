"""The constant filter as a linear function: torch would differentiate its convolution twice by one call a channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


def correlate(x: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Every channel of [N, C, H, W] with its filter of `kernel` [C, 1, h, w], a constant -> [N, C, H', W'].

    On a GPU, where calls are what it costs; a CPU keeps the bits of torch's own derivatives.
    """
    if not x.is_cuda:
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=len(kernel))
    # backward runs outside of autocast and must find what forward has used
    if torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype("cuda"))
    return Correlation.apply(x, kernel.to(x.dtype), stride, padding)


class Correlation(torch.autograd.Function):
    """Linear in the images, so it and its adjoint are each other's derivatives."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
        """[N, C, H, W], kernel [C, 1, h, w] -> [N, C, H', W']."""
        ctx.save_for_backward(kernel)
        ctx.how = x.shape[2:], stride, padding
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=len(kernel))

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None, None]:
        """Slope [N, C, H', W'] -> [N, C, H, W]; the filter is a constant."""
        return Adjoint.apply(slope, ctx.saved_tensors[0], *ctx.how), None, None, None


class Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slope: Tensor, kernel: Tensor, size: torch.Size, stride: Pair, padding: Pair) -> Tensor:
        """[N, C, H', W'], kernel [C, 1, h, w] -> [N, C, *size]."""
        ctx.save_for_backward(kernel)
        ctx.how = stride, padding
        reached = [(slope.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + kernel.shape[2 + i] for i in (0, 1)]
        rest = [side - end for side, end in zip(size, reached, strict=True)]
        return F.conv_transpose2d(slope, kernel, None, stride, padding, rest, len(kernel))

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Slope [N, C, H, W] -> [N, C, H', W']."""
        return Correlation.apply(slope, ctx.saved_tensors[0], *ctx.how), None, None, None, None
