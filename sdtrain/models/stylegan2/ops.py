"""Resampling, activation and modulated convolution of StyleGAN2 (Karras et al. 2020) in plain PyTorch.

Every function is made of differentiable library calls, so second derivatives (R1, path length) exist everywhere. The
fast forms, each compared with its naive form by a test:
* FIR filters run as one depthwise convolution (its stride does the downsampling); an upsampling convolution is one
  transposed convolution followed by the filter, four times fewer products than zero insertion first;
* modulation scales the activations, so one dense convolution serves the whole batch instead of one per sample;
* activation gains are folded into weights and biases, the activation itself works in place.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.models.stylegan2.fir import correlate
from sdtrain.precision import full_precision

log = logging.getLogger("sdtrain")

LRELU_SLOPE = 0.2
SQRT2 = sqrt(2.0)

# name -> (function of x and slope, default gain)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "linear": (lambda x, slope: x, 1.0),
    "relu": (lambda x, slope: F.relu(x), SQRT2),
    "lrelu": (lambda x, slope: F.leaky_relu(x, slope), SQRT2),
    "tanh": (lambda x, slope: torch.tanh(x), 1.0),
    "sigmoid": (lambda x, slope: torch.sigmoid(x), 1.0),
    "elu": (lambda x, slope: F.elu(x), 1.0),
    "selu": (lambda x, slope: F.selu(x), 1.0),
    "softplus": (lambda x, slope: F.softplus(x), 1.0),
    "swish": (lambda x, slope: F.silu(x), SQRT2),
}


def as_full(x: Tensor) -> Tensor:
    """[...] -> the same shape in float32, or float64 where somebody wants it."""
    return x if x.dtype == torch.float64 else x.float()


@functools.cache
def format_on(low: torch.dtype | None, device_type: str) -> torch.dtype | None:
    """What a block configured for `low` computes in on a kind of device; None = in the format of its input.

    A CPU emulates float16, tens of times slower than float32: blocks of it follow their float32 input there.
    """
    if low != torch.float16 or device_type != "cpu":
        return low
    log.info("blocks in float16 compute in float32 on the CPU, where float16 is tens of times slower")
    return None


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    act: str = "linear",
    *,
    slope: float = LRELU_SLOPE,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """clamp(gain * act(x + bias)) for x [N, C, ...], bias [C]; `gain=None` takes the activation's own gain.

    Raises ConfigError for an activation that is not in ACTIVATIONS.
    """
    if act not in ACTIVATIONS:
        raise ConfigError(f"activation '{act}' is unknown; choose one of {', '.join(ACTIVATIONS)}")
    function, default_gain = ACTIVATIONS[act]
    if bias is not None:
        x = x + bias.view(1, -1, *[1] * (x.ndim - 2))
    x = function(x, slope) * (default_gain if gain is None else gain)
    return x if clamp is None else x.clamp(-clamp, clamp)


def lrelu_(x: Tensor, clamp: float | None = None) -> Tensor:
    """Leaky ReLU of [...] in place, for tensors whose gain was folded in before (lrelu(g x) = g lrelu(x) for g > 0).

    The result lies in [-clamp, clamp] if `clamp` is given.
    """
    x = F.leaky_relu_(x, LRELU_SLOPE)
    return x if clamp is None else x.clamp(-clamp, clamp)


def fir_filter(taps: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """Taps [n] or [n, m] -> two-dimensional filter of sum one."""
    f = torch.as_tensor(taps, dtype=torch.float32)
    f = torch.outer(f, f) if f.ndim == 1 else f
    return f / f.sum()


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _quad(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Padding as (left, right, top, bottom) from one number, (x, y) or all four."""
    if isinstance(padding, int):
        return (padding,) * 4
    if len(padding) == 2:
        return (padding[0], padding[0], padding[1], padding[1])
    return (padding[0], padding[1], padding[2], padding[3])


def zero_insert(x: Tensor, up_x: int, up_y: int) -> Tensor:
    """Put up - 1 zeros behind every pixel: [N, C, H, W] -> [N, C, H * up_y, W * up_x]."""
    if up_x == up_y == 1:
        return x
    n, c, h, w = x.shape
    return F.pad(x.reshape(n, c, h, 1, w, 1), (0, up_x - 1, 0, 0, 0, up_y - 1)).reshape(n, c, h * up_y, w * up_x)


