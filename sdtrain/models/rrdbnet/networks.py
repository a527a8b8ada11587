"""RRDBNet, the generator of ESRGAN and Real-ESRGAN (Wang et al. 2018, 2021), at any width, under the official names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.models.rrdbnet.options import GeneratorOptions

RESIDUAL = 0.2  # weight of a block's update, also the slope of every leaky ReLU


def _lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, RESIDUAL, inplace=True)


def _conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, 1, 1)


class ResidualDenseBlock(nn.Module):
    """x_i = LReLU(conv_i([x, x_1 .. x_{i-1}])), output x + 0.2 conv5([x, x_1 .. x_4])."""

    def __init__(self, num_feat: int, num_grow_ch: int):
        super().__init__()
        widths = [num_grow_ch] * 4 + [num_feat]
        for i, width in enumerate(widths):
            self.add_module(f"conv{i + 1}", _conv(num_feat + i * num_grow_ch, width))
        # after all five exist, so that a seed gives the weights it gives upstream
        for conv in self.children():
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
            conv.weight.data.mul_(0.1)  # type: ignore[operator]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_feat, H, W] -> [N, num_feat, H, W]."""
        seen = [x]
        *dense, last = self.children()
        for conv in dense:
            seen.append(_lrelu(conv(torch.cat(seen, 1))))
        return torch.add(x, last(torch.cat(seen, 1)), alpha=RESIDUAL)


class RRDB(nn.Module):
    """Residual in residual: three dense blocks and an outer skip."""

    def __init__(self, num_feat: int, num_grow_ch: int):
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_feat, H, W] -> [N, num_feat, H, W]."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=RESIDUAL)


class Generator(nn.Module):
    """[N, 3, H, W] in [0, 1] -> [N, 3, scale H, scale W], neither clamped nor skipped.

    Layers that `forward(x, layers=...)` returns beside the image: `conv_first`, `body.B` (RRDB number B from 0),
    `conv_body` (raw), `trunk` (conv_first + conv_body, the map SDAKD distils) and `conv_hr` (after its leaky ReLU).
    """

    fm_layer = "trunk"
    compiles: ClassVar[tuple[str, ...]] = ("body.*",)

    def __init__(self, options: GeneratorOptions, *, resolution: int | None = None, num_classes: int = 0):
        """Raises ConfigError for a scale other than 4, 2 and 1."""
        super().__init__()
        self.options, self.scale = options, options.scale
        if options.scale not in (1, 2, 4):
            raise ConfigError(f"scale = {options.scale} is not one RRDBNet has; use 4, 2 or 1")
        nf, folded = options.num_feat, (4 // options.scale) ** 2
        self.conv_first = _conv(options.num_in_ch * folded, nf)
        self.body = nn.Sequential(*(RRDB(nf, options.num_grow_ch) for _ in range(options.num_block)))
        self.conv_body = _conv(nf, nf)
        self.conv_up1 = _conv(nf, nf)
        self.conv_up2 = _conv(nf, nf)
        self.conv_hr = _conv(nf, nf)
        self.conv_last = _conv(nf, options.num_out_ch)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return ("conv_first", *(f"body.{b}" for b in range(len(self.body))), "conv_body", "trunk", "conv_hr")

    @property
    def distilled_layers(self) -> tuple[str, ...]:
        """The maps that OMGD and DCD distil: before the blocks and after each third of them (8, 15, 23 of 23)."""
        blocks = (round(third * len(self.body) / 3) for third in (1, 2, 3))
        return ("conv_first", *dict.fromkeys(f"body.{max(b, 1) - 1}" for b in blocks))

    def layer_channels(self, layer: str) -> int:
        """Channels of a returned layer; ConfigError for a name that does not exist."""
        check_layers((layer,), self.layer_names)
        return self.options.num_feat

    def forward(self, x: Tensor, layers: Sequence[str] = ()) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """[N, 3, H, W] in [0, 1] -> the image [N, 3, scale H, scale W], or (image, {layer: map}) for `layers`.

        Maps are [N, num_feat, scale H / 4, scale W / 4]; `conv_hr` has the size of the image. Raises ConfigError for a
        layer that does not exist and ValueError unless H and W are multiples of 4 / scale.
        """
        check_layers(layers, self.layer_names)
        maps: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> Tensor:
            """x [N, num_feat, h, w] as it is, noted if it was asked for."""
            if name in layers:
                maps[name] = x
            return x

        head = keep("conv_first", self.conv_first(self._fold(x)))
        out = head
        for b, block in enumerate(self.body):
            out = keep(f"body.{b}", block(out))
        out = keep("trunk", head + keep("conv_body", self.conv_body(out)))
        out = _lrelu(self.conv_up1(F.interpolate(out, scale_factor=2, mode="nearest")))
        out = _lrelu(self.conv_up2(F.interpolate(out, scale_factor=2, mode="nearest")))
        out = self.conv_last(keep("conv_hr", _lrelu(self.conv_hr(out))))
        return (out, maps) if layers else out

    def _fold(self, x: Tensor) -> Tensor:
        times = 4 // self.scale
        if x.shape[-2] % times or x.shape[-1] % times:
            raise ValueError(
                f"a x{self.scale} RRDBNet needs sides that are multiples of {times}, got {tuple(x.shape[-2:])}"
            )
        return F.pixel_unshuffle(x, times) if times > 1 else x


def check_layers(layers: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError when a feature layer is asked for that the network does not have."""
    for layer in layers:
        if layer not in known:
            raise ConfigError(f"there is no feature layer {layer!r}; this network has {', '.join(known)}")
