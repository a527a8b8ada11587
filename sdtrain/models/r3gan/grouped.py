"""Convolution with groups whose second derivatives are again single convolutions.

torch differentiates a grouped convolution twice with one small convolution a group, hundreds of calls for each layer of
a discriminator under R1. Here convolution is one slope of the trilinear form <convolve(x, w), y>, which is linear in
each of x, w and y. Its slope to any of the three is one convolution of the other two, and the slopes of that are slopes
of the form again, so every order costs three calls at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

X, W, Y = PLACES = range(3)


class Layout(NamedTuple):
    """What all slopes of one layer's form share."""

    x: torch.Size
    w: torch.Size
    stride: int
    padding: int
    groups: int


def _others(place: int) -> list[int]:
    return [other for other in PLACES if other != place]


class _Slope(torch.autograd.Function):
    """The slope of <convolve(x, w), y> to the tensor at `place`: to y the convolution, to x or w its adjoints."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, place: int, of: Layout) -> Tensor:
        """The two tensors at the other places, in order -> the slope, in the shape of its place.

        x is [N, C_in, H, W], w [C_out, C_in / groups, k, k] and y [N, C_out, H', W'].
        """
        ctx.save_for_backward(a, b)
        ctx.place, ctx.of = place, of
        if place == Y:
            return F.conv2d(a, b, stride=of.stride, padding=of.padding, groups=of.groups)
        # the tensor at the wanted place only says shape and format
        x, w, y = (b.new_empty(of.x), a, b) if place == X else (a, b.new_empty(of.w), b)
        pair, two, mask = [of.stride] * 2, [of.padding] * 2, [place == X, place == W, False]
        kernel = torch.ops.aten.convolution_backward
        return kernel(y, x, w, None, pair, two, [1, 1], False, [0, 0], of.groups, mask)[place]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The slope to what `forward` gave, in its shape -> slopes to its two tensors, in theirs."""
        places = _others(ctx.place)
        held = {ctx.place: slope, **dict(zip(places, ctx.saved_tensors))}

        def to(place: int) -> Tensor:
            return _Slope.apply(*(held[other] for other in _others(place)), place, ctx.of)

        slopes = (to(place) if needed else None for place, needed in zip(places, ctx.needs_input_grad))
        return *slopes, None, None


def grouped_conv2d(x: Tensor, w: Tensor, *, stride: int = 1, padding: int = 0, groups: int) -> Tensor:
    """`F.conv2d` without bias: x [N, C_in, H, W], w [C_out, C_in / groups, k, k] -> [N, C_out, H', W'].

    Differentiable to any order.
    """
    x, w = _one_format(x, w)
    return _Slope.apply(x, w, Y, Layout(x.shape, w.shape, stride, padding, groups))


def grouped_spread2d(y: Tensor, w: Tensor, *, stride: int = 1, padding: int = 0, groups: int) -> Tensor:
    """`F.conv_transpose2d` without bias: y [N, C_in, H, W], w [C_in, C_out / groups, k, k] -> [N, C_out, H', W'].

    Differentiable to any order.
    """
    y, w = _one_format(y, w)
    if torch.compiler.is_exporting():  # the adjoint that the form takes is a backward pass, which few programs know
        return F.conv_transpose2d(y, w, stride=stride, padding=padding, groups=groups)
    sides = [(side - 1) * stride - 2 * padding + k for side, k in zip(y.shape[2:], w.shape[2:])]
    shape = torch.Size((y.shape[0], w.shape[1] * groups, *sides))
    return _Slope.apply(w, y, X, Layout(shape, w.shape, stride, padding, groups))


def _one_format(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's format where it is on: backward runs outside it and must find what forward used."""
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return x, w
    return x.to(torch.get_autocast_dtype(kind)), w.to(torch.get_autocast_dtype(kind))
