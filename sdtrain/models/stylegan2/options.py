"""Options of StyleGAN2-ADA. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdtrain.config.declare import ModelDeclaration


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """StyleGAN2 generator; defaults are those of the official presets at full width."""

    z_dim: int = 512  # width of the latent
    w_dim: int = 512  # width of the intermediate latent
    mapping_layers: int = 8  # fully connected layers of the mapping network
    mapping_lr_mul: float = 0.01  # learning-rate factor of the mapping network
    w_avg_beta: float = 0.995  # decay of the running mean of w, per pass
    channel_base: int = 32768  # channels at resolution r are channel_base / r ...
    channel_max: int = 512  # ... but at most this many
    num_low_precision_res: int = 0  # this many highest resolutions run in low_precision
    low_precision: Literal["bf16", "fp16"] = "bf16"  # number format of those blocks
    conv_clamp: float | None = None  # clamp of every convolution's output (official presets: 256)
    img_channels: int = 3  # channels of the image


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """StyleGAN2 discriminator; defaults are those of the official presets at full width."""

    architecture: Literal["orig", "skip", "resnet"] = "resnet"  # how a block joins its input and its output
    channel_base: int = 32768  # channels at resolution r are channel_base / r ...
    channel_max: int = 512  # ... but at most this many
    mbstd_group: int | None = 4  # samples that share one minibatch standard deviation; none: the whole ghost
    mbstd_channels: int = 1  # feature maps of that statistic
    cmap_dim: int | None = None  # width of the label mapping; none: channels at 4x4
    mapping_layers: int = 8  # fully connected layers of the label mapping
    freeze_layers: int = 0  # first layers, counted from the input, that are not trained (Freeze-D)
    num_low_precision_res: int = 0  # this many highest resolutions run in low_precision
    low_precision: Literal["bf16", "fp16"] = "bf16"  # number format of those blocks
    conv_clamp: float | None = None  # clamp of every convolution's output (official presets: 256)
    img_channels: int = 3  # channels of the image


MODEL = ModelDeclaration(generator=GeneratorOptions, discriminator=DiscriminatorOptions)
