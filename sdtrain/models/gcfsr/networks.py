"""GCFSR (He et al. 2022): face super-resolution with a controllable factor, and its discriminator; official names.

The generator takes a face already enlarged to output size and the factor it was enlarged by. Width follows `narrow`;
the layer that makes the style codes has the input width its tensor really has, so narrow networks run and official
files (narrow 1) still load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.constants import constant
from sdtrain.errors import ConfigError
from sdtrain.models.gcfsr.options import DiscriminatorOptions, GeneratorOptions
from sdtrain.models.rrdbnet.networks import check_layers
from sdtrain.models.stylegan2.layers import FIR_TAPS
from sdtrain.models.stylegan2.ops import SQRT2, conv_down, conv_same, conv_up, fir_filter, upfirdn2d, upsample2d
from sdtrain.rng import Draws


def channels(options: GeneratorOptions | DiscriminatorOptions, resolution: int) -> dict[int, int]:
    """Channels of every level {4, 8, ..., resolution}; ConfigError for a size or width that cannot work."""
    if resolution < 32 or resolution > 1024 or resolution & (resolution - 1):
        raise ConfigError(f"GCFSR has no {resolution} px network; use a power of two from 32 to 1024")
    n, mn = options.narrow, options.channel_multiplier * options.narrow
    widths = {r: int(512 * n) for r in (4, 8, 16, 32)} | {r: int(16384 / r * mn) for r in (64, 128, 256, 512, 1024)}
    used = {r: width for r, width in widths.items() if r <= resolution}
    empty = [r for r, width in used.items() if width < (2 if r == 4 else 1)]
    if empty:
        raise ConfigError(
            f"narrow = {options.narrow:g} leaves the {empty[-1]} px level of a {resolution} px GCFSR without channels; "
            "use a larger C or a smaller resolution"
        )
    return used


LOW_PASS = tuple(fir_filter(FIR_TAPS).flatten().tolist())


def low_pass(like: Tensor) -> Tensor:
    """The normalised outer product of [1, 3, 3, 1], [4, 4], where and as `like` [...] is."""
    return constant(LOW_PASS, like.device, like.dtype).view(4, 4)


def fir(x: Tensor, pad: tuple[int, int], up: bool = False) -> Tensor:
    """Smooth by the normalised outer product of [1, 3, 3, 1]: [N, C, H, W] -> [N, C, H + p - 3, W + p - 3].

    p = sum(pad). `up` inserts zeros first and gives [N, C, 2H, 2W], whatever `pad`.
    """
    return upsample2d(x, low_pass(x)) if up else upfirdn2d(x, low_pass(x), padding=pad * 2)


class Smooth(nn.Module):
    """The anti-alias filter before a stride-2 convolution of size `kernel`. No state."""

    def __init__(self, kernel: int):
        super().__init__()
        self.pad = (1, 1) if kernel == 1 else (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H - 1, W - 1] for kernel 1, else [N, C, H + 1, W + 1]."""
        return fir(x, self.pad)


class EqualConv2d(nn.Module):
    """Convolution with a unit-normal weight scaled at run time by 1 / sqrt(fan_in)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None
        self.stride, self.padding, self.gain = stride, padding, 1 / math.sqrt(c_in * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H', W'], sides as nn.Conv2d gives them."""
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding)


class EqualLinear(nn.Module):
    """Linear layer with weight N(0, 1) / lr_mul, used times lr_mul / sqrt(in); then the activation where asked for."""

    def __init__(self, c_in: int, c_out: int, bias_init: float = 0.0, lr_mul: float = 1.0, activate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / lr_mul)
        self.bias = nn.Parameter(torch.full((c_out,), bias_init))
        self.gain, self.lr_mul, self.activate = lr_mul / math.sqrt(c_in), lr_mul, activate

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in] -> [N, c_out]."""
        out = F.linear(x, self.weight * self.gain, self.bias * self.lr_mul)
        return F.leaky_relu(out, 0.2) * SQRT2 if self.activate else out


class FusedLeakyReLU(nn.Module):
    """sqrt(2) leaky_relu(x + bias, 0.2): the bias of the layer before belongs to the activation."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return F.leaky_relu_(torch.add(self.bias.view(1, -1, 1, 1) * SQRT2, x, alpha=SQRT2), 0.2)


