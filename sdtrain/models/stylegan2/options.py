"""Options of StyleGAN2-ADA. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count, CountOrZero, Fraction, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """StyleGAN2 generator; defaults are those of the official presets at full width."""

    z_dim: Count = 512
    """[numbers] Length of the latent."""
    w_dim: Count = 512
    """[numbers] Length of the intermediate latent."""
    mapping_layers: Count = 8
    """[layers] Fully connected layers of the mapping network."""
    mapping_lr_mul: NonNegative = 0.01
    """Learning-rate factor of the mapping network."""
    w_avg_beta: Fraction = 0.995
    """Decay of the running mean of w, a pass."""
    channel_base: Count = 32768
    """[channels] Width at resolution r is channel_base / r, but at most channel_max."""
    channel_max: Count = 512
    """[channels] Widest level."""
    num_low_precision_res: CountOrZero = 0
    """[levels] This many highest resolutions run in low_precision."""
    low_precision: Literal["bf16", "fp16"] = "bf16"
    """Number format of those levels."""
    conv_clamp: Positive | None = None
    """Largest absolute output of a convolution (official presets: 256); null = not clamped."""
    img_channels: Count = 3
    """[channels] Channels of the image."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """StyleGAN2 discriminator; defaults are those of the official presets at full width."""

    architecture: Literal["orig", "skip", "resnet"] = "resnet"
    """How a block joins its input and its output."""
    channel_base: Count = 32768
    """[channels] Width at resolution r is channel_base / r, but at most channel_max."""
    channel_max: Count = 512
    """[channels] Widest level."""
    mbstd_group: Count | None = 4
    """[samples] Samples that share one minibatch standard deviation; null = the whole ghost."""
    mbstd_channels: CountOrZero = 1
    """[channels] Feature maps of that statistic."""
    cmap_dim: Count | None = None
    """[numbers] Width of the label mapping; null = channels at 4x4."""
    mapping_layers: Count = 8
    """[layers] Fully connected layers of the label mapping."""
    freeze_layers: CountOrZero = 0
    """[layers] First layers, counted from the input, that are not trained (Freeze-D)."""
    num_low_precision_res: CountOrZero = 0
    """[levels] This many highest resolutions run in low_precision."""
    low_precision: Literal["bf16", "fp16"] = "bf16"
    """Number format of those levels."""
    conv_clamp: Positive | None = None
    """Largest absolute output of a convolution (official presets: 256); null = not clamped."""
    img_channels: Count = 3
    """[channels] Channels of the image."""


MODEL = ModelDeclaration(
    generator=GeneratorOptions,
    discriminator=DiscriminatorOptions,
    blocks={"generator": ("synthesis.*.conv*", "synthesis.*.torgb"), "discriminator": ("*.conv*", "*.skip")},
)
