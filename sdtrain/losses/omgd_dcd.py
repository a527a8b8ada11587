"""Losses of the two distillation methods SDAKD is compared with: OMGD (Ren et al. 2021) and DCD (Hu et al. 2023).

Images are [N, 3, H, W] in [-1, 1]; teacher images and maps are constants. The formulas are those of the papers, which
the published DCD code departs from in several places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.losses.feature import VGGFeatures, gram
from sdtrain.models.ghost import GhostBatchNorm2d

STYLE_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
FEATURE_LAYER = "relu2_2"


def response_network(state: Mapping[str, Tensor] | None = None, seed: int = 0) -> VGGFeatures:
    """The VGG16 both methods compare images in; it sees (image + 1) / 2 without ImageNet normalisation.

    `state`: tensors [...] by torchvision's names; None = random from `seed`.
    """
    return VGGFeatures(STYLE_LAYERS, state, net="vgg16", imagenet_norm=False, seed=seed)


def responses(vgg: VGGFeatures, images: Tensor) -> dict[str, Tensor]:
    """What the network makes of images [N, 3, H, W] in [-1, 1]: maps [N, C, h, w] by layer."""
    return vgg((images + 1) / 2)  # type: ignore[no-any-return]


def style_and_feature(maps: Mapping[str, Tensor], aims: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """style = sum_l mean |Gram difference|; feature = mean |difference| at relu2_2.

    `responses` of the student and of a teacher, [N, C, h, w] by layer -> two scalars.
    """
    style = torch.stack([F.l1_loss(gram(maps[name]), gram(aims[name])) for name in STYLE_LAYERS]).sum()
    return {"style": style, "feature": F.l1_loss(maps[FEATURE_LAYER], aims[FEATURE_LAYER])}


def _window(channels: int, like: Tensor) -> Tensor:
    at = torch.arange(11, dtype=like.dtype, device=like.device) - 5
    taps = torch.exp(-at.square() / (2 * 1.5**2))
    taps = taps / taps.sum()
    return torch.outer(taps, taps).expand(channels, 1, 11, 11)


def ssim_zero_padded(x: Tensor, y: Tensor) -> Tensor:
    """OMGD's SSIM: 11x11 Gaussian (sigma 1.5), zero padding, C1 = 1e-4, C2 = 9e-4; mean over all.

    [N, C, H, W] in [-1, 1] twice -> scalar.
    """
    window = _window(x.shape[1], x)

    def blur(t: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return F.conv2d(t, window, padding=5, groups=t.shape[1])

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    score = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))
    return score.mean()


def total_variation(x: Tensor) -> Tensor:
    """OMGD's TV: the SUM of absolute neighbour differences, so it grows with batch and resolution.

    [..., H, W] -> scalar.
    """
    return (x[..., 1:, :] - x[..., :-1, :]).abs().sum() + (x[..., :, 1:] - x[..., :, :-1]).abs().sum()


def mean_total_variation(x: Tensor) -> Tensor:
    """BasicSR's TV: mean absolute difference of vertical neighbours plus that of horizontal ones.

    [..., H, W] -> scalar.
    """
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., :, 1:] - x[..., :, :-1]).abs().mean()


def omgd_terms(vgg: VGGFeatures | None, student: Tensor, *teachers: Tensor) -> list[dict[str, Tensor]]:
    """The student's terms against each teacher, unweighted; the paper adds all up.

    [N, 3, H, W] in [-1, 1] each -> scalars by name for each teacher; the gradient reaches the student alone. Without a
    VGG there is neither style nor feature.
    """
    maps, tv, found = responses(vgg, student) if vgg else {}, total_variation(student), []
    for teacher in teachers:
        terms = {"ssim": 1 - ssim_zero_padded(student, teacher.detach()), "tv": tv}
        if vgg:
            with torch.no_grad():
                aims = responses(vgg, teacher)
            terms |= style_and_feature(maps, aims)
        found.append(terms)
    return found


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_k weights_k terms_k, of scalars -> scalar."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


class Connector(nn.Sequential):
    """1x1 convolution without bias, batch norm, ReLU: to the teacher's channels (OMGD) or D's input (DCD)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(nn.Conv2d(c_in, c_out, 1, bias=False), GhostBatchNorm2d(c_out), nn.ReLU())


class Connectors(nn.Module):
    """One for each distilled layer: {layer: [N, c_in, h, w]} -> {layer: [N, c_out, h, w]}."""

    def __init__(self, layers: Sequence[str], widths: Sequence[tuple[int, int]]):
        """`widths`: channels in and out, a layer each."""
        super().__init__()
        self.layers = tuple(layers)
        self.connect = nn.ModuleList(Connector(*width) for width in widths)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps [N, c_in, h, w] by layer -> [N, c_out, h, w] by layer."""
        return {layer: connector(maps[layer]) for layer, connector in zip(self.layers, self.connect, strict=True)}


def channel_distillation(connected: Tensor, f_t: Tensor) -> Tensor:
    """OMGD's channel distillation of one layer: mean squared difference of spatial means of [N, C, H, W]."""
    return F.mse_loss(connected.mean((2, 3)), f_t.detach().mean((2, 3)))


def discriminator_distance(hidden: Callable[[Tensor], Tensor], connected_s: Tensor, connected_t: Tensor) -> Tensor:
    """DCD's feature loss of one layer: mean |D_h(conn_S(F_S)) - D_h(conn_T(F_T))|; `hidden` is D's last hidden map.

    What the connectors made of the maps, [N, C, H, W] twice -> scalar. The student's map has a gradient, and so have
    both connectors: F_T itself must come without one.
    """
    return F.l1_loss(hidden(connected_s), hidden(connected_t))
