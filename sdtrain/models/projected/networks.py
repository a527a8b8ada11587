"""Projected discriminator (Sauer et al. 2021): frozen features, frozen random projections, small trained heads.

Features of a backbone of timm (`features.py`; EfficientNet-lite0 unless told otherwise) at strides 4, 8, 16 and 32 are
mixed across channels (CCM) and across scales (CSM) by random 1x1 convolutions; one head a scale turns them into logits.
Parameter names are the official ones.

The official heads are made for images of 256 pixels; smaller data is enlarged to 224. With `interpolate_to=None` and
data below 128 pixels this file offers small siblings of our own: features of the small image itself, and heads with
only as many down blocks as the small feature maps allow. They are what makes a quick run on a CPU possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.models.ghost import GhostBatchNorm2d, SpectralConv2d
from sdtrain.models.projected.features import STRIDES, backbone, load_features, randomise_features
from sdtrain.models.projected.options import DiscriminatorOptions
from sdtrain.rng import generator

# head channels by nominal resolution, and the nominal resolutions of the four projections (official, whatever the data)
HEAD_WIDTHS = {4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 64, 256: 32, 512: 16, 1024: 8}
NOMINAL_RESOLUTIONS = (128, 64, 32, 16)
HEAD_END = 8
PATCH_START = 16  # nominal resolution at which every official patch head starts: one down block each
SMALLEST_OFFICIAL = 128


def frozen(net: nn.Module) -> nn.Module:
    """Turn parameters into buffers of the same name: nothing makes them require grad or hands them to an optimizer."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return net


class FeatureFusion(nn.Module):
    """CSM step: twice as large (bilinear, corners aligned), then a random 1x1 convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, 2H, 2W]."""
        return self.out_conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class Projections(nn.Module):
    """Cross-channel and cross-scale mixing by random 1x1 convolutions; no activation anywhere."""

    def __init__(self, maps: list[int], width: int, expand: bool) -> None:
        super().__init__()
        mixed = [width * (2**i if expand else 1) for i in range(len(maps))]
        self.channels = [mixed[0], *mixed[:-1]]
        for i, c_in in enumerate(maps):
            self.add_module(f"layer{i}_ccm", nn.Conv2d(c_in, mixed[i], 1))
            self.add_module(f"layer{i}_csm", FeatureFusion(mixed[i], self.channels[i]))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """features [N, maps[i], h_i, w_i], each half the one before -> [N, channels[i], 2 h_i, 2 w_i]."""
        out: list[Tensor] = []
        for i in reversed(range(len(features))):
            mixed = self.get_submodule(f"layer{i}_ccm")(features[i])
            out.insert(0, self.get_submodule(f"layer{i}_csm")(mixed + out[0] if out else mixed))
        return out


@torch.no_grad()
def randomise_projections(net: Projections, seed: int) -> None:
    """torch's default initialisation, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases, from a seed."""
    rng = generator("projected", "projections", seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.in_channels)
            for tensor in module.parameters():
                tensor.copy_((2 * torch.rand(tensor.shape, generator=rng) - 1) * bound)


