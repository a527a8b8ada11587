"""Feature extractors: uint8 images of any size -> one float32 row an image, and a record of which network that was.

A row is a function of the image and the batch it sits in (the last bits of a convolution depend on the batch size), so
the evaluator always extracts the same blocks of consecutive samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.engine.shared import shared_digest, shared_weights
from sdtrain.errors import WeightsError
from sdtrain.losses.vgg import Frozen, Trunk, imagenet_statistics, load_fitting
from sdtrain.metrics.inception import Inception, calibrate, randomise, resize_tf1
from sdtrain.metrics.rfid import RULE_HASH
from sdtrain.precision import full_precision
from sdtrain.rng import generator

VGG_SIDE = 224


def exact_convolutions() -> AbstractContextManager[None]:
    """Full fp32 on a GPU, always by the same algorithm: no TF32, no search."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@dataclass(frozen=True)
class Extractor:
    """`identity` says everything that decides the features: two results compare only when it is equal."""

    net: nn.Module
    width: int
    identity: dict[str, Any]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, width]."""
        with exact_convolutions():
            return self.net(images).float()


def inception(source: str, tap: int, device: torch.device | str = "cpu") -> Extractor:
    """FID's own network from a local file. Raises WeightsError when the file is missing or another network."""
    state = shared_weights("inception", source)
    if state is None:
        raise WeightsError(
            "FID's Inception was asked for with random weights; choose the extractor `random-inception`."
        )
    identity = {
        "extractor": "inception",
        "tap": tap,
        "weights": shared_digest("inception", source),
        "resize": "tf1 299",
    }
    return Extractor(Inception(tap).load(state).to(device), tap, identity)


def random_inception(
    seed: int,
    tap: int,
    calibration: Callable[[], list[Tensor]],
    device: torch.device | str = "cpu",
) -> Extractor:
    """Inception with weights from `seed`, batch-norm statistics from calibration images, uint8 [n, 3, H, W] each.

    The rule is `rfid.RULE`.
    """
    net = Inception(tap)
    randomise(net, seed)
    net.to(device)
    with exact_convolutions():
        calibrate(net, [images.to(device) for images in calibration()])
    identity = {"extractor": "random-inception", "tap": tap, "seed": seed, "rule": RULE_HASH, "resize": "tf1 299"}
    return Extractor(net, tap, identity)


class VGG16Features(Frozen):
    """torch-fidelity's `vgg16` extractor: TF1 resize to 224 px, ImageNet mean and std, fc2 after ReLU."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = Trunk("vgg16")
        hidden = [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Identity(), nn.Linear(4096, 4096), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden)
        for name, value in zip(("mean", "std"), imagenet_statistics(255)):
            self.register_buffer(name, value, persistent=False)
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> [N, 4096] float32."""
        with full_precision(images.device):
            x = (resize_tf1(images.float(), VGG_SIDE) - self.mean) / self.std
            return self.classifier(F.adaptive_avg_pool2d(self.features(x), 7).flatten(1))


def vgg16(source: str, device: torch.device | str = "cpu") -> Extractor:
    """The network of improved precision and recall; `random` is a seeded stand-in."""
    net, state = VGG16Features(), shared_weights("vgg16", source)
    if state is None:
        for name, tensor in net.state_dict().items():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.normal_(0, (2 / fan_in) ** 0.5 if tensor.ndim > 1 else 0.0, generator=generator("vgg16", name))
    else:
        load_fitting(net, state, "vgg16", "torchvision's file with its classifier")
    identity = {
        "extractor": "vgg16",
        "tap": "fc2_relu",
        "weights": shared_digest("vgg16", source),
        "resize": "tf1 224",
    }
    return Extractor(net.to(device), 4096, identity)
