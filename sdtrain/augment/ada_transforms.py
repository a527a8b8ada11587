"""Applying given geometric, colour and frequency transforms to images, differentiably to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from sdtrain.errors import DataError
from sdtrain.models.stylegan2.fir import correlate
from sdtrain.models.stylegan2.ops import upfirdn2d


def beside(x: Tensor, small: Tensor) -> Tensor:
    """`small` [...] on the device of `x` [...]; nobody waits for it."""
    return small.to(x.device, non_blocking=True)


def matrix(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Stack scalars and [N] tensors into [N, rows, columns]."""
    entries = [torch.stack([torch.as_tensor(v, dtype=like.dtype, device=like.device).expand_as(like) for v in row], 1)
               for row in rows]  # fmt: skip
    return torch.stack(entries, 1)


def scaling(sx: Tensor, sy: Tensor) -> Tensor:
    """Maps that multiply x by sx [N] and y by sy [N]: -> [N, 3, 3]."""
    return matrix([[sx, 0, 0], [0, sy, 0], [0, 0, 1]], sx)


def shift(tx: Tensor, ty: Tensor) -> Tensor:
    """Maps that add tx [N] to x and ty [N] to y: -> [N, 3, 3]."""
    return matrix([[1, 0, tx], [0, 1, ty], [0, 0, 1]], tx)


def rotation(angle: Tensor) -> Tensor:
    """Maps that turn x towards y by `angle` [N] in radians: -> [N, 3, 3]."""
    cos, sin = angle.cos(), angle.sin()
    return matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], angle)


def grey_rotation(angle: Tensor) -> Tensor:
    """Rodrigues' rotation about (1, 1, 1) / sqrt 3: [N] -> [N, 4, 4]."""
    cos, sin = angle.cos(), angle.sin()
    same, before, after = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin / sqrt(3), (1 - cos) / 3 + sin / sqrt(3)
    rows: list[list[Tensor | float]] = [
        [same, before, after, 0],
        [after, same, before, 0],
        [before, after, same, 0],
        [0, 0, 0, 1],
    ]
    return matrix(rows, angle)


def apply_color(images: Tensor, c: Tensor) -> Tensor:
    """[N, 3 or 1, H, W] under the matrices [N, 4, 4]; a grey image takes the mean over the rows.

    Raises DataError for another number of channels.
    """
    n, channels, height, width = images.shape
    flat = images.reshape(n, channels, height * width)
    if channels == 3:
        flat = torch.baddbmm(c[:, :3, 3:], c[:, :3, :3], flat)
    elif channels == 1:
        mean = c[:, :3].mean(1, keepdim=True)
        flat = flat * mean[:, :, :3].sum(2, keepdim=True) + mean[:, :, 3:]
    else:
        raise DataError(f"colour augmentation works on 1 or 3 channels, not {channels}; choose a pipeline without it")
    return flat.reshape(n, channels, height, width)


class _Sample(torch.autograd.Function):
    """Bilinear sampling on a constant grid: linear, so it and its adjoint are each other's derivatives."""

    @staticmethod
    def forward(ctx, images: Tensor, grid: Tensor) -> Tensor:
        """Images [N, C, H, W], grid [N, h, w, 2] in [-1, 1] -> [N, C, h, w]."""
        ctx.save_for_backward(grid)
        ctx.size = images.shape
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None]:
        """Slope of the result [N, C, h, w] -> slope of the images [N, C, H, W]; the grid is a constant."""
        return _SampleAdjoint.apply(slope, ctx.saved_tensors[0], ctx.size), None


class _SampleAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slope: Tensor, grid: Tensor, size: torch.Size) -> Tensor:
        """Slope [N, C, h, w], grid [N, h, w, 2] in [-1, 1] -> slope of the images, of `size` [N, C, H, W]."""
        ctx.save_for_backward(grid)
        images = slope.new_empty(size)  # the kernel wants it for the grid's gradient, which is not asked for
        kernel = torch.ops.aten.grid_sampler_2d_backward
        return kernel(slope.contiguous(), images, grid, 0, 0, False, [True, False])[0]

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        """Slope of the adjoint's result [N, C, H, W] -> [N, C, h, w]; the grid is a constant."""
        return _Sample.apply(slope, ctx.saved_tensors[0]), None, None


