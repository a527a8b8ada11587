"""VGG16 and VGG19 (Simonyan and Zisserman 2015), the frozen networks behind LPIPS, perceptual losses and precision.

Layers and tensor names are torchvision's, without its import: `features.0.weight` is conv1_1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from sdtrain.constants import IMAGENET_MEAN, IMAGENET_STD
from sdtrain.errors import WeightsError

Net = Literal["vgg16", "vgg19"]
BLOCKS: dict[str, tuple[int, ...]] = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # convolutions in each
WIDTHS = (64, 128, 256, 512, 512)


def layer_names(net: Net) -> list[str]:
    """Names by position in `features`: conv1_1, relu1_1, conv1_2, relu1_2, pool1, conv2_1, ..."""
    names = []
    for block, depth in enumerate(BLOCKS[net], start=1):
        names += [f"{kind}{block}_{number + 1}" for number in range(depth) for kind in ("conv", "relu")]
        names.append(f"pool{block}")
    return names


class Trunk(nn.Sequential):
    """The convolutions of a VGG up to the layer `last`. No weights, no in-place ReLU."""

    names: list[str]

    def __init__(self, net: Net, last: str = "pool5"):
        self.names = layer_names(net)[: layer_names(net).index(last) + 1]
        layers: list[nn.Module] = []
        c_in = 3
        for kind, width in ((name[:4], WIDTHS[int(name[4]) - 1]) for name in self.names):
            if kind == "conv":
                layers.append(nn.Conv2d(c_in, width, 3, padding=1))
                c_in = width
            else:
                layers.append(nn.ReLU() if kind == "relu" else nn.MaxPool2d(2, 2))
        super().__init__(*layers)

    def maps(self, x: Tensor, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, [N, C, h, w]) of the wanted layers in order, for normalised images [N, 3, H, W]."""
        for name, layer in zip(self.names, self):
            x = layer(x)
            if name in wanted:
                yield name, x


def imagenet_statistics(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, [1, 3, 1, 1] each, of images in [0, scale]."""
    mean, std = (scale * torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def load_fitting(net: nn.Module, state: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Load the tensors [...] by official name that `net` has.

    Raises WeightsError when one is missing or has another shape.
    """
    wanted = net.state_dict()
    missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if missing:
        raise WeightsError(
            f"The weights given for {what} have no fitting tensor for {missing[0]} and {len(missing) - 1} more; "
            f"give {advice}."
        )
    net.load_state_dict({key: state[key] for key in wanted})


class Frozen(nn.Module):
    """A network that is never trained: a parent's `.train()` must not change what it says."""

    def freeze(self) -> None:
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval."""
        return super().train(False)
