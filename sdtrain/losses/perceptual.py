"""LPIPS (Zhang et al. 2018, version 0.1): L_SD of SD-GAN and the distance of Table 3.

The numbers are those of the `lpips` package; the wrapper differs where that package is awkward inside a training step:
the trunk comes from a local file, arithmetic is fp32 whatever autocast says, a dead feature location has a finite
gradient, only `x` gets a gradient, and no parent's `.train()` can wake the dropout or the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.files import in_package
from sdtrain.losses.vgg import WIDTHS, Frozen, Trunk, load_fitting
from sdtrain.precision import full_precision
from sdtrain.rng import generator

Net = Literal["vgg", "alex"]

# where the trunk is cut: the last layer of every slice is the ReLU whose output is compared
CUTS: dict[str, tuple[int, ...]] = {"vgg": (4, 9, 16, 23, 30), "alex": (2, 5, 8, 10, 12)}
CHANNELS: dict[str, tuple[int, ...]] = {"vgg": WIDTHS, "alex": (64, 192, 384, 256, 256)}
MIN_SIDE: dict[str, int] = {"vgg": 16, "alex": 32}

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

# lpips divides by sqrt(sum x^2) + 1e-10, whose gradient is NaN where all channels are dead; the term inside the root
# changes values by less than 1e-6 for any feature norm above 1e-2
EPS = 1e-10


def alex_layers() -> list[nn.Module]:
    """Layers of torchvision's `alexnet.features` up to the last ReLU."""
    convs = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers: list[nn.Module] = []
    for position, (c_in, c_out, kernel, stride, padding) in enumerate(convs):
        if position in (1, 2):
            layers.append(nn.MaxPool2d(3, 2))
        layers += [nn.Conv2d(c_in, c_out, kernel, stride, padding), nn.ReLU()]
    return layers


def unit_length(features: Tensor, eps: float = EPS) -> Tensor:
    """Scale every location of [N, C, H, W] to unit length over C; a location of zeros stays zero, gradient finite."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + eps)


def package_heads(net: Net = "vgg") -> dict[str, Tensor]:
    """The five weights `lin0.model.1.weight` [1, C, 1, 1], ... that the lpips package ships (v0.1), without its import.

    Raises WeightsError when the package is not installed.
    """
    path = in_package("lpips", f"weights/v0.1/{net}.pth")
    if path is None:
        raise WeightsError(
            "LPIPS needs the linear heads of the package lpips, which is not installed; run `pip install lpips`."
        )
    # a file of an installed package, whose code could run as well
    return torch.load(path, map_location="cpu", weights_only=True)


class LPIPS(Frozen):
    """d(x, target) = sum_l mean_hw w_l . (unit(f_l(x)) - unit(f_l(target)))^2.

    `state` holds the trunk under torchvision's names (`features.0.weight`, ...) or a whole LPIPS state dict under the
    package's names (`net.slice1.0.weight`, ..., heads optional). None is the package's `pnet_rand`: a random trunk
    (Kaiming normal, fan out, zero bias, from `seed`) below its heads, which still orders distortions sensibly.
    `trunk_dtype=torch.bfloat16` runs the convolutions in bf16; normalisation and sums stay fp32.
    """

    compiles: ClassVar[tuple[str, ...]] = ("net.*",)
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        state: dict[str, Tensor] | None = None,
        *,
        net: Net = "vgg",
        trunk_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__()
        self.kind: str = net
        layers = list(Trunk("vgg16")) if net == "vgg" else alex_layers()
        starts = (0, *CUTS[net])
        self.net = nn.ModuleDict()
        for number, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True), start=1):
            self.net[f"slice{number}"] = nn.Sequential()
            for index in range(start, stop):
                self.net[f"slice{number}"].add_module(str(index), layers[index])
        for number, width in enumerate(CHANNELS[net]):
            head = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{number}", nn.ModuleDict({"model": nn.ModuleDict({"1": head})}))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        trunk = random_trunk(self, seed) if state is None else lpips_names(state, net)
        advice = "torchvision's file of that network or a full LPIPS state dict"
        load_fitting(self, {**package_heads(net), **trunk}, f"LPIPS ({net})", advice)
        # a tenth (fp32) to a sixth (bf16) faster on a CPU
        self.net.to(trunk_dtype).to(memory_format=torch.channels_last)
        self.freeze()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Distance of each pair: RGB [N, 3, H, W] in [-1, 1] twice -> [N], fp32. The gradient reaches `x` alone.

        Raises ConfigError for images below 16 px (vgg) or 32 px (alex).
        """
        return self.per_layer(x, target).sum(0)

    def per_layer(self, x: Tensor, target: Tensor) -> Tensor:
        """The five summands, [5, N], of [N, 3, H, W] in [-1, 1] twice.

        Raises ConfigError for images below 16 px (vgg) or 32 px (alex).
        """
        self._check(x, target)
        with torch.no_grad():
            aims = [unit_length(features) for features in self._features(target)]
        with full_precision(x.device):
            diffs = [(unit_length(f) - aim).square() for f, aim in zip(self._features(x), aims, strict=True)]
            return torch.stack([self._head(number)(diff).mean((1, 2, 3)) for number, diff in enumerate(diffs)])

    def _head(self, number: int) -> nn.Module:
        return self.get_submodule(f"lin{number}.model.1")

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """The five ReLU outputs in fp32, one after the other so that a caller may let go of each."""
        with full_precision(images.device):
            h = ((images.float() - self.shift) / self.scale).to(next(self.net.parameters()).dtype)
            h = h.contiguous(memory_format=torch.channels_last)
        for part in self.net.values():
            with full_precision(images.device):
                h = part(h)
            yield h.float()

    def _check(self, x: Tensor, target: Tensor) -> None:
        if x.shape != target.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ConfigError(
                f"LPIPS compares RGB batches of equal shape, got {list(x.shape)} and {list(target.shape)}."
            )
        if min(x.shape[2:]) < MIN_SIDE[self.kind]:
            raise ConfigError(
                f"LPIPS ({self.kind}) needs images of at least {MIN_SIDE[self.kind]} px, got {min(x.shape[2:])}; "
                "use larger images or a pixel distance (l1, l2)."
            )


def lpips_names(state: dict[str, Tensor], net: Net) -> dict[str, Tensor]:
    """Translate torchvision's `features.N.x` into lpips' `net.sliceK.N.x`: tensors [...] by name, shapes unchanged.

    Other names pass through.
    """
    renamed = {}
    for key, tensor in state.items():
        if key.startswith("features."):
            _, index, leaf = key.split(".")
            part = sum(int(index) >= cut for cut in CUTS[net]) + 1
            key = f"net.slice{part}.{index}.{leaf}"
        renamed[key] = tensor
    return renamed


def random_trunk(model: LPIPS, seed: int) -> dict[str, Tensor]:
    """A trunk as torchvision initialises VGG (normal, variance 2 / fan out, zero bias): a function of `seed`."""
    state = {}
    for key, tensor in model.net.state_dict(prefix="net.").items():
        state[key] = torch.zeros_like(tensor)
        if tensor.ndim == 4:
            fan_out = tensor.shape[0] * tensor.shape[2] * tensor.shape[3]
            state[key].normal_(0, (2 / fan_out) ** 0.5, generator=generator("lpips trunk", model.kind, seed, key))
    return state
