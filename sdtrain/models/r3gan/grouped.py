"""Convolution with groups whose second derivatives are again single convolutions.

torch differentiates a grouped convolution twice with one small convolution a group, hundreds of calls for each layer of
a discriminator under R1. The three maps here are bilinear and each other's derivatives, so every order costs three
calls at most:

    convolve(x, w) = y        its slopes:  spread(dy, w) to x,   correlate(x, dy) to w
    spread(y, w)   = x                     convolve(dx, w) to y, correlate(dx, y) to w
    correlate(x, y) = w                    spread(y, dw) to x,   convolve(x, dw) to y
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Layout(NamedTuple):
    """What all three maps of one layer share."""

    x: torch.Size
    w: torch.Size
    stride: int
    padding: int
    groups: int


def _adjoint(y: Tensor, x: Tensor, w: Tensor, of: Layout, wanted: int) -> Tensor:
    """Slope of a convolution to x (wanted 0) or w (1); the tensor in that place only says shape and format."""
    mask = [wanted == 0, wanted == 1, False]
    pair, two = [of.stride] * 2, [of.padding] * 2
    kernel = torch.ops.aten.convolution_backward
    return kernel(y, x, w, None, pair, two, [1, 1], False, [0, 0], of.groups, mask)[wanted]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, of: Layout) -> Tensor:
        """x [N, C_in, H, W], w [C_out, C_in / groups, k, k] -> y [N, C_out, H', W']."""
        ctx.save_for_backward(x, w)
        ctx.of = of
        return F.conv2d(x, w, stride=of.stride, padding=of.padding, groups=of.groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dy [N, C_out, H', W'] -> slopes to x and w, in their shapes."""
        x, w = ctx.saved_tensors
        to_x, to_w, _ = ctx.needs_input_grad
        return _Spread.apply(dy, w, ctx.of) if to_x else None, _Correlate.apply(x, dy, ctx.of) if to_w else None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor, of: Layout) -> Tensor:
        """y [N, C_out, H', W'], w [C_out, C_in / groups, k, k] -> x [N, C_in, H, W], shape `of.x`."""
        ctx.save_for_backward(y, w)
        ctx.of = of
        return _adjoint(y, y.new_empty(of.x), w, of, 0)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dx [N, C_in, H, W] -> slopes to y and w, in their shapes."""
        y, w = ctx.saved_tensors
        to_y, to_w, _ = ctx.needs_input_grad
        return _Convolve.apply(dx, w, ctx.of) if to_y else None, _Correlate.apply(dx, y, ctx.of) if to_w else None, None


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, of: Layout) -> Tensor:
        """x [N, C_in, H, W], y [N, C_out, H', W'] -> w [C_out, C_in / groups, k, k], shape `of.w`."""
        ctx.save_for_backward(x, y)
        ctx.of = of
        return _adjoint(y, x, y.new_empty(of.w), of, 1)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dw [C_out, C_in / groups, k, k] -> slopes to x and y, in their shapes."""
        x, y = ctx.saved_tensors
        to_x, to_y, _ = ctx.needs_input_grad
        return _Spread.apply(y, dw, ctx.of) if to_x else None, _Convolve.apply(x, dw, ctx.of) if to_y else None, None


def grouped_conv2d(x: Tensor, w: Tensor, *, stride: int = 1, padding: int = 0, groups: int) -> Tensor:
    """`F.conv2d` without bias: x [N, C_in, H, W], w [C_out, C_in / groups, k, k] -> [N, C_out, H', W'].

    Differentiable to any order.
    """
    x, w = _one_format(x, w)
    return _Convolve.apply(x, w, Layout(x.shape, w.shape, stride, padding, groups))


def grouped_spread2d(y: Tensor, w: Tensor, *, stride: int = 1, padding: int = 0, groups: int) -> Tensor:
    """`F.conv_transpose2d` without bias: y [N, C_in, H, W], w [C_in, C_out / groups, k, k] -> [N, C_out, H', W'].

    Differentiable to any order.
    """
    y, w = _one_format(y, w)
    sides = [(side - 1) * stride - 2 * padding + k for side, k in zip(y.shape[2:], w.shape[2:])]
    shape = torch.Size((y.shape[0], w.shape[1] * groups, *sides))
    return _Spread.apply(y, w, Layout(shape, w.shape, stride, padding, groups))


def _one_format(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's format where it is on: backward runs outside it and must find what forward used."""
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return x, w
    return x.to(torch.get_autocast_dtype(kind)), w.to(torch.get_autocast_dtype(kind))
