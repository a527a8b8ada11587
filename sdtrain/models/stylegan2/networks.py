"""StyleGAN2-ADA: generator and discriminator (Karras et al. 2020, "Training GANs with Limited Data").

State dicts carry exactly the official names. Blocks of the highest resolutions may run in bfloat16 or float16; mapping,
demodulation, image accumulation and the discriminator's epilogue stay float32 whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.models.stylegan2.layers import (
    FIR_TAPS,
    Conv2d,
    FullyConnected,
    MappingNetwork,
    MinibatchStd,
    SynthesisConv,
    ToRGB,
)
from sdtrain.models.stylegan2.ops import as_full, downsample2d, fir_filter, format_on, upsample2d
from sdtrain.models.stylegan2.options import DiscriminatorOptions, GeneratorOptions
from sdtrain.precision import full_precision
from sdtrain.rng import Draws

Noise = Literal["random", "const", "none"]


def block_resolutions(resolution: int, smallest: int) -> list[int]:
    """[smallest, ..., resolution], doubling. Raises ConfigError unless it is a power of two from `smallest` up."""
    if resolution < smallest or resolution & (resolution - 1):
        raise ConfigError(
            f"resolution {resolution}: StyleGAN2 needs a power of two from {smallest} upwards; choose 64, 128, 256, ..."
        )
    return [1 << i for i in range(smallest.bit_length() - 1, resolution.bit_length())]


def channels_at(r: int, options: GeneratorOptions | DiscriminatorOptions) -> int:
    """channel_base / r, at most channel_max. Raises ConfigError where no channel is left."""
    channels = min(options.channel_base // r, options.channel_max)
    if channels < 1:
        raise ConfigError(f"channel_base {options.channel_base} leaves no channels at resolution {r}; use at least {r}")
    return channels


def block_dtype(r: int, resolution: int, options: GeneratorOptions | DiscriminatorOptions) -> torch.dtype | None:
    """The low-precision format of the block at r, None where it follows its input."""
    lowest = max((2 * resolution) >> options.num_low_precision_res, 8)
    low = torch.bfloat16 if options.low_precision == "bf16" else torch.float16
    return low if r >= lowest else None


class SynthesisBlock(nn.Module):
    """One resolution: [conv0 up,] conv1, torgb onto the upsampled image; the first block starts from a constant."""

    resample_filter: Tensor

    def __init__(self, c_in: int, r: int, resolution: int, options: GeneratorOptions):
        super().__init__()
        c_out, w_dim, clamp = channels_at(r, options), options.w_dim, options.conv_clamp
        self.resolution = r
        self.dtype = block_dtype(r, resolution, options)
        self.register_buffer("resample_filter", fir_filter(FIR_TAPS))
        if c_in:
            self.conv0 = SynthesisConv(c_in, c_out, w_dim, r, up=True, clamp=clamp)
        else:
            self.const = nn.Parameter(torch.randn(c_out, r, r))
        self.conv1 = SynthesisConv(c_out, c_out, w_dim, r, up=False, clamp=clamp)
        self.torgb = ToRGB(c_out, options.img_channels, w_dim, clamp)
        self.num_conv = 2 if c_in else 1

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, draws: Draws | None, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """x [N, C_in, r/2, r/2], image [N, 3, r/2, r/2], both None in the first block, ws [N, num_conv + 1, w_dim].

        Gives features [N, C, r, r] and the accumulated float32 image [N, 3, r, r].
        """
        if x is None:
            x = self.const[None].expand(ws.shape[0], -1, -1, -1)
        dtype = format_on(self.dtype, x.device.type)
        x = x if dtype is None else x.to(dtype)
        for i, name in enumerate(("conv0", "conv1")[-self.num_conv :]):
            layer = getattr(self, name)
            x = layer(x, ws[:, i], self._noise(name, layer, draws, noise))
        rgb = as_full(self.torgb(x, ws[:, self.num_conv]))
        return x, rgb if image is None else upsample2d(image, self.resample_filter) + rgb

    def _noise(self, name: str, layer: SynthesisConv, draws: Draws | None, noise: Noise) -> Tensor | None:
        if noise == "const":
            return layer.noise_const
        if noise == "none" or draws is None:
            return None
        return draws.normal(f"noise/b{self.resolution}.{name}", 1, self.resolution, self.resolution)


class SynthesisNetwork(nn.Module):
    """ws -> image, one block per resolution 4..R; a torgb shares its w with the next block's first convolution."""

    def __init__(self, resolution: int, options: GeneratorOptions):
        super().__init__()
        self.resolutions = block_resolutions(resolution, 4)
        c_in = 0
        for r in self.resolutions:
            self.add_module(f"b{r}", SynthesisBlock(c_in, r, resolution, options))
            c_in = channels_at(r, options)
        self.num_ws = 2 * len(self.resolutions)

    def forward(self, ws: Tensor, draws: Draws | None = None, noise: Noise = "random") -> Tensor:
        """ws [N, num_ws, w_dim] -> images [N, 3, R, R], float32."""
        x: Tensor | None = None
        image: Tensor | None = None
        first = 0
        for r in self.resolutions:
            block = getattr(self, f"b{r}")
            x, image = block(x, image, ws[:, first : first + block.num_conv + 1], draws, noise)
            first += block.num_conv
        assert image is not None
        return image


