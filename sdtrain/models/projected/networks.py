"""Projected discriminator (Sauer et al. 2021): frozen features, frozen random projections, small trained heads.

Features of EfficientNet-lite0 at strides 4, 8, 16 and 32 are mixed across channels (CCM) and across scales (CSM) by
random 1x1 convolutions; one head a scale turns them into logits. Images in [-1, 1] go in as they are: that is this
network's own mean 0.5, std 0.5 preprocessing. Parameter names are the official ones.

The official heads are made for images of 256 pixels; smaller data is enlarged to 224. With `interpolate_to=None` and
data below 128 pixels this file offers small siblings of our own: features of the small image itself, and heads with
only as many down blocks as the small feature maps allow. They are what makes a quick run on a CPU possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.models.ghost import GhostBatchNorm2d, SpectralConv2d
from sdtrain.models.projected.options import DiscriminatorOptions
from sdtrain.rng import generator

# head channels by nominal resolution, and the nominal resolutions of the four projections (official, whatever the data)
HEAD_WIDTHS = {4: 512, 8: 512, 16: 256, 32: 128, 64: 64, 128: 64, 256: 32, 512: 16, 1024: 8}
NOMINAL_RESOLUTIONS = (128, 64, 32, 16)
HEAD_END = 8
PATCH_START = 16  # nominal resolution at which every official patch head starts: one down block each
SMALLEST_OFFICIAL = 128
STAGE_CHANNELS = (24, 40, 112, 320)
# stacks of EfficientNet-lite0 (Tan & Le 2019; no squeeze-excitation): kernel, stride of the first block, expansion,
# channels, blocks
BLOCKS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# official slices: stem, norm, activation (index 2, no tensors) and blocks 0-1; block 2; blocks 3-4; blocks 5-6
STAGES = {"layer0": (0, 1), "layer1": (2,), "layer2": (3, 4), "layer3": (5, 6)}
STEM_MODULES = 3
UNUSED_WEIGHTS = ("conv_head.", "bn2.", "classifier.")


def frozen(net: nn.Module) -> nn.Module:
    """Turn parameters into buffers of the same name: nothing makes them require grad or hands them to an optimizer."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return net


class SameConv2d(nn.Conv2d):
    """Convolution without bias padded like TensorFlow's SAME: an odd pixel of padding goes to the right and bottom."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, ceil(H / stride), ceil(W / stride)]."""
        (k, _), (s, _) = self.kernel_size, self.stride
        rows, cols = (max((math.ceil(n / s) - 1) * s + k - n, 0) for n in x.shape[-2:])
        if rows or cols:
            x = F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, None, self.stride, groups=self.groups)


def _norm(num_channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(num_channels, eps=1e-3)


class SeparableBlock(nn.Module):
    """EfficientNet's first block: depthwise, then pointwise."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = SameConv2d(c_in, c_in, kernel, stride, groups=c_in), _norm(c_in)
        self.conv_pw, self.bn2 = SameConv2d(c_in, c_out, 1), _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, ceil(H / stride), ceil(W / stride)]."""
        return self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))


class InvertedBlock(nn.Module):
    """Inverted residual: expand, depthwise, project; the input is added when shapes agree."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        c_mid = c_in * expansion
        self.conv_pw, self.bn1 = SameConv2d(c_in, c_mid, 1), _norm(c_mid)
        self.conv_dw, self.bn2 = SameConv2d(c_mid, c_mid, kernel, stride, groups=c_mid), _norm(c_mid)
        self.conv_pwl, self.bn3 = SameConv2d(c_mid, c_out, 1), _norm(c_out)
        self.has_skip = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, ceil(H / stride), ceil(W / stride)]."""
        h = F.relu6(self.bn2(self.conv_dw(F.relu6(self.bn1(self.conv_pw(x))))))
        h = self.bn3(self.conv_pwl(h))
        return x + h if self.has_skip else h


def _block_stack(c_in: int, kernel: int, stride: int, expansion: int, c_out: int, repeats: int) -> nn.Sequential:
    def block(i: int) -> nn.Module:
        first_in, first_stride = (c_in, stride) if i == 0 else (c_out, 1)
        if expansion == 1:
            return SeparableBlock(first_in, c_out, kernel, first_stride)
        return InvertedBlock(first_in, c_out, kernel, first_stride, expansion)

    return nn.Sequential(*(block(i) for i in range(repeats)))


class EfficientNetLite0(nn.Module):
    """The four stages of tf_efficientnet_lite0 that the projected discriminator looks at, without the classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths = [32, *(block[3] for block in BLOCKS)]
        stacks = [_block_stack(c_in, *block) for c_in, block in zip(widths, BLOCKS, strict=False)]
        stem = [SameConv2d(3, 32, 3, stride=2), _norm(32), nn.ReLU6()]
        for name, blocks in STAGES.items():
            self.add_module(name, nn.Sequential(*(stem if name == "layer0" else []), *(stacks[b] for b in blocks)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [N, 3, H, W] in [-1, 1] -> features at strides 4, 8, 16, 32 with 24, 40, 112, 320 channels."""
        features = []
        for name in STAGES:
            x = self.get_submodule(name)(x)
            features.append(x)
        return features


