"""Options of StyleNAT. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    style_dim: Count = 512
    """[numbers] Length of z and of the style w."""
    mlp_layers: Count = 8
    """[layers] Linear layers of the style network."""
    lr_mlp: NonNegative = 0.01
    """Learning-rate factor of the style network."""
    channel_max: Count = 512
    """[channels] Widest level; the official networks have 512."""
    channel_multiplier: Positive = 2
    """Width at resolution r is min(channel_max, channel_multiplier * 16384 / r)."""
    min_heads: Count = 4
    """[heads] Heads of a level are max(width // 32, min_heads)."""
    mlp_ratio: Positive = 4.0
    """Hidden width of a block's MLP over its width."""
    kernels: tuple[tuple[Count, ...], ...] = ((3,), (7,), (7,), (7,), (7,), (7,), (7,), (7,), (7,))
    """[pixels] Neighbourhood a level from 4x4 up, one entry a head group or one for all; level 0 attends fully."""
    dilations: tuple[tuple[Count, ...], ...] = ((1,), (1,), (1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128))
    """[pixels] Distance of neighbours a level, one entry a head group or one for all."""
    attention: Literal["portable", "full_mask", "natten"] = "portable"
    """Tiled SDPA, naive SDPA, or natten's CUDA kernels."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    channel_max: Count = 512
    """[channels] Widest level; the official networks have 512."""
    channel_multiplier: Positive = 2
    """Width at resolution r is min(channel_max, channel_multiplier * 16384 / r)."""
    mbstd_group: Count = 4
    """[samples] Samples that share a minibatch standard deviation."""


MODEL = ModelDeclaration(
    generator=GeneratorOptions,
    discriminator=DiscriminatorOptions,
    blocks={
        "generator": ("layers.*.blocks.*", "layers.*.upsample", "to_rgbs.*"),
        "discriminator": ("from_rgbs.*", "convs.*"),
    },
)