def conv_layer(
    c_in: int, c_out: int, kernel: int, down: bool = False, bias: bool = True, activate: bool = True
) -> nn.Sequential:
    """Equalised convolution, smoothed and strided when `down`, with the activation (or a plain bias, or neither)."""
    layers: list[nn.Module] = [Smooth(kernel)] if down else []
    stride, padding = (2, 0) if down else (1, kernel // 2)
    layers.append(EqualConv2d(c_in, c_out, kernel, stride, padding, bias=bias and not activate))
    return nn.Sequential(*layers, *([FusedLeakyReLU(c_out)] if activate else []))


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled by a style, and whose output is renormalised (`demodulate`).

    Written as scale, convolve, rescale: equal to modulating the weight per sample, exportable, one convolution a batch.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        style: int,
        demodulate: bool = True,
        sample: Literal["up", "down"] | None = None,
    ):
        super().__init__()
        self.modulation = EqualLinear(style, c_in, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(1, c_out, c_in, kernel, kernel))
        self.demodulate, self.sample = demodulate, sample
        self.gain = 1 / math.sqrt(c_in * kernel**2)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, c_in, H, W], style [N, S] -> [N, c_out, H, W], twice the size for `up`, half for `down` (kernel 3)."""
        s = self.modulation(style)
        weight = self.weight[0] * self.gain
        out = self._convolve(x * s[:, :, None, None], weight)
        if not self.demodulate:
            return out
        norm = torch.rsqrt(s.square() @ weight.square().sum((2, 3)).t() + 1e-8)
        return out * norm[:, :, None, None]

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.sample == "up":
            return conv_up(x, weight, low_pass(x))
        return conv_down(x, weight, low_pass(x)) if self.sample == "down" else conv_same(x, weight)


def unit_scales(s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise a pair of scales [N, C] to a^2 + b^2 = 1, element by element."""
    norm = torch.rsqrt(s1.square() + s2.square() + 1e-8)
    return s1 * norm, s2 * norm


class Condition(NamedTuple):
    """What the encoder tells one decoder level: scales [N, C] for its own map and for `shift` [N, C, H, W]."""

    s1: Tensor
    s2: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        a, b = unit_scales(self.s1, self.s2)
        return torch.addcmul(b[:, :, None, None] * self.shift, a[:, :, None, None], x)


class StyleConv(nn.Module):
    """Modulated convolution, noise, feature modulation where a condition is given, activation."""

    def __init__(self, c_in: int, c_out: int, style: int, sample: Literal["up"] | None = None):
        super().__init__()
        self.modulated_conv = ModulatedConv2d(c_in, c_out, 3, style, sample=sample)
        self.weight = nn.Parameter(torch.zeros(1))  # strength of the noise
        self.activate = FusedLeakyReLU(c_out)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None, condition: Condition | None = None) -> Tensor:
        """x [N, c_in, h, w], style [N, S], noise [N, 1, H, W] or None -> [N, c_out, H, W], where H = 2h for `up`."""
        out = self.modulated_conv(x, style)
        if noise is not None:
            out = out + self.weight * noise
        if condition is not None:
            out = condition(out)
        return self.activate(out)


class ToRGB(nn.Module):
    """1x1 modulated convolution to three channels, plus the doubled image of the level below."""

    def __init__(self, c_in: int, style: int):
        super().__init__()
        self.modulated_conv = ModulatedConv2d(c_in, 3, 1, style, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, style: Tensor, rgb: Tensor | None = None) -> Tensor:
        """x [N, c_in, H, W], style [N, S], rgb [N, 3, H/2, W/2] or None -> [N, 3, H, W]."""
        out = self.modulated_conv(x, style) + self.bias
        return out if rgb is None else out + fir(rgb, (2, 1), up=True)