def _depthwise(
    x: Tensor, f: Tensor, stride: tuple[int, int], padding: tuple[int, int], flip: bool, gain: float
) -> Tensor:
    """Correlate every channel of x with the one filter f [h, w] times `gain`, turned by half a circle if `flip`."""
    kernel = f.expand(x.shape[1], 1, *f.shape)  # first, so that what follows makes the copies as well
    kernel = kernel.flip(2, 3) if flip else kernel
    kernel = kernel if gain == 1 else kernel * gain
    return correlate(x, kernel.to(x.dtype).contiguous(), stride, padding)


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Zero-insert by `up`, pad, convolve with `f` (correlate if `flip_filter`), keep every `down`-th pixel.

    x [N, C, H, W]; f [h, w], or [n] for a separable filter; up, down as number or (x, y); padding as number, (x, y) or
    (left, right, top, bottom), counted after the zero insertion; negative padding crops. The result is [N, C, H', W'],
    H' = (H * up_y + top + bottom - h) // down_y + 1 and W' likewise.
    """
    up_x, up_y = _pair(up)
    down_x, down_y = _pair(down)
    left, right, top, bottom = _quad(padding)
    x = zero_insert(x, up_x, up_y)
    symmetric = left == right >= 0 and top == bottom >= 0
    inner = (top, left) if symmetric else (0, 0)
    x = x if symmetric else F.pad(x, (left, right, top, bottom))
    if f.ndim == 1:
        row = _depthwise(x, f[None, :], (1, down_x), (0, inner[1]), not flip_filter, sqrt(gain))
        return _depthwise(row, f[:, None], (down_y, 1), (inner[0], 0), not flip_filter, sqrt(gain))
    return _depthwise(x, f, (down_y, down_x), inner, not flip_filter, gain)


def upsample2d(x: Tensor, f: Tensor, up: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, H * up, W * up] through the low-pass f, mean preserved."""
    before, after = _up_padding(f, up)
    return upfirdn2d(x, f, up=up, padding=(before[0], after[0], before[1], after[1]), gain=float(up * up))