def stage_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of a tf_efficientnet_lite0 file (conv_stem, bn1, blocks.N) to layerN.M; other names are kept.

    The tensors [...] are handed on as they are; those of the classifier and of other official parts are left out.
    """
    places = {"conv_stem": "layer0.0", "bn1": "layer0.1"}
    for stage, blocks in STAGES.items():
        first = STEM_MODULES if stage == "layer0" else 0
        places.update({f"blocks.{b}": f"{stage}.{first + i}" for i, b in enumerate(blocks)})
    renamed = {}
    for name, value in weights.items():
        name = name.removeprefix("feature_network.").removeprefix("pretrained.")
        parts = name.split(".")
        head = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        if not name.startswith(UNUSED_WEIGHTS) and not name.startswith(("scratch.", "discriminator.")):
            renamed[places.get(head, head) + name[len(head) :]] = value
    return renamed


def load_features(net: EfficientNetLite0, weights: Mapping[str, Tensor]) -> None:
    """Load a tf_efficientnet_lite0 state dict, tensors [...] under its own or official ProjectedGAN names.

    Raises WeightsError if a name or a shape does not fit.
    """
    own, given = net.state_dict(), stage_names(weights)
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    given = {**counters, **given}
    wrong = sorted(set(own) ^ set(given)) or sorted(n for n in own if own[n].shape != given[n].shape)
    if wrong:
        raise WeightsError(
            f"the feature network weights are not those of tf_efficientnet_lite0: {len(wrong)} tensors do not fit, "
            f"the first is {wrong[0]}; give tf_efficientnet_lite0-0aa007d2.pth"
        )
    net.load_state_dict(given)


@torch.no_grad()
def randomise_features(net: EfficientNetLite0) -> None:
    """Random features, the same in every run, as a weights file is: checkpoints leave them out.

    He-normal convolutions, and batch-norm statistics measured on smooth noise.

    Without the statistics the constant offsets of channels drown what differs between images (channel means make up
    three quarters of the spread instead of a third). Smooth noise (three octaves) is closer to photographs than white.
    """
    rng = generator("projected", "features", 0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=rng) * math.sqrt(2 / fan_in))
    octaves = [torch.randn(16, 3, n, n, generator=rng) for n in (4, 16, 64)]
    images = sum(F.interpolate(octave, 64, mode="bilinear") for octave in octaves) / 3
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    net(images)
    for norm in norms:
        norm.eval()


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

    def __init__(self, width: int, expand: bool) -> None:
        super().__init__()
        mixed = [width * (2**i if expand else 1) for i in range(len(STAGE_CHANNELS))]
        self.channels = [mixed[0], *mixed[:-1]]
        for i, c_in in enumerate(STAGE_CHANNELS):
            self.add_module(f"layer{i}_ccm", nn.Conv2d(c_in, mixed[i], 1))
            self.add_module(f"layer{i}_csm", FeatureFusion(mixed[i], self.channels[i]))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """features [N, STAGE_CHANNELS[i], h_i, w_i], each half the one before -> [N, channels[i], 2 h_i, 2 w_i]."""
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

    def __init__(self, options: DiscriminatorOptions, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.pretrained = EfficientNetLite0()
        self.scratch = Projections(options.projection_width, options.expand)
        self.channels = self.scratch.channels
        self.train(False)
        if not next(self.scratch.parameters()).is_meta:
            if options.projection_seed is not None:  # else as torch drew them, with all other initial weights
                randomise_projections(self.scratch, options.projection_seed)
            self._fill_features(weights)
        frozen(self)

    def _fill_features(self, weights: Mapping[str, Tensor] | None) -> None:
        if weights is None:
            randomise_features(self.pretrained)
        else:
            load_features(self.pretrained, weights)

    def train(self, mode: bool = True) -> FeatureNetwork:
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [N, 3, S, S] in [-1, 1] -> projections [N, channels[i], s, s] of s = S/2, S/4, S/8 and S/16 pixels."""
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

    feature_weights  state dict of tf_efficientnet_lite0 (file tf_efficientnet_lite0-0aa007d2.pth), under its own names
                     or official ProjectedGAN names; None = random features (see randomise_features), which train a
                     GAN less well but need no file

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
        self.feature_network = FeatureNetwork(options, feature_weights)
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
    return tuple(2 * math.ceil(input_size / (4 << i)) for i in range(len(STAGE_CHANNELS)))


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