class Generator(nn.Module):
    """(face [N, 3, S, S] in [-1, 1] already at output size, factor) -> face [N, 3, S, S], not clamped.

    Noise maps come from `draws` and depend on their size alone, so a teacher and a student of any width given the same
    draws share them; `draws=None` means no noise. Layers returned by name: `enc.R` (encoder at R px), `final_conv` (the
    16 px start map), `style_conv.R` (the decoder's last map at R px), `last_style_conv` (the one at full size, which
    SDAKD distils) and `codes` [N, num_latent, style].
    """

    fm_layer = "last_style_conv"
    compiles: ClassVar[tuple[str, ...]] = ("conv_body_first", "style_conv1", "style_convs.*", "to_rgbs.*")

    def __init__(self, options: GeneratorOptions, *, resolution: int, num_classes: int = 0):
        super().__init__()
        self.options, self.resolution, self.scale = options, resolution, 1
        ch, style = channels(options, resolution), options.num_style_feat
        self.channels, self.log_size = ch, int(math.log2(resolution))
        self.sizes = [2**k for k in range(4, self.log_size + 1)]  # decoder levels, 16 upwards
        self.num_latent = 2 * (self.log_size - 2) - 2
        downward = self.sizes[::-1]

        self.conv_body_first = conv_layer(3, ch[resolution], 3)
        self.conv_body_down = nn.ModuleList(conv_layer(ch[r], ch[r // 2], 3, down=True) for r in downward[:-1])
        self.final_conv = conv_layer(ch[16], ch[16], 3)
        narrowest = ch[4] if options.blind else ch[4] // 2
        self.final_down1 = conv_layer(ch[16], ch[8], 3, down=True)
        self.final_down2 = conv_layer(ch[8], narrowest, 3, down=True)
        self.final_linear = EqualLinear(16 * narrowest, self.num_latent * style, activate=True)

        self.condition_scale1 = nn.ModuleList(EqualLinear(1, ch[r], bias_init=1.0) for r in downward)
        self.condition_scale2 = nn.ModuleList(EqualLinear(1, ch[r], bias_init=1.0) for r in downward)
        self.condition_shift = nn.ModuleList(conv_layer(ch[r], ch[r], 3, activate=False) for r in downward)

        self.style_conv1 = StyleConv(ch[16], ch[16], style)
        self.to_rgb1 = ToRGB(ch[16], style)
        self.style_convs = nn.ModuleList()
        for r in self.sizes[1:]:
            self.style_convs.append(StyleConv(ch[r // 2], ch[r], style, sample="up"))
            self.style_convs.append(StyleConv(ch[r], ch[r], style))
        self.to_rgbs = nn.ModuleList(ToRGB(ch[r], style) for r in self.sizes[1:])
        levels = self.sizes if options.extra_convs else []
        self.extra_convs = nn.ModuleList(
            nn.ModuleList(StyleConv(ch[r], ch[r], style) for _ in range(options.extra_convs)) for r in levels
        )
        self.noises = self._unused_noises()

    def _unused_noises(self) -> nn.Module:
        # official files carry these maps, whose sizes start at 4 px where the decoder starts at 16: nobody can use them
        noises = nn.Module()
        for i in range(2 * (self.log_size - 4) + 1):
            size = 2 ** ((i + 5) // 2)
            noises.register_buffer(f"noise{i}", torch.randn(1, 1, size, size))
        return noises

    @property
    def layer_names(self) -> tuple[str, ...]:
        levels = (*(f"enc.{r}" for r in self.sizes), *(f"style_conv.{r}" for r in self.sizes))
        return (*levels, "final_conv", "last_style_conv", "codes")

    @property
    def distilled_layers(self) -> tuple[str, ...]:
        """The maps that OMGD and DCD distil: the decoder at 16, 64, 256 px and full size."""
        return tuple(f"style_conv.{r}" for r in self.sizes if r in (16, 64, 256, self.resolution))

    def layer_channels(self, layer: str) -> int:
        """Channels of a returned layer; ConfigError for a name that does not exist."""
        check_layers((layer,), self.layer_names)
        if layer == "codes":
            return self.num_latent
        named = {"final_conv": 16, "last_style_conv": self.resolution}
        return self.channels[named[layer] if layer in named else int(layer.split(".")[1])]

    def forward(
        self,
        x: Tensor,
        factor: Tensor | float,
        draws: Draws | None = None,
        *,
        noise: Sequence[Tensor | None] | None = None,
        layers: Sequence[str] = (),
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """x [N, 3, R, R] in [-1, 1] -> the image [N, 3, R, R], not clamped, or (image, {layer: map}).

        `factor`: a number or one a sample [N]; `noise`: the maps [N, 1, r, r], one at 16 px and two a level above.
        A layer `enc.R` or `style_conv.R` is [N, C, R, R]. Raises ConfigError for a layer that does not exist and
        ValueError for x of another size.
        """
        check_layers(layers, self.layer_names)
        maps: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> Tensor:
            """value [N, C, h, w], or the codes [N, num_latent, S], as it is, noted if it was asked for."""
            if name in layers:
                maps[name] = value
            return value

        encoded = self._encode(x)
        for r, feature in encoded.items():
            keep(f"enc.{r}", feature)
        start = keep("final_conv", self.final_conv(encoded[16]))
        codes = keep("codes", self._codes(encoded[16]))
        conditions = self._conditions(encoded, self._condition_input(x, factor))
        noise = self._noise(draws) if noise is None else list(noise)

        out = self._deepen(0, self.style_conv1(start, codes[:, 0], noise[0], conditions[16]), codes[:, 0])
        keep("style_conv.16", out)
        rgb = self.to_rgb1(out, codes[:, 1])
        # the picture of one level and the doubling into the next share a code
        for t, r in enumerate(self.sizes[1:]):
            out = self.style_convs[2 * t](out, codes[:, 2 * t + 1], noise[2 * t + 1])
            out = self.style_convs[2 * t + 1](out, codes[:, 2 * t + 2], noise[2 * t + 2], conditions[r])
            out = keep(f"style_conv.{r}", self._deepen(t + 1, out, codes[:, 2 * t + 2]))
            rgb = self.to_rgbs[t](out, codes[:, 2 * t + 3], rgb)
        keep("last_style_conv", out)
        return (rgb, maps) if layers else rgb

    def _deepen(self, level: int, x: Tensor, style: Tensor) -> Tensor:
        """x [N, C, r, r] through the extra convolutions of its level, whose style [N, S] is the level's."""
        for conv in self.extra_convs[level] if self.extra_convs else ():  # type: ignore[union-attr]
            x = conv(x, style, None)
        return x

    def _encode(self, x: Tensor) -> dict[int, Tensor]:
        if tuple(x.shape[-2:]) != (self.resolution, self.resolution):
            raise ValueError(f"this GCFSR works at {self.resolution} x {self.resolution} px, got {tuple(x.shape[-2:])}")
        encoded = {self.resolution: self.conv_body_first(x)}
        for r, down in zip(self.sizes[::-1], self.conv_body_down):
            encoded[r // 2] = down(encoded[r])
        return encoded

    def _codes(self, feature: Tensor) -> Tensor:
        flat = self.final_down2(self.final_down1(feature)).flatten(1)
        return self.final_linear(flat).view(-1, self.num_latent, self.options.num_style_feat)

    def _condition_input(self, x: Tensor, factor: Tensor | float) -> Tensor:
        if self.options.blind:
            return x.new_ones(x.shape[0], 1)
        c = torch.as_tensor(factor, dtype=x.dtype, device=x.device) / self.options.factor_max
        return c.reshape(-1, 1).expand(x.shape[0], 1)

    def _conditions(self, encoded: dict[int, Tensor], c: Tensor) -> dict[int, Condition]:
        layers = zip(self.sizes[::-1], self.condition_scale1, self.condition_scale2, self.condition_shift)
        return {r: Condition(scale1(c), scale2(c), shift(encoded[r])) for r, scale1, scale2, shift in layers}

    def _noise(self, draws: Draws | None) -> list[Tensor | None]:
        sizes = [16, *(r for r in self.sizes[1:] for _ in range(2))]
        if draws is None:
            return [None] * len(sizes)
        return [draws.normal(f"noise{i}", 1, r, r) for i, r in enumerate(sizes)]


class ResBlock(nn.Module):
    """(conv2(conv1(x)) + skip(x)) / sqrt(2) at half the size."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = conv_layer(c_in, c_in, 3)
        self.conv2 = conv_layer(c_in, c_out, 3, down=True)
        self.skip = conv_layer(c_in, c_out, 1, down=True, bias=False, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H/2, W/2]."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / SQRT2


def minibatch_stddev(x: Tensor, group: int) -> Tensor:
    """Append the standard deviation over groups of samples as a channel: [N, C, H, W] -> [N, C + 1, H, W].

    It is averaged over channels and pixels. Sample i belongs to group i mod (N / group), as in StyleGAN2. Raises
    ConfigError unless N is a multiple of `group` or smaller than it.
    """
    n, _, h, w = x.shape
    group = min(n, group)
    if n % group:
        raise ConfigError(
            f"minibatch stddev groups of {group} do not divide {n} samples; change ghost_batch or stddev_group"
        )
    std = (x.view(group, -1, *x.shape[1:]).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat([x, std.repeat(group).view(n, 1, 1, 1).expand(n, 1, h, w)], 1)


class Discriminator(nn.Module):
    """[N, 3, R, R] in [-1, 1] -> logits [N, 1]: StyleGAN2's residual discriminator, by default no minibatch stddev."""

    ghost_batch: int | None = None

    def __init__(self, options: DiscriminatorOptions, *, resolution: int, num_classes: int = 0):
        super().__init__()
        self.options, self.resolution = options, resolution
        ch = channels(options, resolution)
        self.hidden_channels = ch[4]
        sizes = [2**k for k in range(int(math.log2(resolution)), 2, -1)]
        self.conv_body = nn.Sequential(conv_layer(3, ch[resolution], 1), *(ResBlock(ch[r], ch[r // 2]) for r in sizes))
        self.final_conv = conv_layer(ch[4] + bool(options.stddev_group), ch[4], 3)
        self.final_linear = nn.Sequential(EqualLinear(16 * ch[4], ch[4], activate=True), EqualLinear(ch[4], 1))

    def features(self, x: Tensor) -> Tensor:
        """[N, 3, R, R] in [-1, 1] -> the last convolutional map [N, ch(4), 4, 4].

        Raises ConfigError where `stddev_group` does not divide a ghost.
        """
        out = self.conv_body(x)
        group = self.options.stddev_group
        if group:
            ghosts = out.split(self.ghost_batch or len(out))
            out = torch.cat([minibatch_stddev(ghost, group) for ghost in ghosts])
        return self.final_conv(out)

    def forward(self, x: Tensor, c: Tensor | None = None, hidden: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[N, 3, R, R] in [-1, 1] -> logits [N, 1], with `features` where `hidden`; c is ignored.

        Raises ConfigError as `features` does.
        """
        last = self.features(x)
        logits = self.final_linear(last.flatten(1))
        return (logits, last) if hidden else logits