class FeatureNetwork(nn.Module):
    """Frozen features and frozen projections: buffers only, always in eval whatever the parent does."""

    compiles: ClassVar[tuple[str, ...]] = ("",)
    shift: Tensor | None
    spread: Tensor | None

    def __init__(self, options: DiscriminatorOptions, side: int, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.pretrained, scaling = backbone(options.feature_network, side)
        self.scratch = Projections(self.pretrained.channels, options.projection_width, options.expand)
        self.channels = self.scratch.channels
        for name, value in zip(("shift", "spread"), scaling or (None, None)):
            self.register_buffer(name, value, persistent=False)
        self.train(False)
        if not next(self.scratch.parameters()).is_meta:
            if options.projection_seed is not None:  # else as torch drew them, with all other initial weights
                randomise_projections(self.scratch, options.projection_seed)
            if weights is None:
                randomise_features(self.pretrained)
            else:
                load_features(self.pretrained, weights, options.feature_network)
        frozen(self)

    def train(self, mode: bool = True) -> FeatureNetwork:
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [N, 3, S, S] in [-1, 1] -> projections [N, channels[i], s, s] of s = S/2, S/4, S/8 and S/16 pixels."""
        if self.shift is not None and self.spread is not None:
            x = (x - self.shift) / self.spread
        return self.scratch(self.pretrained(x))


class SeparableConv2d(nn.Module):
    """Depthwise 3x3, then pointwise; both spectrally normalised, without bias."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.depthwise = SpectralConv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
        self.pointwise = SpectralConv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H, W]."""
        return self.pointwise(self.depthwise(x))


class DownBlock(nn.Module):
    """Half as large: convolution, ghost batch norm, leaky ReLU; the separable form pools afterwards."""

    def __init__(self, c_in: int, c_out: int, separable: bool = False) -> None:
        super().__init__()
        conv = SeparableConv2d(c_in, c_out) if separable else SpectralConv2d(c_in, c_out, 4, stride=2, padding=1)
        pool = [nn.AvgPool2d(2, 2)] if separable else []
        self.main = nn.Sequential(conv, GhostBatchNorm2d(c_out), nn.LeakyReLU(0.2), *pool)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H // 2, W // 2]."""
        return self.main(x)


