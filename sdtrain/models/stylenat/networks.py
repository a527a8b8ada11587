"""StyleNAT (Walton et al. 2022, "Efficient Image Generation with Variadic Attention Heads"), official parameter names.

The generator is a pyramid of transformer blocks whose heads look at neighbourhoods of different dilation (Hydra); the
discriminator works on Haar wavelets with spectral norm (StyleSwin). The official networks live in ImageNet-normalised
space: `forward` speaks [-1, 1] like every GAN here, `Generator.render` and `Discriminator.score` the official one.
A gradient penalty taken on [-1, 1] images is (2 std)^-2, about 4.9 times, the official one: scale gamma by 0.204.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.constants import from_imagenet, to_imagenet
from sdtrain.errors import ConfigError
from sdtrain.models.ghost import SpectralConv2d, SpectralLinear
from sdtrain.models.stylegan2.fir import correlate
from sdtrain.models.stylenat.attention import BACKENDS, check_window
from sdtrain.models.stylenat.options import DiscriminatorOptions, GeneratorOptions

LEGACY_NAMES = ("rpb0", "rpb1")


def level_width(resolution: int, channel_max: int, channel_multiplier: float) -> int:
    return min(channel_max, int(channel_multiplier * 16384) // resolution)


def num_levels(resolution: int, smallest: int) -> int:
    """log2(resolution) - 1; raises ConfigError for anything but a power of two from `smallest` up."""
    if resolution < smallest or resolution & (resolution - 1):
        raise ConfigError(
            f"StyleNAT has resolution {resolution}, but its levels double: use a power of two >= {smallest}"
        )
    return int(math.log2(resolution)) - 1


def refuse_classes(num_classes: int) -> None:
    """Raises ConfigError unless num_classes is 0."""
    if num_classes:
        raise ConfigError(f"StyleNAT is unconditional, but num_classes is {num_classes}: train without labels")


class PixelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C], every row with a mean square of one."""
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer with run-time weight scale; lrelu * sqrt(2) after it when `activate`."""

    def __init__(self, c_in: int, c_out: int, lr_mul: float = 1.0, activate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(c_in), lr_mul, activate

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in] -> [N, c_out]."""
        out = F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)
        return F.leaky_relu(out, 0.2) * math.sqrt(2) if self.activate else out


class ConstantInput(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, num: int) -> Tensor:
        """Tokens [num, 16, C] in row-major order."""
        return self.input.flatten(2).transpose(1, 2).expand(num, -1, -1)


