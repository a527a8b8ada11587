"""The frozen feature network of the projected discriminator: a backbone of timm, seen as four maps of falling size.

EfficientNets are cut into the official layer0 ... layer3, so that official checkpoints fit by name; every other
backbone keeps timm's names. Maps at strides 4, 8, 16 and 32 are taken as they are; those of a plain transformer, all at
the stride of its patches, come from four depths and are resized.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.rng import generator

STRIDES = (4, 8, 16, 32)
OFFICIAL = "tf_efficientnet_lite0"
STEM = {"conv_stem": "layer0.0", "bn1": "layer0.1"}


class Stages(nn.Module):
    """An EfficientNet without its classifier, cut behind the blocks whose maps leave it."""

    def __init__(self, net: Any, indices: list[int]) -> None:
        super().__init__()
        self.channels = [net.feature_info[i]["num_chs"] for i in indices]
        ends = [int(net.feature_info[i]["module"].removeprefix("blocks.")) + 1 for i in indices]
        # index 2 was the activation of the stem, which timm now keeps in bn1
        stem = [net.conv_stem, net.bn1, nn.Identity()]
        self.places = dict(STEM)
        for i, (start, end) in enumerate(zip([0, *ends], ends)):
            before = stem if i == 0 else []
            self.add_module(f"layer{i}", nn.Sequential(*before, *net.blocks[start:end]))
            self.places |= {f"blocks.{b}": f"layer{i}.{len(before) + b - start}" for b in range(start, end)}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised x [N, 3, S, S] -> maps [N, C_i, ceil(S / stride), ...] at strides 4, 8, 16, 32."""
        maps = []
        for stage in self.children():
            x = stage(x)
            maps.append(x)
        return maps

    def own_name(self, name: str) -> str:
        """What a tensor of timm's file is called here."""
        parts = name.split(".")
        head = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        return self.places.get(head, head) + name[len(head) :]


class Pyramid(nn.Module):
    """Any other backbone under timm's own names."""

    def __init__(self, net: Any, indices: list[int]) -> None:
        super().__init__()
        self.channels = [net.feature_info[i]["num_chs"] for i in indices]
        net.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        self.model, self.indices = net, indices

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised x [N, 3, S, S] -> maps [N, C_i, ceil(S / stride), ...] at strides 4, 8, 16, 32."""
        maps = self.model.forward_intermediates(x, indices=self.indices, output_fmt="NCHW", intermediates_only=True)
        return [resized(h, math.ceil(x.shape[-1] / stride)) for h, stride in zip(maps, STRIDES, strict=True)]

    def own_name(self, name: str) -> str:
        """What a tensor of timm's file is called here."""
        return name if name.startswith("model.") else f"model.{name}"


def resized(h: Tensor, side: int) -> Tensor:
    """[N, C, s, s] -> [N, C, side, side]: means of what is too large, bilinear between what is too small."""
    if h.shape[-1] > side:
        return F.adaptive_avg_pool2d(h, side)
    return h if h.shape[-1] == side else F.interpolate(h, side, mode="bilinear", align_corners=False)


def backbone(name: str, side: int) -> tuple[Stages | Pyramid, tuple[Tensor, Tensor] | None]:
    """timm's network of that name with random weights, and the scaling of its input.

    That is the mean and the standard deviation [1, 3, 1, 1] that it was trained with, for images in [-1, 1]; None = 0
    and 1.
    Raises ConfigError for a name timm does not have and a network without maps of images of `side` pixels.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise ConfigError(
            f"timm has no network called '{name}'{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"model.discriminator.feature_network takes one of timm.list_models(), such as {OFFICIAL}"
        )
    with torch.random.fork_rng(devices=[]):  # what other networks draw does not depend on this one
        torch.manual_seed(0)
        net = _created(name, side)
    trained: Any = timm.get_pretrained_cfg(name)
    shift, spread = (torch.tensor(values).view(1, 3, 1, 1) * 2 for values in (trained.mean, trained.std))
    return net, None if {*trained.mean, *trained.std} == {0.5} else (shift - 1, spread)


def _created(name: str, side: int) -> Stages | Pyramid:
    try:
        with torch.device("meta"):
            trial: Any = timm.create_model(name, pretrained=False)
            more: dict[str, Any] = {"dynamic_img_size": True} if hasattr(trial, "dynamic_img_size") else {}
            _cut(timm.create_model(name, pretrained=False, **more)).eval()(torch.empty(1, 3, side, side))
    except Exception as error:  # networks say in many ways that they cannot
        raise ConfigError(
            f"model.discriminator.feature_network {name} gives no four maps of images of {side} pixels "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); choose another size "
            f"(interpolate_to) or network, such as {OFFICIAL}, a ConvNeXt or a DeiT"
        ) from error
    return _cut(timm.create_model(name, pretrained=False, **more))


def _cut(net: Any) -> Stages | Pyramid:
    indices = _four([stage["reduction"] for stage in net.feature_info])
    return (Stages if hasattr(net, "conv_stem") and hasattr(net, "blocks") else Pyramid)(net, indices)


def _four(strides: list[int]) -> list[int]:
    """Which of a network's maps are looked at: the last of each stride, else those a quarter of the depth apart."""
    if set(STRIDES) <= set(strides):
        return [max(i for i, stride in enumerate(strides) if stride == wanted) for wanted in STRIDES]
    if len(set(strides)) == 1 and len(strides) >= len(STRIDES):
        return [len(strides) * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    raise ValueError(f"its strides are {strides}")


def load_features(net: Stages | Pyramid, weights: Mapping[str, Tensor], name: str) -> None:
    """Load timm's state dict of the network `name`, tensors [...] under timm's or official ProjectedGAN names.

    Parts that are not looked at (the classifier) are left out. Raises WeightsError if a name or a shape does not fit.
    """
    own = net.state_dict()
    depth = 1 if isinstance(net, Stages) else 2

    def part(key: str) -> tuple[str, ...]:
        return tuple(key.split(".")[:depth])

    known = {part(key) for key in own}
    given = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    for key, value in weights.items():
        key = net.own_name(key.removeprefix("feature_network.").removeprefix("pretrained."))
        if part(key) in known:
            given[key] = value
    wrong = sorted(set(own) ^ set(given)) or sorted(n for n in own if own[n].shape != given[n].shape)
    if wrong:
        raise WeightsError(
            f"the feature network weights are not those of {name}: {len(wrong)} tensors do not fit, "
            f"the first is {wrong[0]}; give timm's file of {name}"
        )
    net.load_state_dict(given)


@torch.no_grad()
def randomise_features(net: nn.Module) -> None:
    """Random features, the same in every run, as a weights file is: checkpoints leave them out.

    He-normal convolutions, and batch-norm statistics measured on smooth noise; all else as timm begins.

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
    if norms:
        net(images)
    for norm in norms:
        norm.eval()