class DownBlockPatch(nn.Module):
    """A down block followed by a 1x1 convolution, ghost batch norm and leaky ReLU."""

    def __init__(self, c_in: int, c_out: int, separable: bool = False) -> None:
        super().__init__()
        pointwise = SpectralConv2d(c_out, c_out, 1, bias=False)
        self.main = nn.Sequential(
            DownBlock(c_in, c_out, separable), pointwise, GhostBatchNorm2d(c_out), nn.LeakyReLU(0.2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H // 2, W // 2]."""
        return self.main(x)


def head_channels(c_in: int, start: int, width: int | None, end: int = HEAD_END) -> list[int]:
    """Channels before every down block and after the last; `start` is the nominal resolution of the input.

    A start that is no power of two counts as the nearest one of the table.
    """
    start = min(HEAD_WIDTHS, key=lambda known: abs(known - start))
    sizes = [start >> i for i in range(start.bit_length()) if start >> i >= end] or [start]
    return [c_in, *(width or HEAD_WIDTHS[size] for size in sizes[1:])]


def _down_blocks(widths: list[int], separable: bool, patch: bool) -> list[nn.Module]:
    block = DownBlockPatch if patch else DownBlock
    return [block(a, b, separable) for a, b in zip(widths, widths[1:], strict=False)]


class SingleDisc(nn.Module):
    """One head: features [N, widths[0], h, w] -> logits [N, 1, h', w'].

    widths  channels before every down block and after the last
    """

    def __init__(self, widths: list[int], *, separable: bool = False, patch: bool = False) -> None:
        super().__init__()
        last = SpectralConv2d(widths[-1], 1, 4, bias=False)
        self.main = nn.Sequential(*_down_blocks(widths, separable, patch), last)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """x [N, widths[0], h, w] -> logits [N, 1, h // 2^b - 3, w // 2^b - 3] after b down blocks; c is ignored."""
        return self.main(x)


class SingleDiscCond(nn.Module):
    """A head whose logits are inner products of image features and a class embedding, over sqrt(cmap_dim)."""

    def __init__(
        self,
        widths: list[int],
        *,
        separable: bool = False,
        patch: bool = False,
        num_embeddings: int = 1000,
        embedding_dim: int = 128,
        cmap_dim: int = 64,
    ) -> None:
        super().__init__()
        self.cmap_dim = cmap_dim
        self.main = nn.Sequential(*_down_blocks(widths, separable, patch))
        self.cls = SpectralConv2d(widths[-1], cmap_dim, 4, bias=False)
        self.embed = nn.Embedding(num_embeddings, embedding_dim)
        self.embed_proj = nn.Sequential(nn.Linear(embedding_dim, cmap_dim), nn.LeakyReLU(0.2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [N, widths[0], h, w], c one-hot [N, num_classes] -> logits [N, 1, h', w'] as in SingleDisc."""
        cmap = self.embed_proj(self.embed(c.argmax(1)))[:, :, None, None]
        return (self.cls(self.main(x)) * cmap).sum(1, keepdim=True) / math.sqrt(self.cmap_dim)


class MultiScaleD(nn.Module):
    """One head a projection; all logits of an image in one row."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.mini_discs = nn.ModuleDict({str(i): head for i, head in enumerate(heads)})

    def forward(self, projections: list[Tensor], c: Tensor | None = None) -> Tensor:
        """projections [N, C_i, h_i, w_i], c one-hot [N, num_classes] if conditional -> logits [N, K], head by head."""
        logits = [head(x, c).flatten(1) for head, x in zip(self.mini_discs.values(), projections, strict=False)]
        return torch.cat(logits, dim=1)


class Discriminator(nn.Module):
    """The projected discriminator. Only the heads are trained; `frozen_prefixes` names what a checkpoint may leave out.

    The random projections are in every checkpoint: heads learn to read one draw of them and are lost with another.

    feature_weights  state dict of `options.feature_network` under timm's or official ProjectedGAN names; None = random
                     features (see randomise_features), which train a GAN less well but need no file

    What a checkpoint leaves out comes back from the same feature_weights. Raises ConfigError for
    options that do not fit the resolution and WeightsError for weights of another network.
    """

    frozen_prefixes = ("feature_network.pretrained.",)

    def __init__(
        self,
        options: DiscriminatorOptions,
        *,
        resolution: int,
        num_classes: int = 0,
        feature_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.num_classes = resolution, num_classes
        self.input_size = max(resolution, options.interpolate_to or 0)
        _check(options, self.input_size, num_classes)
        self.feature_network = FeatureNetwork(options, self.input_size, feature_weights)
        self.discriminator = MultiScaleD(heads(options, self.feature_network.channels, self.input_size, num_classes))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """x [N, 3, R, R] in [-1, 1], c one-hot [N, num_classes] if conditional -> logits [N, K].

        Raises ValueError without c if conditional, and in training unless N is a multiple of the ghost batch.
        """
        if self.num_classes and c is None:
            raise ValueError("a conditional discriminator needs labels c [N, num_classes]")
        if self.input_size != x.shape[-1]:
            x = F.interpolate(x, self.input_size, mode="bilinear", align_corners=False)
        return self.discriminator(self.feature_network(x), c if self.num_classes else None)


def heads(options: DiscriminatorOptions, channels: list[int], input_size: int, num_classes: int) -> list[nn.Module]:
    """One head for each of the first `num_discs` projections of an input of `input_size` pixels."""
    starts = NOMINAL_RESOLUTIONS if input_size >= SMALLEST_OFFICIAL else projection_sizes(input_size)
    starts = tuple(min(start, PATCH_START) for start in starts) if options.patch else starts
    built: list[nn.Module] = []
    for c_in, start in zip(channels[: options.num_discs], starts, strict=False):
        built.append(_head(options, head_channels(c_in, start, options.head_width), num_classes))
    return built


def _head(options: DiscriminatorOptions, widths: list[int], num_classes: int) -> nn.Module:
    if not num_classes:
        return SingleDisc(widths, separable=options.separable, patch=options.patch)
    return SingleDiscCond(
        widths,
        separable=options.separable,
        patch=options.patch,
        num_embeddings=options.num_embeddings,
        embedding_dim=options.embedding_dim,
        cmap_dim=options.cmap_dim,
    )


def projection_sizes(input_size: int) -> tuple[int, ...]:
    """Pixels of the four projections of an input."""
    return tuple(2 * math.ceil(input_size / stride) for stride in STRIDES)


def _check(options: DiscriminatorOptions, input_size: int, num_classes: int) -> None:
    possible = sum(size >= 4 for size in projection_sizes(input_size))
    if not 1 <= options.num_discs <= possible:
        raise ConfigError(
            f"the projected discriminator has num_discs {options.num_discs}, but at {input_size} pixels it can have 1 "
            f"to {possible} heads; choose a number in that range or set interpolate_to"
        )
    if num_classes > options.num_embeddings:
        raise ConfigError(
            f"the projected discriminator has num_embeddings {options.num_embeddings} but the data has {num_classes} "
            f"classes; set num_embeddings >= {num_classes}"
        )
