"""R3GAN: generator and discriminator (Huang et al. 2024, "The GAN is dead; long live the GAN!").

Plain residual networks: no normalisation, no style, no noise, no batch statistics, so samples never influence each
other. Each resolution is a stage of residual blocks that start as the identity; stages of the highest resolutions may
run in bfloat16. State dicts carry exactly the official names, including the prefix `Model.`.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.models.r3gan.grouped import grouped_conv2d, grouped_spread2d
from sdtrain.models.r3gan.options import DiscriminatorOptions, GeneratorOptions, StageOptions
from sdtrain.models.stylegan2.ops import as_full, fir_filter
from sdtrain.rng import Draws

SLOPE = 0.2  # of every leaky ReLU
FIR_TAPS = (1.0, 3.0, 3.0, 1.0)
FIRST = 4  # side of the lowest stage


class Stage(NamedTuple):
    """One resolution of a network."""

    width: int
    groups: int
    blocks: int
    expansion: int
    low: bool  # runs in bfloat16


def stages_of(resolution: int, options: StageOptions) -> list[Stage]:
    """The stages from 4x4 to `resolution`. Raises ConfigError where sizes and lists do not fit each other."""
    sizes = _sizes(resolution)
    for name in ("widths", "groups", "blocks"):
        listed = getattr(options, name)
        if len(listed) != len(sizes) or min(listed) < 1:
            raise ConfigError(
                f"{name} {list(listed)}: resolution {resolution} has {len(sizes)} stages "
                f"({', '.join(map(str, sizes))}); give {len(sizes)} positive numbers, 4x4 first"
            )
    low = options.num_low_precision_res
    if not 0 <= low <= len(sizes):
        raise ConfigError(f"num_low_precision_res {low}: resolution {resolution} has 0 to {len(sizes)} such stages")
    for r, width, groups in zip(sizes, options.widths, options.groups):
        if options.expansion < 1 or width * options.expansion % groups:
            raise ConfigError(
                f"groups {groups} at {r} px: {width} x expansion {options.expansion} channels do not divide by it; "
                "change one of the three"
            )
    rows = zip(options.widths, options.groups, options.blocks)
    return [Stage(*row, options.expansion, i >= len(sizes) - low) for i, row in enumerate(rows)]


def _sizes(resolution: int) -> list[int]:
    if resolution < FIRST or resolution & (resolution - 1):
        raise ConfigError(
            f"resolution {resolution}: R3GAN needs a power of two from {FIRST} upwards; choose 32, 64, 128, ..."
        )
    return [1 << i for i in range(FIRST.bit_length() - 1, resolution.bit_length())]


def _normal(*shape: int, gain: float) -> nn.Parameter:
    """Normal weights [outputs, *inputs] of standard deviation gain / sqrt(number of inputs)."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=gain / sqrt(prod(shape[1:]))))


class Linear(nn.Module):
    """Linear map without bias, in its input's number format: [N, inputs] -> [N, outputs]."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        self.weight = _normal(outputs, inputs, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs], in the format of x."""
        return F.linear(x, self.weight.to(x.dtype))


class Conv(nn.Module):
    """Convolution without bias, in its input's number format: [N, C_in, H, W] -> [N, C_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, size: int, groups: int = 1, gain: float = 1.0, padded: bool = True):
        super().__init__()
        self.groups, self.padding = groups, size // 2 if padded else 0
        self.weight = _normal(c_out, c_in // groups, size, size, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H, W] (odd size k), or [N, C_out, H - k + 1, W - k + 1] without padding."""
        w = self.weight.to(x.dtype)
        if self.groups == 1:
            return F.conv2d(x, w, padding=self.padding)
        return grouped_conv2d(x, w, padding=self.padding, groups=self.groups)


def convolution(c_in: int, c_out: int, size: int = 1, groups: int = 1, gain: float = 1.0) -> nn.Module:
    """A `Conv` under its official name: the weight is `Layer.weight`."""
    return nn.Sequential(OrderedDict(Layer=Conv(c_in, c_out, size, groups, gain)))