class AdaIN(nn.Module):
    """Instance norm over tokens, then gamma x + beta with [gamma, beta] linear in the style; gamma is not 1-centred."""

    def __init__(self, style_dim: int, channels: int):
        super().__init__()
        self.style = EqualLinear(style_dim, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, L, C], style [N, style_dim] -> [N, L, C]."""
        gamma, beta = self.style(style).unsqueeze(1).chunk(2, 2)
        var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-5) * gamma + beta


class Attention(nn.Module):
    """What both attentions share: qkv with layout (3, heads, head_dim), q scaled before the product, projection."""

    def __init__(self, dim: int, num_heads: int):
        """Raises ConfigError unless the heads divide `dim`."""
        super().__init__()
        if dim % num_heads:
            raise ConfigError(
                f"StyleNAT level of width {dim} has {num_heads} heads: set min_heads so that they divide it"
            )
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q * self.head_dim**-0.5, k, v


def relative_position_index(window: int) -> Tensor:
    """[w^2, w^2]: entry of the flattened (2w - 1)^2 bias table for query i and key j, by the offset j - i."""
    steps = torch.arange(window)
    offset = steps[None, :] - steps[:, None] + window - 1
    index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
    return index.reshape(window**2, window**2)


class FullAttention(Attention):
    """Self-attention of a 4x4 level with a relative position bias table."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int = 4):
        super().__init__(dim, num_heads)
        self.rpb = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 2 * window - 1, 2 * window - 1), std=0.02))
        self.register_buffer("relative_position_index", relative_position_index(window))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H, W, C] with H = W = window -> the same shape."""
        n, height, width, channels = x.shape
        q, k, v = (t.reshape(n, height * width, self.num_heads, -1).transpose(1, 2) for t in self._qkv(x))
        bias = self.rpb.flatten(1)[:, self.relative_position_index].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(n, height, width, channels))


def split_heads(num_heads: int, groups: int) -> list[int]:
    """Heads of each group; a remainder goes one each to the last groups (16 over 3: 5, 5, 6).

    Raises ConfigError when there are more groups than heads.
    """
    if groups > num_heads:
        raise ConfigError(
            f"StyleNAT level has {num_heads} heads for {groups} dilations: use fewer dilations or raise min_heads"
        )
    return [num_heads // groups + (g >= groups - num_heads % groups) for g in range(groups)]


def head_groups(kernels: tuple[int, ...], dilations: tuple[int, ...]) -> list[tuple[int, int]]:
    """(kernel, dilation) of each head group; a single kernel or dilation serves all groups.

    Raises ConfigError when both are lists, of different lengths.
    """
    groups = max(len(kernels), len(dilations))
    if {len(kernels), len(dilations)} - {1, groups}:
        raise ConfigError(
            f"StyleNAT level has kernels {kernels} and dilations {dilations}: give one or equally many of each"
        )
    return list(zip(kernels * (groups // len(kernels)), dilations * (groups // len(dilations))))


class HydraAttention(Attention):
    """Neighbourhood attention whose head groups have their own kernel and dilation (StyleNAT section 3)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernels: tuple[int, ...],
        dilations: tuple[int, ...],
        attention: str = "portable",
    ):
        super().__init__(dim, num_heads)
        self.groups = head_groups(tuple(kernels), tuple(dilations))
        self.heads = split_heads(num_heads, len(self.groups))
        tables = [torch.empty(h, 2 * k - 1, 2 * k - 1) for h, (k, _) in zip(self.heads, self.groups)]
        self.rpb = nn.ParameterList([nn.Parameter(nn.init.trunc_normal_(t, std=0.02)) for t in tables])
        self.attend = BACKENDS[attention]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H, W, C] -> the same shape."""
        widths = [h * self.head_dim for h in self.heads]
        q, k, v = (t.split(widths, -1) for t in self._qkv(x))
        dilations = [dilation for _, dilation in self.groups]
        out = [self.attend(*group) for group in zip(q, k, v, self.rpb, dilations)]
        return self.proj(torch.cat(out, -1))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, dim] -> [N, L, dim]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(AdaIN(x, w)), then x + MLP(AdaIN(x, w))."""

    def __init__(self, dim: int, resolution: int, attention: Attention, style_dim: int, mlp_ratio: float):
        super().__init__()
        self.resolution = resolution
        self.norm1 = AdaIN(style_dim, dim)
        self.attn = attention
        self.norm2 = AdaIN(style_dim, dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, resolution^2, C], style [N, style_dim] -> [N, resolution^2, C]."""
        grid = self.norm1(x, style).unflatten(1, (self.resolution, self.resolution))
        x = x + self.attn(grid).flatten(1, 2)
        return x + self.mlp(self.norm2(x, style))


def position_grid(height: int, width: int, dim: int) -> Tensor:
    """Sinusoidal positions [1, 2 dim, H, W]: sin and cos of x, then of y; positions count from 1.

    dim / 2 frequencies exp(-k ln(1e4) / (dim / 2 - 1)) an axis.
    """
    half = dim // 2
    rates = torch.exp(torch.arange(half) * -(math.log(1e4) / (half - 1)))

    def axis(length: int) -> Tensor:
        angles = torch.arange(1, length + 1)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1).t()

    along_x = axis(width)[:, None, :].expand(-1, height, -1)
    along_y = axis(height)[:, :, None].expand(-1, -1, width)
    return torch.cat([along_x, along_y])[None]


class SinusoidalEmbedding(nn.Module):
    """The position grid; the one-element buffer carries nothing, official checkpoints have it."""

    _float_tensor: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.register_buffer("_float_tensor", torch.zeros(1))
        self._grids: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, size: int) -> Tensor:
        """[1, size^2, 2 dim] tokens on the device of the module."""
        key = (size, self._float_tensor.device)
        if key not in self._grids:
            self._grids = {key: position_grid(size, size, self.dim).flatten(2).transpose(1, 2).to(key[1])}
        return self._grids[key]


class Upsample(nn.Module):
    """Bilinear doubling of a token grid, LayerNorm, linear to the next width, plus alpha times the position grid."""

    def __init__(self, resolution: int, c_in: int, c_out: int):
        """Raises ConfigError unless c_out is a multiple of 4 from 8 up."""
        super().__init__()
        if c_out % 4 or c_out < 8:
            raise ConfigError(f"StyleNAT level has width {c_out}: position grids need a multiple of 4 from 8 up")
        self.resolution = resolution
        self.alpha = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(c_in)
        self.reduction = nn.Linear(c_in, c_out, bias=False)
        self.sin_pos_embed = SinusoidalEmbedding(c_out // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, R^2, C_in] -> [N, 4 R^2, C_out]."""
        grid = x.transpose(1, 2).unflatten(2, (self.resolution, self.resolution))
        grid = F.interpolate(grid, scale_factor=2, mode="bilinear", align_corners=False)
        out = self.reduction(self.norm(grid.flatten(2).transpose(1, 2)))
        return out + self.alpha * self.sin_pos_embed(2 * self.resolution)


