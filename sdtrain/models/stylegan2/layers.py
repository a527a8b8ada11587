"""Layers of StyleGAN2-ADA (Karras et al. 2020) under their official parameter names.

Weights are stored at unit variance and scaled when used ("equalised learning rate"); activation gains ride along in
that scale, so they cost nothing per pixel.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import DataError
from sdtrain.models.ghost import Advancing, Move
from sdtrain.models.stylegan2.ops import (
    SQRT2,
    conv_down,
    conv_same,
    fir_filter,
    lrelu_,
    minibatch_stddev,
    modulated_conv2d,
)
from sdtrain.precision import full_precision

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)


def unit_second_moment(x: Tensor) -> Tensor:
    """Scale every row of [N, D] to a mean square of one."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class FullyConnected(nn.Module):
    """Linear layer [N, in] -> [N, out] with runtime weight scale and, if `lrelu`, an activation of gain sqrt 2."""

    def __init__(self, c_in: int, c_out: int, *, lrelu: bool = False, lr_mul: float = 1.0, bias_init: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / lr_mul)
        self.bias = nn.Parameter(torch.full((c_out,), float(bias_init)))
        self.lrelu = lrelu
        self.lr_mul = lr_mul
        self.gain = SQRT2 if lrelu else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out], in the format of x."""
        scale = self.gain * self.lr_mul
        weight = self.weight * (scale / sqrt(self.weight.shape[1]))
        x = F.linear(x, weight.to(x.dtype), (self.bias * scale).to(x.dtype))
        return lrelu_(x) if self.lrelu else x


class Conv2d(nn.Module):
    """Discriminator convolution with runtime weight scale, optional FIR downsampling by two and leaky ReLU.

    A layer that is not `trainable` (Freeze-D, Mo et al. 2020) keeps its tensors as buffers under the same names.
    """

    weight: Tensor
    bias: Tensor | None
    resample_filter: Tensor

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        lrelu: bool = True,
        bias: bool = True,
        down: bool = False,
        clamp: float | None = None,
        trainable: bool = True,
    ):
        super().__init__()
        self.register_buffer("resample_filter", fir_filter(FIR_TAPS))
        self._add("weight", torch.randn(c_out, c_in, kernel, kernel), trainable)
        self._add("bias", torch.zeros(c_out) if bias else None, trainable)
        self.down, self.clamp = down, clamp
        self.lrelu = lrelu
        self.scale = (SQRT2 if lrelu else 1.0) / sqrt(c_in * kernel**2)
        self.bias_scale = SQRT2 if lrelu else 1.0

    def _add(self, name: str, value: Tensor | None, trainable: bool) -> None:
        if trainable:
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """[N, I, H, W] -> gain * act(conv(x) + bias) [N, O, H, W], half the size if `down`, within +-gain * clamp."""
        weight = (self.weight * (self.scale * gain)).to(x.dtype)
        bias = None if self.bias is None else (self.bias * (self.bias_scale * gain)).to(x.dtype)
        x = conv_down(x, weight, self.resample_filter, bias) if self.down else conv_same(x, weight, bias)
        clamp = None if self.clamp is None else self.clamp * gain
        if self.lrelu:
            return lrelu_(x, clamp)
        return x if clamp is None else x.clamp(-clamp, clamp)


class MappingNetwork(Advancing):
    """z and label -> w, with the running mean of w that truncation needs.

    In training w_avg moves once per pass towards the mean over the global batch; `num_ws=None` and `w_avg_beta=None`
    give the label mapping of the discriminator.
    """

    w_avg: Tensor
    fc0: FullyConnected

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        *,
        num_ws: int | None,
        num_layers: int = 8,
        lr_mul: float = 0.01,
        w_avg_beta: float | None = 0.995,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.num_ws, self.num_layers, self.w_avg_beta = num_ws, num_layers, w_avg_beta
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        width = z_dim + (w_dim if c_dim else 0)
        for i in range(num_layers):
            self.add_module(f"fc{i}", FullyConnected(width if i == 0 else w_dim, w_dim, lrelu=True, lr_mul=lr_mul))
        if w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        *,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_w_avg: bool = True,
    ) -> Tensor:
        """z [N, z_dim], one-hot c [N, c_dim] -> ws [N, num_ws, w_dim] (or [N, w_dim] without num_ws), float32.

        Raises DataError when a conditional network gets no labels or labels of another width.
        """
        inputs = next(t for t in (z, c, *self.parameters()) if t is not None)
        with full_precision(inputs.device):
            w = self._layers(self._inputs(z, c))
            if self.w_avg_beta is not None and self.training and update_w_avg:
                self._track(w)
            if self.num_ws is None:
                return w
            return self._truncate(w[:, None].expand(-1, self.num_ws, -1), truncation_psi, truncation_cutoff)

    def _inputs(self, z: Tensor | None, c: Tensor | None) -> Tensor:
        parts = []
        if self.z_dim and z is not None:
            parts.append(unit_second_moment(z.to(self.fc0.weight.dtype)))
        if self.c_dim:
            if c is None or c.shape[-1] != self.c_dim:
                given = "none" if c is None else f"labels of width {c.shape[-1]}"
                raise DataError(
                    f"the network wants one-hot labels of {self.c_dim} classes and got {given}; "
                    f"pass c [N, {self.c_dim}]"
                )
            parts.append(unit_second_moment(self.embed(c.to(self.embed.weight.dtype))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _layers(self, x: Tensor) -> Tensor:
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x

    def _truncate(self, ws: Tensor, psi: float, cutoff: int | None) -> Tensor:
        """w_avg + psi (w - w_avg), for the first `cutoff` layers only if given."""
        if psi == 1:
            return ws
        if cutoff is None:
            return self.w_avg.lerp(ws, psi)
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], psi), ws[:, cutoff:]], 1)

    def _track(self, w: Tensor) -> None:
        w = w.detach()
        seen = [w.sum(0), w.new_full((1,), float(len(w)))]
        self._record(seen)

    def _moves(self, entry: list[Tensor]) -> list[Move]:
        assert self.w_avg_beta is not None
        total, count = entry
        return [(self.w_avg, (total / count).to(self.w_avg), 1 - self.w_avg_beta)]


class SynthesisConv(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU; doubles the resolution if `up`."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(self, c_in: int, c_out: int, w_dim: int, resolution: int, *, up: bool, clamp: float | None):
        super().__init__()
        self.register_buffer("resample_filter", fir_filter(FIR_TAPS))
        self.affine = FullyConnected(w_dim, c_in, bias_init=1)
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 3, 3))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.up, self.clamp = up, clamp

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x [N, I, h, h], w [N, w_dim], noise [N, 1, r, r] or [r, r] or None -> [N, O, r, r]."""
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            f=self.resample_filter if self.up else None,
            noise=None if noise is None else noise * self.noise_strength,
            bias=self.bias,
            gain=SQRT2,
        )
        return lrelu_(x, self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to an image: no demodulation, no noise, no activation.

    With three outputs the modulated weights are tiny, so they are built per sample: x is read once and not rescaled.
    """

    def __init__(self, c_in: int, c_out: int, w_dim: int, clamp: float | None):
        super().__init__()
        self.affine = FullyConnected(w_dim, c_in, bias_init=1)
        self.weight = nn.Parameter(torch.randn(c_out, c_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.scale, self.clamp = 1 / sqrt(c_in), clamp

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, I, H, W], w [N, w_dim] -> [N, O, H, W], in [-clamp, clamp] if `clamp`."""
        n, c, height, width = x.shape
        weight = self.weight.flatten(1)[None] * (self.affine(w) * self.scale)[:, None]
        image = torch.matmul(weight.to(x.dtype), x.reshape(n, c, height * width)).reshape(n, -1, height, width)
        image = image + self.bias.to(image.dtype)[None, :, None, None]
        return image if self.clamp is None else image.clamp(-self.clamp, self.clamp)


class MinibatchStd(nn.Module):
    """Minibatch standard deviation within each ghost of `ghost_batch` consecutive samples (None: the whole input)."""

    ghost_batch: int | None = None

    def __init__(self, group: int | None, channels: int):
        super().__init__()
        self.group, self.channels = group, channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + channels, H, W]. Raises ConfigError where `group` does not divide a ghost."""
        ghosts = x.split(self.ghost_batch or len(x))
        done = [minibatch_stddev(ghost, self.group, self.channels) for ghost in ghosts]
        return done[0] if len(done) == 1 else torch.cat(done)