class BiasedActivation(nn.Module):
    """leaky_relu(x + bias of its channel), without gain: [N, C, ...] -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.Bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape."""
        bias = self.Bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        return F.leaky_relu_(x + bias, SLOPE)


class ResidualBlock(nn.Module):
    """x + narrow(act(grouped 3x3(act(widen(x))))): [N, C, H, W] -> [N, C, H, W].

    The last weights start at zero, the others smaller the more blocks the network has (Fixup, Zhang et al. 2019).
    """

    def __init__(self, stage: Stage, num_blocks: int):
        super().__init__()
        inner = stage.width * stage.expansion
        gain = sqrt(2 / (1 + SLOPE**2)) * num_blocks**-0.25
        self.LinearLayer1 = convolution(stage.width, inner, gain=gain)
        self.LinearLayer2 = convolution(inner, inner, 3, stage.groups, gain)
        self.LinearLayer3 = convolution(inner, stage.width, gain=0.0)
        self.NonLinearity1 = BiasedActivation(inner)
        self.NonLinearity2 = BiasedActivation(inner)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        y = self.NonLinearity1(self.LinearLayer1(x))
        return x + self.LinearLayer3(self.NonLinearity2(self.LinearLayer2(y)))


class Resampler(nn.Module):
    """Doubling or halving through the low-pass [1, 3, 3, 1]: [N, C, H, W] -> [N, C, 2H, 2W] or [N, C, H/2, W/2]."""

    Kernel: Tensor

    def __init__(self, up: bool):
        super().__init__()
        self.up = up
        self.register_buffer("Kernel", fir_filter(FIR_TAPS))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W] if `up`, else [N, C, H/2, W/2]."""
        channels = x.shape[1]
        kernel = self.Kernel.to(x.dtype).expand(channels, 1, -1, -1).contiguous()
        resample, gain = (grouped_spread2d, 4.0) if self.up else (grouped_conv2d, 1.0)
        return resample(x, kernel * gain, stride=2, padding=1, groups=channels)


class UpTransition(nn.Module):
    """1x1 convolution if the widths differ, then doubling: [N, C_in, H, W] -> [N, C_out, 2H, 2W]."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.Resampler = Resampler(up=True)
        self.LinearLayer = convolution(c_in, c_out) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, 2H, 2W]."""
        return self.Resampler(x if self.LinearLayer is None else self.LinearLayer(x))


class DownTransition(nn.Module):
    """Halving, then a 1x1 convolution if the widths differ: [N, C_in, H, W] -> [N, C_out, H/2, W/2]."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.Resampler = Resampler(up=False)
        self.LinearLayer = convolution(c_in, c_out) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H/2, W/2]."""
        x = self.Resampler(x)
        return x if self.LinearLayer is None else self.LinearLayer(x)


class GenerativeBasis(nn.Module):
    """A learned 4x4 map a channel, scaled by a linear function of the latent: [N, inputs] -> [N, C, 4, 4]."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.Basis = nn.Parameter(torch.randn(channels, FIRST, FIRST))
        self.LinearLayer = Linear(inputs, channels)

    def forward(self, z: Tensor) -> Tensor:
        """z [N, inputs] -> [N, C, 4, 4]."""
        return self.Basis.to(z.dtype) * self.LinearLayer(z)[:, :, None, None]


class DiscriminativeBasis(nn.Module):
    """A learned 4x4 weighting a channel, then a linear map: [N, C, 4, 4] -> [N, outputs]."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.Basis = Conv(channels, channels, FIRST, groups=channels, padded=False)
        self.LinearLayer = Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, 4, 4] -> [N, outputs]."""
        return self.LinearLayer(self.Basis(x).flatten(1))


def cast(x: Tensor, low: bool) -> Tensor:
    """[...] -> the same shape in bfloat16 or full precision."""
    return x.to(torch.bfloat16) if low else as_full(x)