class Level(nn.Module):
    """Two blocks at one resolution and, except on the last level, the way up to the next."""

    def __init__(self, blocks: list[Block], upsample: Upsample | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x [N, R^2, C], style [N, style_dim] -> [N, 4 R^2, C_next], on the last level [N, R^2, C]."""
        for block in self.blocks:
            x = block(x, style)
        return x if self.upsample is None else self.upsample(x)


def fir_kernel(gain: float = 1.0) -> Tensor:
    """The 1-3-3-1 low-pass kernel [4, 4]."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 64 * gain


def filter_depthwise(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Convolve every channel of padded x with the flipped kernel.

    x [N, C, H, W], kernel [k, k] -> [N, C, (H - k) // stride + 1, (W - k) // stride + 1].
    """
    weight = kernel.expand(x.shape[1], 1, -1, -1).flip(2, 3).to(x.dtype).contiguous()
    return correlate(x, weight, (stride, stride), (0, 0))


def upsample_depthwise(x: Tensor, kernel: Tensor, crop: int) -> Tensor:
    """Insert zeros between the pixels and convolve, keeping the [2H, 2W] values from `crop` on.

    x [N, C, H, W], kernel [k, k] -> [N, C, 2H, 2W].
    """
    weight = kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    out = F.conv_transpose2d(x, weight, stride=2, groups=x.shape[1])
    return out[:, :, crop : crop + 2 * x.shape[2], crop : crop + 2 * x.shape[3]]


class Fir(nn.Module):
    """Low-pass with the 1-3-3-1 kernel: `blur` pads by 2, `down` halves, `up` doubles."""

    kernel: Tensor

    def __init__(self, mode: Literal["blur", "down", "up"]):
        super().__init__()
        self.mode = mode
        self.register_buffer("kernel", fir_kernel(4.0 if mode == "up" else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H + 1, W + 1] (blur), [N, C, H/2, W/2] (down) or [N, C, 2H, 2W] (up)."""
        if self.mode == "up":
            return upsample_depthwise(x, self.kernel, 1)
        if self.mode == "down":
            return filter_depthwise(F.pad(x, (1, 1, 1, 1)), self.kernel, stride=2)
        return filter_depthwise(F.pad(x, (2, 2, 2, 2)), self.kernel)


class ToRGB(nn.Module):
    """1x1 convolution with two biases, plus the previous RGB (doubled when `upsample`)."""

    def __init__(self, channels: int, upsample: bool):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.upsample = Fir("up") if upsample else None
        self.conv = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], skip [N, 3, H, W], or half that size when `upsample` -> [N, 3, H, W]."""
        out = self.conv(x) + self.bias
        if skip is None:
            return out
        return out + (skip if self.upsample is None else self.upsample(skip))


def init_weights(module: nn.Module) -> None:
    """The official global initialisation; EqualLinear and bias tables keep their own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_normal_(module.weight, gain=0.02)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """z [N, style_dim] -> images [N, 3, R, R], nominally in [-1, 1]; deterministic in z."""

    def __init__(self, options: GeneratorOptions, *, resolution: int, num_classes: int = 0):
        """Raises ConfigError for classes, or where resolution, widths, heads, kernels and dilations do not fit."""
        super().__init__()
        refuse_classes(num_classes)
        self.options, self.resolution = options, resolution
        self.z_dim = options.style_dim
        self.num_levels = num_levels(resolution, 8)
        self._check_levels()
        mlp = [EqualLinear(self.z_dim, self.z_dim, options.lr_mlp, activate=True) for _ in range(options.mlp_layers)]
        self.style = nn.Sequential(PixelNorm(), *mlp)
        self.input = ConstantInput(self._width(0))
        self.layers = nn.ModuleList([self._level(i) for i in range(self.num_levels)])
        last = self.num_levels - 1
        self.to_rgbs = nn.ModuleList([ToRGB(self._width(min(i + 1, last)), i < last) for i in range(self.num_levels)])
        self.apply(init_weights)

    def _check_levels(self) -> None:
        for name in ("kernels", "dilations"):
            if (given := len(getattr(self.options, name))) < self.num_levels:
                raise ConfigError(
                    f"StyleNAT generator has {given} entries in {name}, but {self.resolution} px has "
                    f"{self.num_levels} levels: give one entry a level from 4x4 up"
                )

    def _width(self, level: int) -> int:
        return level_width(4 * 2**level, self.options.channel_max, self.options.channel_multiplier)

    def _attention(self, level: int) -> Attention:
        o, width = self.options, self._width(level)
        heads = max(width // 32, o.min_heads)
        if level == 0:
            return FullAttention(width, heads)
        for kernel, dilation in head_groups(tuple(o.kernels[level]), tuple(o.dilations[level])):
            check_window(4 * 2**level, kernel, dilation)
        return HydraAttention(width, heads, o.kernels[level], o.dilations[level], o.attention)

    def _level(self, level: int) -> Level:
        o, width, resolution = self.options, self._width(level), 4 * 2**level
        blocks = [Block(width, resolution, self._attention(level), o.style_dim, o.mlp_ratio) for _ in range(2)]
        is_last = level == self.num_levels - 1
        return Level(blocks, None if is_last else Upsample(resolution, width, self._width(level + 1)))

    def mapping(self, z: Tensor) -> Tensor:
        """z [N, style_dim] -> w [N, style_dim]: every block gets the same."""
        return self.style(z)

    def render(self, w: Tensor) -> Tensor:
        """Styles w [N, style_dim] -> images [N, 3, R, R] in ImageNet-normalised space, as official code has them."""
        x = self.input(w.shape[0])
        rgb: Tensor | None = None
        for level, to_rgb in zip(self.layers, self.to_rgbs):
            x = level(x, w)
            side = math.isqrt(x.shape[1])
            rgb = to_rgb(x.transpose(1, 2).unflatten(2, (side, side)), rgb)
        assert rgb is not None
        return rgb

    def forward(self, z: Tensor, c: Tensor | None = None, draws: object = None) -> Tensor:
        """z [N, style_dim] -> images [N, 3, R, R], nominally in [-1, 1]; c and draws are ignored."""
        return from_imagenet(self.render(self.mapping(z)))


def _legacy_level(name: str) -> int:
    return int(name.split(".")[1])


def is_legacy(state: Mapping[str, Tensor]) -> bool:
    """True for the key layout of the released FFHQ checkpoints: tables rpb0 and rpb1 [heads, 2k - 1, 2k - 1]."""
    return any(name.endswith(LEGACY_NAMES) for name in state)


def from_legacy(state: Mapping[str, Tensor], options: GeneratorOptions) -> dict[str, Tensor]:
    """Rename rpb0 and rpb1 to head groups rpb.0 and rpb.1, or join them where a level has one group.

    Tables [heads, 2k - 1, 2k - 1] are joined along the heads. Raises ConfigError where the options give a level more
    than two head groups.
    """
    out = {}
    for name, tensor in state.items():
        if not name.endswith(LEGACY_NAMES):
            out[name] = tensor
            continue
        stem, index = name[:-1], name[-1]
        groups = len(head_groups(options.kernels[_legacy_level(name)], options.dilations[_legacy_level(name)]))
        if groups > 2:
            raise ConfigError(f"{name} is of the two-group layout, but the options give its level {groups} head groups")
        if groups == 2:
            out[f"{stem}.{index}"] = tensor
        elif index == "0":
            out[f"{stem}.0"] = torch.cat([tensor, state[stem + "1"]])
    return out


def to_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_legacy`: a level's single table [heads, 2k - 1, 2k - 1] is halved along the heads.

    Raises ConfigError where a level has more than two head groups.
    """
    out = {}
    for name, tensor in state.items():
        stem, _, index = name.rpartition(".")
        if not stem.endswith(".rpb"):
            out[name] = tensor
        elif index not in "01":
            raise ConfigError(f"{name} has no place in the two-group layout: export the current one")
        elif index == "0" and f"{stem}.1" not in state:
            out[stem + "0"], out[stem + "1"] = (half.contiguous() for half in tensor.chunk(2))
        else:
            out[stem + index] = tensor
    return out


class FusedLeakyReLU(nn.Module):
    """lrelu(x + bias) * sqrt(2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape."""
        bias = self.bias.view(-1, *[1] * (x.ndim - 2))
        return F.leaky_relu(x + bias, 0.2) * math.sqrt(2)


def haar_kernels() -> dict[str, Tensor]:
    low, high = torch.tensor([1.0, 1.0]) / math.sqrt(2), torch.tensor([-1.0, 1.0]) / math.sqrt(2)
    return {
        "ll": torch.outer(low, low),
        "lh": torch.outer(high, low),
        "hl": torch.outer(low, high),
        "hh": torch.outer(high, high),
    }


class Haar(nn.Module):
    """Haar wavelets: RGB [N, 3, H, W] -> LL, LH, HL, HH [N, 12, H/2, W/2]."""

    ll: Tensor
    lh: Tensor
    hl: Tensor
    hh: Tensor
    negated: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        for name, kernel in haar_kernels().items():
            self.register_buffer(name, -kernel if name in self.negated else kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 4C, H/2, W/2]: all of LL, then LH, HL, HH."""
        return torch.cat([filter_depthwise(x, kernel, stride=2) for kernel in (self.ll, self.lh, self.hl, self.hh)], 1)


class InverseHaar(Haar):
    """The inverse of `Haar`; its LH and HL kernels are stored negated."""

    negated = ("lh", "hl")

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4C, H, W] -> [N, C, 2H, 2W]."""
        bands = zip(x.chunk(4, 1), (self.ll, self.lh, self.hl, self.hh))
        return torch.stack([upsample_depthwise(band, kernel, 0) for band, kernel in bands]).sum(0)


class FromRGB(nn.Module):
    """Wavelets to features; lower levels first halve the image behind the wavelets."""

    def __init__(self, channels: int, downsample: bool):
        super().__init__()
        self.halves = downsample
        if downsample:
            self.iwt = InverseHaar()
            self.downsample = Fir("down")
            self.dwt = Haar()
        self.conv = nn.Sequential(SpectralConv2d(12, channels, 1, bias=False), FusedLeakyReLU(channels))

    def forward(self, x: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(wavelets at this level, features plus those of the level above).

        x [N, 12, H, W], features [N, C, h, w] -> [N, 12, h, w], [N, C, h, w]; h, w are half of H, W when `downsample`.
        """
        if self.halves:
            x = self.dwt(self.downsample(self.iwt(x)))
        out = self.conv(x)
        return x, out if features is None else out + features


class ConvBlock(nn.Module):
    """conv 3x3, then blur and conv 3x3 with stride 2."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Sequential(SpectralConv2d(c_in, c_in, 3, padding=1, bias=False), FusedLeakyReLU(c_in))
        self.conv2 = nn.Sequential(
            Fir("blur"), SpectralConv2d(c_in, c_out, 3, stride=2, bias=False), FusedLeakyReLU(c_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, H/2, W/2]."""
        return self.conv2(self.conv1(x))


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """Append the mean standard deviation over each group of samples as a channel: [N, C, H, W] -> [N, C + 1, H, W].

    Sample n belongs to group n mod (N / G) where G = min(group, N). Raises ConfigError unless N is a multiple of G.
    """
    n, channels, height, width = x.shape
    group = min(group, n)
    if n % group:
        raise ConfigError(
            f"minibatch standard deviation has {n} samples for groups of {group}: make ghost_batch a multiple"
        )
    y = x.view(group, n // group, channels, height, width)
    std = (y.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).view(-1, 1, 1, 1)
    return torch.cat([x, std.repeat(group, 1, height, width)], 1)


class Discriminator(nn.Module):
    """Images [N, 3, R, R] in [-1, 1] -> logits [N, 1]; a U-less pyramid over Haar wavelets with spectral norm."""

    ghost_batch: int | None = None

    def __init__(self, options: DiscriminatorOptions, *, resolution: int, num_classes: int = 0):
        """Raises ConfigError for classes and for a resolution that is no power of two from 16 up."""
        super().__init__()
        refuse_classes(num_classes)
        self.options, self.resolution = options, resolution
        num_convs = num_levels(resolution, 16) - 2
        sizes = [resolution, *(resolution // 2 ** (i + 2) for i in range(num_convs))]
        widths = [level_width(size, options.channel_max, options.channel_multiplier) for size in sizes]
        last = widths[-1]
        self.dwt = Haar()
        self.from_rgbs = nn.ModuleList([FromRGB(width, i > 0) for i, width in enumerate(widths)])
        self.convs = nn.ModuleList([ConvBlock(a, b) for a, b in zip(widths, widths[1:])])
        self.final_conv = nn.Sequential(SpectralConv2d(last + 1, last, 3, padding=1, bias=False), FusedLeakyReLU(last))
        self.final_linear = nn.Sequential(
            SpectralLinear(last * 16, last), FusedLeakyReLU(last), SpectralLinear(last, 1)
        )

    def score(self, y: Tensor) -> Tensor:
        """Images [N, 3, R, R] in ImageNet-normalised space, as official code has them -> logits [N, 1].

        Raises ConfigError where `mbstd_group` does not divide a ghost.
        """
        x, features = self.dwt(y), None
        for from_rgb, conv in zip(self.from_rgbs, self.convs):
            x, features = from_rgb(x, features)
            features = conv(features)
        _, features = self.from_rgbs[-1](x, features)
        ghosts = features.split(self.ghost_batch or len(features))
        out = self.final_conv(torch.cat([minibatch_std(ghost, self.options.mbstd_group) for ghost in ghosts]))
        return self.final_linear(out.flatten(1))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, 3, R, R] in [-1, 1] -> logits [N, 1]; c is ignored. Raises ConfigError as `score` does."""
        return self.score(to_imagenet(x))