class Generator(nn.Module):
    """StyleGAN2 generator: `mapping` z, c -> ws, `synthesis` ws -> image, `forward` both."""

    compiles: ClassVar[tuple[str, ...]] = ("synthesis.*.conv*", "synthesis.*.torgb")

    def __init__(self, options: GeneratorOptions, *, resolution: int, num_classes: int = 0):
        """Raises ConfigError for a resolution that is no power of two."""
        super().__init__()
        self.options, self.resolution, self.num_classes = options, resolution, num_classes
        self.z_dim, self.w_dim = options.z_dim, options.w_dim
        self.synthesis = SynthesisNetwork(resolution, options)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            options.z_dim,
            num_classes,
            options.w_dim,
            num_ws=self.num_ws,
            num_layers=options.mapping_layers,
            lr_mul=options.mapping_lr_mul,
            w_avg_beta=options.w_avg_beta,
        )

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        draws: Draws | None = None,
        *,
        noise: Noise = "random",
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        mixing: float = 0.0,
        update_w_avg: bool = True,
        return_ws: bool = False,
        layer_draws: Draws | None = None,
    ) -> Any:
        """z [N, z_dim], one-hot c [N, num_classes] -> images [N, 3, R, R] in about [-1, 1], or (images, ws).

        Random noise comes from `draws`; without draws there is none. `mixing`: probability that a ghost mixes styles.
        `layer_draws` give the layers other noise than `draws`, by which styles are mixed. ws are [N, num_ws, w_dim].
        Raises DataError when a conditional network gets no labels or labels of another width.
        """
        truncation = {"truncation_psi": truncation_psi, "truncation_cutoff": truncation_cutoff}
        ws = self.styles(z, c, draws, mixing, update_w_avg=update_w_avg, **truncation)
        images = self.synthesis(ws, layer_draws or draws, noise)
        return (images, ws) if return_ws else images

    def styles(
        self, z: Tensor, c: Tensor | None = None, draws: Draws | None = None, mixing: float = 0.0, **mapping: Any
    ) -> Tensor:
        """z [N, z_dim], one-hot c [N, num_classes] -> ws [N, num_ws, w_dim]. Raises DataError as `forward` does.

        With probability `mixing` a ghost takes the w of a second z from a crossover layer on. Crossover, second z and
        the decision come from `draws.sub("mix")`, so another network called with the same draws mixes in the same way.
        The second mapping does not move w_avg.
        """
        ws = self.mapping(z, c, **mapping)
        if not mixing or draws is None:
            return ws
        mix = draws.sub("mix")
        other = self.mapping(mix.normal("z", self.z_dim), c, **{**mapping, "update_w_avg": False})
        return torch.where(mixed_layers(mix, mixing, self.num_ws)[:, :, None].to(ws.device), other, ws)


def mixed_layers(mix: Draws, probability: float, num_ws: int) -> Tensor:
    """Bool [N, num_ws]: the layers from the ghost's crossover, uniform in [1, num_ws), if the ghost mixes at all."""
    gate, place = mix.uniform_per_ghost("crossover", 2).unbind(1)
    crossover = torch.where(gate < probability, 1 + (place * (num_ws - 1)).floor(), float(num_ws))
    layers = torch.arange(num_ws, device=crossover.device)
    return (layers[None] >= crossover[:, None]).repeat_interleave(mix.ghost_batch, 0)