class StageLayers(nn.Module):
    """The layers of one stage in order, in its number format."""

    def __init__(self, layers: list[nn.Module], low: bool):
        super().__init__()
        self.low = low
        self.Layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W'], twice or half the size where the stage holds a transition.

        The first stage of G takes [N, inputs], the last of D gives [N, outputs].
        """
        return self.Layers(cast(x, self.low))


def residual_blocks(stage: Stage, stages: list[Stage]) -> list[nn.Module]:
    """The blocks of one stage of a network that has these stages."""
    return [ResidualBlock(stage, sum(s.blocks for s in stages)) for _ in range(stage.blocks)]


class Generator(nn.Module):
    """R3GAN generator: G(z, c) -> image. The output is unbounded; there is no style space."""

    compiles: ClassVar[tuple[str, ...]] = ("Model.MainLayers.*.Layers.*",)

    def __init__(self, options: GeneratorOptions, *, resolution: int, num_classes: int = 0):
        """Raises ConfigError where resolution and the lists of stages do not fit each other."""
        super().__init__()
        self.options, self.resolution, self.num_classes = options, resolution, num_classes
        self.z_dim = options.z_dim
        stages = stages_of(resolution, options)
        entry: nn.Module = GenerativeBasis(options.z_dim + (options.embed_dim if num_classes else 0), stages[0].width)
        main = [StageLayers([entry, *residual_blocks(stages[0], stages)], stages[0].low)]
        for before, stage in zip(stages, stages[1:]):
            entry = UpTransition(before.width, stage.width)
            main.append(StageLayers([entry, *residual_blocks(stage, stages)], stage.low))
        parts = {"MainLayers": nn.Sequential(*main), "AggregationLayer": convolution(stages[-1].width, 3)}
        if num_classes:
            parts["EmbeddingLayer"] = Linear(num_classes, options.embed_dim)
        self.Model = nn.ModuleDict(parts)

    def forward(self, z: Tensor, c: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        """z [N, z_dim], one-hot c [N, num_classes] -> images [N, 3, R, R], nominally in [-1, 1], float32.

        Without classes c is ignored; the network has no noise, so draws are too.
        """
        x = as_full(z)
        if self.num_classes:
            x = torch.cat([x, self.Model["EmbeddingLayer"](c)], 1)
        return as_full(self.Model["AggregationLayer"](self.Model["MainLayers"](x)))


class Discriminator(nn.Module):
    """R3GAN discriminator, the generator mirrored; with classes, the logit is a product with the class's embedding."""

    def __init__(self, options: DiscriminatorOptions, *, resolution: int, num_classes: int = 0):
        """Raises ConfigError where resolution and the lists of stages do not fit each other."""
        super().__init__()
        self.options, self.resolution, self.num_classes = options, resolution, num_classes
        stages = stages_of(resolution, options)[::-1]
        self.starts_low = stages[0].low
        embed_dim = (options.embed_dim or stages[-1].width) if num_classes else 0
        main = []
        for stage, after in zip(stages, stages[1:]):
            way_out: nn.Module = DownTransition(stage.width, after.width)
            main.append(StageLayers([*residual_blocks(stage, stages), way_out], stage.low))
        way_out = DiscriminativeBasis(stages[-1].width, embed_dim or 1)
        main.append(StageLayers([*residual_blocks(stages[-1], stages), way_out], stages[-1].low))
        parts = {"ExtractionLayer": convolution(3, stages[0].width), "MainLayers": nn.Sequential(*main)}
        if num_classes:
            parts["EmbeddingLayer"] = Linear(num_classes, embed_dim, gain=1 / sqrt(embed_dim))
        self.Model = nn.ModuleDict(parts)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, 3, R, R], one-hot c [N, num_classes] -> logits [N], float32; without classes c is ignored."""
        x = self.Model["ExtractionLayer"](cast(x, self.starts_low))
        x = as_full(self.Model["MainLayers"](x))
        return (x * self.Model["EmbeddingLayer"](c)).sum(1) if self.num_classes else x.flatten()
