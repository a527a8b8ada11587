"""What a student of SDAKD learns from its teacher besides pixels (arXiv 2510.03870): features of a frozen VGG, the
feature map distilled through a two-layer MLP, and the probability of "real" (Eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sdtrain.errors import ConfigError
from sdtrain.losses.vgg import Frozen, Net, Trunk, imagenet_statistics, layer_names, load_fitting
from sdtrain.models.layout import for_convolutions
from sdtrain.precision import full_precision
from sdtrain.rng import generator

# VGG and its layers, taken before the ReLU, as the two works train
REAL_ESRGAN = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
GCFSR = {"conv4_3": 1.0}


class VGGFeatures(Frozen):
    """Maps of a frozen VGG by layer name: RGB [N, 3, H, W] in [0, 1] -> {name: [N, C, h, w]}.

    `state` has torchvision's names (`features.0.weight`; the classifier is ignored). None is a seeded random network,
    whose distances still order distortions. Raises WeightsError for a file of another network.
    """

    compiles: ClassVar[tuple[str, ...]] = ("",)
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        layers: Sequence[str],
        state: Mapping[str, Tensor] | None = None,
        *,
        net: Net = "vgg19",
        imagenet_norm: bool = True,
        seed: int = 0,
    ):
        """Raises ConfigError for a layer that this VGG has not."""
        super().__init__()
        known = layer_names(net)
        if unknown := [layer for layer in layers if layer not in known]:
            raise ConfigError(f"{net} has no layer {unknown[0]!r}; it has {', '.join(known)}")
        self.net_name, self.layers, self.imagenet_norm = net, tuple(layers), imagenet_norm
        self.features = Trunk(net, max(layers, key=known.index))
        for name, value in zip(("mean", "std"), imagenet_statistics()):
            self.register_buffer(name, value, persistent=False)
        load_fitting(self, self._random(seed) if state is None else state, net, f"torchvision's file of {net}")
        self.freeze()

    def _random(self, seed: int) -> dict[str, Tensor]:
        state = {key: torch.zeros_like(value) for key, value in self.state_dict().items()}
        for key, value in state.items():
            if value.ndim == 4:
                value.normal_(0, math.sqrt(2 / (9 * value.shape[1])), generator=generator(self.net_name, seed, key))
        return state

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """RGB [N, 3, H, W] in [0, 1] -> maps [N, C, h, w] by layer, float32."""
        with full_precision(x.device):
            out = x.float()
            if self.imagenet_norm:
                out = (out - self.mean) / self.std
            return dict(self.features.maps(for_convolutions(out), self.layers))


def gram(x: Tensor) -> Tensor:
    """F F^T / (C H W): [N, C, H, W] -> [N, C, C]."""
    flat = x.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


class PerceptualLoss(nn.Module):
    """sum_l w_l mean |phi_l(x) - phi_l(target)|, images [N, 3, H, W] in [0, 1], or in [-1, 1] with `range_norm`.

    The gradient reaches `x` alone. `for_real_esrgan` and `for_gcfsr` are the two settings of the literature.
    """

    def __init__(
        self,
        layer_weights: Mapping[str, float],
        state: Mapping[str, Tensor] | None = None,
        *,
        net: Net = "vgg19",
        range_norm: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.layer_weights, self.range_norm = dict(layer_weights), range_norm
        self.vgg = VGGFeatures(list(layer_weights), state, net=net, seed=seed)

    @classmethod
    def for_real_esrgan(cls, state: Mapping[str, Tensor] | None = None, seed: int = 0) -> PerceptualLoss:
        """VGG19, five layers, images in [0, 1]."""
        return cls(REAL_ESRGAN, state, net="vgg19", seed=seed)

    @classmethod
    def for_gcfsr(cls, state: Mapping[str, Tensor] | None = None, seed: int = 0) -> PerceptualLoss:
        """VGG16 conv4_3, images in [-1, 1]; its weight in the sum is 0.01."""
        return cls(GCFSR, state, net="vgg16", range_norm=True, seed=seed)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """[N, 3, H, W] twice -> scalar."""
        return sum(
            (self.layer_weights[name] * F.l1_loss(a, b) for name, a, b in self._pairs(x, target)), x.new_zeros(())
        )

    def style(self, x: Tensor, target: Tensor) -> Tensor:
        """The same sum over Gram matrices: [N, 3, H, W] twice -> scalar."""
        pairs = self._pairs(x, target)
        return sum((self.layer_weights[name] * F.l1_loss(gram(a), gram(b)) for name, a, b in pairs), x.new_zeros(()))

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The compared maps [N, C, h, w] of one batch [N, 3, H, W], by layer."""
        return self.vgg((x + 1) / 2 if self.range_norm else x)

    def _pairs(self, x: Tensor, target: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        with torch.no_grad():
            aims = self.maps(target)
        return [(name, value, aims[name]) for name, value in self.maps(x).items()]


def charbonnier(x: Tensor, target: Tensor, eps: float = 1e-12) -> Tensor:
    """mean sqrt((x - target)^2 + eps), of tensors of one shape -> scalar: L1 with a gradient at zero."""
    return ((x - target).square() + eps).sqrt().mean()


class FeatureMLP(nn.Sequential):
    """MLP(F_S) = W2 relu(W1 F_S): two 1x1 convolutions, c_S -> c_T -> c_T (Liu, Wang, Chu 2023; input width of SDAKD).

    Trained with the student, thrown away afterwards. Names 0.weight, 0.bias, 2.weight, 2.bias.
    """

    def __init__(self, c_s: int, c_t: int):
        super().__init__(nn.Conv2d(c_s, c_t, 1), nn.ReLU(), nn.Conv2d(c_t, c_t, 1))


def _squares(mlp: Callable[[Tensor], Tensor], f_s: Tensor, f_t: Tensor) -> Tensor:
    return (mlp(f_s) - f_t).float().square().sum()


def mlp_loss(
    mlp: Callable[[Tensor], Tensor],
    f_s: Tensor,
    f_t: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    tiles: int = 1,
) -> Tensor:
    """L_MLP = ||MLP(F_S) - F_T||^2: [N, c_S, H, W], [N, c_T, H, W] -> scalar, float32. The teacher's map is a constant.

    `mean` is over all elements (so that the terms of Eq. 3 are of similar size with lambda_1 = 1); `sum` is over the
    elements of a sample, averaged over samples. The MLP looks at one pixel at a time, so cutting the map into `tiles`
    strips, each recomputed in the backward pass, changes nothing but memory: the hidden map of one strip at a time.

        for n, y, x: loss += sum_c (mlp(f_s[n, :, y, x]) - f_t[n, :, y, x])_c^2

    Raises ConfigError for maps of different sizes.
    """
    if f_s.shape[-2:] != f_t.shape[-2:] or len(f_s) != len(f_t):
        raise ConfigError(f"feature maps of student {tuple(f_s.shape)} and teacher {tuple(f_t.shape)} differ in size")
    f_t = f_t.detach()
    rows = math.ceil(f_s.shape[2] / tiles)
    strips = list(zip(f_s.split(rows, 2), f_t.split(rows, 2)))
    if len(strips) == 1:
        total = _squares(mlp, f_s, f_t)
    else:
        parts = [checkpoint(_squares, mlp, *s, use_reentrant=False, preserve_rng_state=False) for s in strips]
        total = torch.stack(parts).sum()
    return total / (f_t.numel() if reduction == "mean" else len(f_t))


def probability_loss(logit_s: Tensor, logit_t: Tensor, of: Literal["probability", "logit"] = "probability") -> Tensor:
    """SDAKD Eq. (2): mean (P_S - P_T)^2 with P = sigmoid(logit), over all logits of a U-Net D: any one shape -> scalar.

    `of="logit"` compares the logits. The teacher's side is a constant.
    """
    logit_s, logit_t = logit_s.float(), logit_t.detach().float()
    if of == "logit":
        return F.mse_loss(logit_s, logit_t)
    return F.mse_loss(logit_s.sigmoid(), logit_t.sigmoid())