class DiscriminatorBlock(nn.Module):
    """One resolution: [fromrgb,] conv0, conv1 down; `resnet` adds a linear path, `skip` shows every block the image."""

    resample_filter: Tensor

    def __init__(self, r: int, resolution: int, options: DiscriminatorOptions, first_layer: int):
        super().__init__()
        c_in, c_out = channels_at(r, options), channels_at(r // 2, options)
        self.architecture, self.dtype = options.architecture, block_dtype(r, resolution, options)
        self.register_buffer("resample_filter", fir_filter(FIR_TAPS))
        self.num_layers = 0

        def conv(*shape: int, **kwargs: Any) -> Conv2d:
            self.num_layers += 1
            trainable = first_layer + self.num_layers > options.freeze_layers
            return Conv2d(*shape, trainable=trainable, **kwargs)

        if r == resolution or self.architecture == "skip":
            self.fromrgb = conv(options.img_channels, c_in, 1, clamp=options.conv_clamp)
        self.conv0 = conv(c_in, c_in, 3, clamp=options.conv_clamp)
        self.conv1 = conv(c_in, c_out, 3, down=True, clamp=options.conv_clamp)
        if self.architecture == "resnet":
            self.skip = conv(c_in, c_out, 1, lrelu=False, bias=False, down=True)

    def forward(self, x: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [N, C_in, r, r] (None in the first block), image [N, 3, r, r] where it is read -> (features, image).

        Features are [N, C_out, r/2, r/2]; the image is [N, 3, r/2, r/2] in a `skip` network, else None.
        """
        dtype = format_on(self.dtype, self.conv0.weight.device.type)
        if image is not None:
            y = self.fromrgb(image if dtype is None else image.to(dtype))
            x = y if x is None else x + y
            image = downsample2d(image, self.resample_filter) if self.architecture == "skip" else None
        assert x is not None
        x = x if dtype is None else x.to(dtype)
        if self.architecture != "resnet":
            return self.conv1(self.conv0(x)), image
        shortcut = self.skip(x, gain=sqrt(0.5))
        return shortcut.add_(self.conv1(self.conv0(x), gain=sqrt(0.5))), image


class DiscriminatorEpilogue(nn.Module):
    """4x4 features -> minibatch stddev -> convolution -> two linear layers, always in float32."""

    def __init__(self, options: DiscriminatorOptions, cmap_dim: int):
        super().__init__()
        c = channels_at(4, options)
        self.cmap_dim = cmap_dim
        if options.architecture == "skip":
            self.fromrgb = Conv2d(options.img_channels, c, 1)
        self.mbstd = MinibatchStd(options.mbstd_group, options.mbstd_channels) if options.mbstd_channels else None
        self.conv = Conv2d(c + options.mbstd_channels, c, 3, clamp=options.conv_clamp)
        self.fc = FullyConnected(c * 16, c, lrelu=True)
        self.out = FullyConnected(c, cmap_dim or 1)

    def forward(self, x: Tensor, image: Tensor | None, cmap: Tensor | None) -> Tensor:
        """x [N, C, 4, 4], image [N, 3, 4, 4] if `skip`, cmap [N, cmap_dim] if conditional -> logits [N, 1], float32.

        Raises ConfigError where the minibatch stddev's group does not divide a ghost.
        """
        with full_precision(x.device):
            x = as_full(x)
            if image is not None:
                x = x + self.fromrgb(as_full(image))
            x = x if self.mbstd is None else self.mbstd(x)
            x = self.out(self.fc(self.conv(x).flatten(1)))
            return x if cmap is None else (x * cmap).sum(1, keepdim=True) / sqrt(self.cmap_dim)


class Discriminator(nn.Module):
    """StyleGAN2 discriminator: images -> logits [N, 1], by projection onto the label mapping if conditional."""

    def __init__(self, options: DiscriminatorOptions, *, resolution: int, num_classes: int = 0):
        """Raises ConfigError for a resolution that is no power of two from 8 upwards."""
        super().__init__()
        self.options, self.resolution, self.num_classes = options, resolution, num_classes
        self.resolutions = block_resolutions(resolution, 8)[::-1]
        cmap_dim = (options.cmap_dim or channels_at(4, options)) if num_classes else 0
        layers = 0
        for r in self.resolutions:
            block = DiscriminatorBlock(r, resolution, options, layers)
            self.add_module(f"b{r}", block)
            layers += block.num_layers
        if num_classes:
            self.mapping = MappingNetwork(
                0, num_classes, cmap_dim, num_ws=None, num_layers=options.mapping_layers, w_avg_beta=None
            )
        self.b4 = DiscriminatorEpilogue(options, cmap_dim)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Images [N, 3, R, R] in [-1, 1], one-hot c [N, num_classes] -> logits [N, 1], float32.

        With ghosts set, N must be a multiple of the ghost batch; statistics never cross a ghost. Raises ConfigError
        where `mbstd_group` does not divide a ghost and DataError when a conditional network gets no or other labels.
        """
        features: Tensor | None = None
        image: Tensor | None = x
        for r in self.resolutions:
            features, image = getattr(self, f"b{r}")(features, image)
        assert features is not None
        return self.b4(features, image, self.mapping(None, c) if self.num_classes else None)


# official constructor argument -> our field; arguments that only restate a default are dropped after a check
_GENERATOR_NAMES = {
    "num_layers": "mapping_layers",
    "lr_multiplier": "mapping_lr_mul",
    "w_avg_beta": "w_avg_beta",
    "channel_base": "channel_base",
    "channel_max": "channel_max",
    "num_fp16_res": "num_low_precision_res",
    "conv_clamp": "conv_clamp",
}
_DISCRIMINATOR_NAMES = {
    "architecture": "architecture",
    "channel_base": "channel_base",
    "channel_max": "channel_max",
    "num_fp16_res": "num_low_precision_res",
    "conv_clamp": "conv_clamp",
    "cmap_dim": "cmap_dim",
    "mbstd_group_size": "mbstd_group",
    "mbstd_num_channels": "mbstd_channels",
    "num_layers": "mapping_layers",
    "freeze_layers": "freeze_layers",
}
_FIXED = {
    "activation": "lrelu",
    "resample_filter": list(FIR_TAPS),
    "use_noise": True,
    "fp16_channels_last": False,
    "embed_features": None,
    "layer_features": None,
}


def _translated(kwargs: Mapping[str, Any], names: Mapping[str, str], what: str) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in names:
            done[names[name]] = value
        elif name == "architecture" and value == "skip":
            continue
        elif name not in _FIXED or value not in (_FIXED[name], tuple(FIR_TAPS)):
            raise ConfigError(
                f"official {what} argument {name}={value!r} has no counterpart here; such networks cannot be rebuilt"
            )
    if done.get("num_low_precision_res"):
        done["low_precision"] = "fp16"
    return done


def official_generator_options(kwargs: Mapping[str, Any], **override: Any) -> dict[str, Any]:
    """Fields of GeneratorOptions that official constructor arguments (`_init_kwargs`) say, unchecked.

    `override` replaces some, for instance num_low_precision_res=0 to stay in float32. Raises ConfigError for an
    argument that has no counterpart here, KeyError or TypeError where one is missing or of a wrong form.
    """
    flat = {**kwargs.get("mapping_kwargs", {}), **kwargs.get("synthesis_kwargs", {})}
    own = _translated(flat, _GENERATOR_NAMES, "generator")
    sizes = {"z_dim": kwargs["z_dim"], "w_dim": kwargs["w_dim"], "img_channels": kwargs.get("img_channels", 3)}
    return {**own, **sizes, **override}


def official_discriminator_options(kwargs: Mapping[str, Any], **override: Any) -> dict[str, Any]:
    """Fields of DiscriminatorOptions, as `official_generator_options` has them of the generator; raises the same."""
    nested = ("block_kwargs", "mapping_kwargs", "epilogue_kwargs")
    flat = {k: v for k, v in kwargs.items() if k not in (*nested, "c_dim", "img_resolution", "img_channels")}
    for name in nested:
        flat.update(kwargs.get(name, {}))
    own = _translated(flat, _DISCRIMINATOR_NAMES, "discriminator")
    return {**own, "img_channels": kwargs.get("img_channels", 3), **override}


def generator_from_official(kwargs: Mapping[str, Any], **override: Any) -> Generator:
    """An untrained Generator of the architecture that official constructor arguments describe; raises as above."""
    options = GeneratorOptions(**official_generator_options(kwargs, **override))
    return Generator(options, resolution=kwargs["img_resolution"], num_classes=kwargs["c_dim"])


def discriminator_from_official(kwargs: Mapping[str, Any], **override: Any) -> Discriminator:
    """An untrained Discriminator of the architecture that official constructor arguments describe; raises as above."""
    options = DiscriminatorOptions(**official_discriminator_options(kwargs, **override))
    return Discriminator(options, resolution=kwargs["img_resolution"], num_classes=kwargs["c_dim"])


def auto_preset(resolution: int, num_devices: int) -> dict[str, float]:
    """The official `auto` settings: what batch, widths, rates and half-life follow from resolution and device count."""
    batch = max(min(num_devices * min(4096 // resolution, 32), 64), num_devices)
    return {
        "batch": batch,
        "mbstd": min(batch // num_devices, 4),
        "fmaps": 1 if resolution >= 512 else 0.5,
        "lr": 0.002 if resolution >= 1024 else 0.0025,
        "gamma": 0.0002 * resolution**2 / batch,
        "ema_kimg": batch * 10 / 32,
        "rampup": 0.05,
        "map_layers": 2,
    }