def needed_margins(g_inv: Tensor, width: int, height: int, support: int) -> list[tuple[int, int, int, int]]:
    """Pixels (left, right, top, bottom) that each sample's transform reaches beyond its image, at most size - 1.

    g_inv [N, 3, 3]; `support` is what the resampling filters reach in addition. A thousandth of a pixel is let go, so
    that rounding cannot turn a whole number of pixels into one more.
    """
    if isinstance(g_inv, FakeTensor):  # a count of memory has shapes and no numbers
        return [(width - 1, width - 1, height - 1, height - 1)] * len(g_inv)
    half = g_inv.new_tensor([(width - 1) / 2, (height - 1) / 2])
    signs = g_inv.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    corners = F.pad(signs * half, (0, 1), value=1.0)
    reached = (g_inv @ corners.t())[:, :2]
    beyond = torch.stack([(-reached).amax(2), reached.amax(2)], 2) - half[:, None] + support
    limit = g_inv.new_tensor([[width - 1], [height - 1]])
    margins = torch.minimum((beyond - 1e-3).clamp(min=0), limit).ceil().int().flatten(1).tolist()
    return [(m[0], m[1], m[2], m[3]) for m in margins]


def apply_geometry(images: Tensor, g_inv: Tensor, taps: Tensor, margin: tuple[int, int, int, int]) -> Tensor:
    """Resample [N, C, H, W] by [N, 3, 3]: reflect, double, sample bilinearly, halve; both filters are `taps`."""
    n, channels, height, width = images.shape
    reach = len(taps) // 4  # what the halving filter needs around the result, in pixels
    left, right, top, bottom = margin
    x = F.pad(images, margin, mode="reflect")
    pad_up = ((len(taps) + 1) // 2, (len(taps) - 2) // 2)
    x = upfirdn2d(x, taps, up=2, padding=pad_up * 2, gain=4.0)
    size = (n, channels, 2 * (height + 2 * reach), 2 * (width + 2 * reach))
    maps = _map(g_inv, x.shape, size, (left - right) / 2, (top - bottom) / 2)
    grid = F.affine_grid(beside(x, maps), [n, 1, *size[2:]], align_corners=False)
    x = _Sample.apply(x, grid)
    pad_down = ((len(taps) - 1) // 2 - 2 * reach, (len(taps) - 2) // 2 - 2 * reach)
    return upfirdn2d(x, taps, down=2, padding=pad_down * 2, flip_filter=True)


def _map(g_inv: Tensor, source: torch.Size, target: tuple[int, int, int, int], dx: float, dy: float) -> Tensor:
    """[N, 2, 3] in grid_sample's units for images of twice the resolution, padded unevenly by dx, dy.

    The wavelet is centred on one tap, half a doubled pixel beside the middle of its twelve, hence the shifts by 1/4.
    """
    like = g_inv[:, 0, 0]

    def fixed(a: float, b: float, make: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One map for all samples: [N, 3, 3]."""
        return make(torch.full_like(like, a), torch.full_like(like, b))

    to_source = fixed(-0.25 + dx, -0.25 + dy, shift)
    g = to_source @ g_inv @ fixed(0.25, 0.25, shift)
    normalise = fixed(4 / source[3], 4 / source[2], scaling)  # pixels about the centre -> [-1, 1]
    spread = fixed(target[3] / 4, target[2] / 4, scaling)
    g = normalise @ g @ spread
    return g[:, :2]


def apply_filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter [N, C, H, W] along both axes with each sample's own zero-phase kernel [N, K].

    Raises DataError for sides that the reflection of K // 2 pixels does not fit into.
    """
    n, channels, height, width = images.shape
    reach = kernels.shape[1] // 2
    if min(height, width) <= reach:
        raise DataError(f"the image filter of ADA needs sides above {reach} pixels, got {width}x{height}; leave it out")
    kernels = kernels.repeat_interleave(channels, 0)[:, None, None]
    x = F.pad(images.reshape(1, n * channels, height, width), (reach,) * 4, mode="reflect")
    x = correlate(x, kernels, (1, 1), (0, 0))
    return correlate(x, kernels.transpose(2, 3), (1, 1), (0, 0)).reshape(images.shape)