def downsample2d(x: Tensor, f: Tensor, down: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, H // down, W // down] through the low-pass f."""
    before, after = _down_padding(f, down)
    return upfirdn2d(x, f, down=down, padding=(before[0], after[0], before[1], after[1]))


def filter2d(x: Tensor, f: Tensor) -> Tensor:
    """Same-size convolution of every channel with f: [N, C, H, W], f [h, w] or [n] -> [N, C, H, W]."""
    return downsample2d(x, f, down=1)


def _extent(f: Tensor) -> tuple[int, int]:
    """Filter size as (x, y)."""
    return f.shape[-1], f.shape[0]


def _up_padding(f: Tensor, up: int) -> tuple[tuple[int, int], tuple[int, int]]:
    (x, y) = _extent(f)
    return ((x + up - 1) // 2, (y + up - 1) // 2), ((x - up) // 2, (y - up) // 2)


def _down_padding(f: Tensor, down: int) -> tuple[tuple[int, int], tuple[int, int]]:
    (x, y) = _extent(f)
    return ((x - down + 1) // 2, (y - down + 1) // 2), ((x - down) // 2, (y - down) // 2)


def conv_up(x: Tensor, weight: Tensor, f: Tensor) -> Tensor:
    """True convolution at twice the resolution: [N, I, H, W], [O, I, k, k] (k odd) -> [N, O, 2H, 2W].

    Equals zero insertion, FIR with gain 4, then convolution; the two filters commute, so the transposed convolution
    visits the non-zero pixels only and the FIR runs on its output.
    """
    k = weight.shape[-1]
    x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    before, after = _up_padding(f, 2)
    half = k // 2
    # the transposed convolution reaches k - 1 pixels before the first and k - 2 behind the last zero-inserted one
    lead, trail = half - (k - 1), half - (k - 2)
    padding = (before[0] + lead, after[0] + trail, before[1] + lead, after[1] + trail)
    return upfirdn2d(x, f, padding=padding, gain=4.0)


def conv_down(x: Tensor, weight: Tensor, f: Tensor, bias: Tensor | None = None) -> Tensor:
    """FIR, then correlation with stride 2: [N, I, H, W], [O, I, k, k] (k odd) -> [N, O, H / 2, W / 2]."""
    if weight.shape[-1] == 1:
        return F.conv2d(downsample2d(x, f), weight, bias)
    half = weight.shape[-1] // 2
    before, after = _down_padding(f, 2)
    x = upfirdn2d(x, f, padding=(before[0] + half, after[0] + half, before[1] + half, after[1] + half))
    return F.conv2d(x, weight, bias, stride=2)


def conv_same(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Correlation at unchanged resolution: [N, I, H, W], [O, I, k, k] (k odd) -> [N, O, H, W]."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def demodulation(weight: Tensor, styles: Tensor) -> Tensor:
    """StyleGAN2 Eq. 3: 1 / sqrt(sum_ik (w_oik s_ni)^2 + 1e-8), [O, I, k, k], [N, I] -> [N, O], always in float32.

    Naively the norm of one modulated copy of the weights per sample; squares factor, so a matrix product does it.
    """
    with full_precision(styles.device):
        energy = as_full(weight).square().sum((2, 3))
        return (as_full(styles).square() @ energy.t() + 1e-8).rsqrt()


def half_range(weight: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
    """Scale weights [O, I, k, k] per output and styles [N, I] per sample against overflow; demodulation undoes both.

    Gives weights of at most 1 / sqrt(I k^2) and styles of at most 1 in size, in their shapes.
    """
    fan = weight[0].numel()
    weight = weight / (sqrt(fan) * weight.abs().amax((1, 2, 3), keepdim=True))
    return weight, styles / styles.abs().amax(1, keepdim=True)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    f: Tensor | None = None,
    demodulate: bool = True,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """gain * (conv(x, w s_n) demodulated + noise + bias); with `f` the result has twice the resolution.

    x [N, I, H, W], weight [O, I, k, k], styles [N, I], noise broadcastable to the result, bias [O] -> [N, O, H, W] or
    [N, O, 2H, 2W]. The result may be changed in place by the caller.
    """
    if x.dtype == torch.float16 and demodulate:
        weight, styles = half_range(weight, styles)
    scale = demodulation(weight, styles) * gain if demodulate else None
    x = x * styles.to(x.dtype)[:, :, None, None]
    w = (weight if demodulate else weight * gain).to(x.dtype)
    x = conv_same(x, w) if f is None else conv_up(x, w, f)
    return _finish(x, scale, noise, bias, gain)


def _finish(x: Tensor, scale: Tensor | None, noise: Tensor | None, bias: Tensor | None, gain: float) -> Tensor:
    """x * scale + gain * (bias + noise) in as few passes over x as possible; `gain` is already in `scale`."""
    shift = None if bias is None else (bias * gain).to(x.dtype)[None, :, None, None]
    if scale is not None:
        scale = scale.to(x.dtype)[:, :, None, None]
        x = x * scale if shift is None else torch.addcmul(shift, x, scale)
    elif shift is not None:
        x = x + shift
    return x if noise is None else x.add_((noise * gain).to(x.dtype))


def minibatch_stddev(x: Tensor, group: int | None, channels: int) -> Tensor:
    """Append `channels` maps of the mean standard deviation over groups: [N, C, H, W] -> [N, C + channels, H, W].

    Sample n belongs to group n mod (N / G) where G = min(group, N). Raises ConfigError unless N is a multiple of G.
    """
    n, c, h, w = x.shape
    g = n if group is None else min(group, n)
    if n % g:
        raise ConfigError(
            f"minibatch stddev: a ghost of {n} samples is no multiple of mbstd_group {g}; "
            "choose a group that divides ghost_batch"
        )
    y = as_full(x).reshape(g, n // g, channels, c // channels, h, w)
    deviation = y - y.mean(0)
    std = (deviation.square().mean(0) + 1e-8).sqrt().mean((2, 3, 4))
    return torch.cat([x, std.to(x.dtype).repeat(g, 1)[:, :, None, None].expand(-1, -1, h, w)], 1)
