"""SRVGGNetCompact, the small generator of realesr-general-x4v3 and animevideov3, at any width; official names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.models.rrdbnet.networks import check_layers
from sdtrain.models.srvgg.options import GeneratorOptions


def _activation(kind: str, channels: int) -> nn.Module:
    if kind == "prelu":
        return nn.PReLU(channels)
    return nn.ReLU(inplace=True) if kind == "relu" else nn.LeakyReLU(0.1, inplace=True)


class Generator(nn.Module):
    """[N, 3, H, W] in [0, 1] -> [N, 3, sH, sW]: a plain stack at input size, pixel-shuffle, plus the enlarged input.

    The input is enlarged by nearest neighbour. The layer `body.K` is hidden map K from 0, after its activation; `trunk`
    is the last one.
    """

    fm_layer = "trunk"
    compiles: ClassVar[tuple[str, ...]] = ("",)

    def __init__(self, options: GeneratorOptions, *, resolution: int | None = None, num_classes: int = 0):
        super().__init__()
        self.options, self.scale = options, options.upscale
        nf = options.num_feat
        body: list[nn.Module] = [nn.Conv2d(options.num_in_ch, nf, 3, 1, 1), _activation(options.act_type, nf)]
        for _ in range(options.num_conv):
            body += [nn.Conv2d(nf, nf, 3, 1, 1), _activation(options.act_type, nf)]
        body.append(nn.Conv2d(nf, options.num_out_ch * options.upscale**2, 3, 1, 1))
        self.body = nn.ModuleList(body)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return (*(f"body.{k}" for k in range(self.options.num_conv + 1)), "trunk")

    @property
    def distilled_layers(self) -> tuple[str, ...]:
        """The maps that OMGD and DCD distil: the first, and those after each third of the hidden convolutions."""
        return tuple(dict.fromkeys(f"body.{round(third * self.options.num_conv / 3)}" for third in range(4)))

    def layer_channels(self, layer: str) -> int:
        """Channels of a returned layer; ConfigError for a name that does not exist."""
        check_layers((layer,), self.layer_names)
        return self.options.num_feat

    def forward(self, x: Tensor, layers: Sequence[str] = ()) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """[N, 3, H, W] in [0, 1] -> the image [N, 3, sH, sW], or (image, {layer: map}) when `layers` are asked for.

        A map is [N, num_feat, H, W]. Raises ConfigError for a layer that does not exist.
        """
        check_layers(layers, self.layer_names)
        trunk, maps = x, {}
        for i, layer in enumerate(self.body[:-1]):
            trunk = layer(trunk)
            if i % 2 and f"body.{i // 2}" in layers:
                maps[f"body.{i // 2}"] = trunk
        if "trunk" in layers:
            maps["trunk"] = trunk
        out = F.pixel_shuffle(self.body[-1](trunk), self.scale)
        out = out + F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return (out, maps) if layers else out
