"""Options of R3GAN. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from sdtrain.config.declare import ROLES, ModelDeclaration
from sdtrain.config.options import Count, CountOrZero


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What both players say of their stages, one a resolution: 4x4 first, in the discriminator too."""

    widths: tuple[Count, ...] = (768, 768, 768, 768)
    """[channels] Width of each stage, 4x4 first; four stages make 32 px."""
    groups: tuple[Count, ...] = (96, 96, 96, 96)
    """[groups] Groups of the 3x3 convolutions of each stage, 4x4 first."""
    blocks: tuple[Count, ...] = (2, 2, 2, 2)
    """[blocks] Residual blocks of each stage, 4x4 first."""
    expansion: Count = 2
    """[times] Channels inside a residual block, as a multiple of the stage's width."""
    num_low_precision_res: CountOrZero = 0
    """[stages] This many highest resolutions run in bfloat16, the others in float32."""


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(StageOptions):
    """R3GAN generator; defaults are those of the official preset for CIFAR-10, in float32."""

    z_dim: Count = 64
    """[numbers] Length of a latent."""
    embed_dim: Count = 64
    """[numbers] Length of the class embedding beside the latent; unused without classes."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions(StageOptions):
    """R3GAN discriminator; defaults are those of the official preset for CIFAR-10, in float32."""

    embed_dim: Count | None = None
    """[numbers] Length of the class embedding; null = width of the 4x4 stage; unused without classes."""


MODEL = ModelDeclaration(
    generator=GeneratorOptions,
    discriminator=DiscriminatorOptions,
    blocks={role: ("Model.MainLayers.*.Layers.*",) for role in ROLES},
)
