"""Options of the projected discriminator. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count, CountOrZero


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    feature_network: str = "tf_efficientnet_lite0"
    """Frozen backbone, any of timm with four maps: an EfficientNet, ConvNeXt, ResNet, DeiT, ..."""
    num_discs: Count = 4
    """[heads] Number of heads, from the finest scale down."""
    separable: bool = False
    """Depthwise-separable heads (official with the StyleGAN2 generator)."""
    patch: bool = False
    """A 1x1 convolution after every down block."""
    interpolate_to: Count | None = 224
    """[pixels] Side to which smaller data is enlarged first; null = never (our small sibling)."""
    projection_width: Count = 64
    """[channels] Width of the finest projection; coarser ones have 1, 2 and 4 times as many."""
    expand: bool = True
    """Wider channel mixing at coarser scales; false = projection_width everywhere."""
    head_width: Count | None = None
    """[channels] Width of all head layers; null = official table, 64 to 512."""
    num_embeddings: Count = 1000
    """[classes] Rows of the class embedding of conditional heads; official checkpoints have 1000."""
    embedding_dim: Count = 128
    """[numbers] Columns of the class embedding."""
    cmap_dim: Count = 64
    """[numbers] Numbers compared between image and class at each place."""
    projection_seed: CountOrZero | None = None
    """Seed of the random projections; null = the run's."""


def weights_of(options: DiscriminatorOptions) -> str:
    """Name in `sdtrain.weights` of the file of the feature network."""
    official = options.feature_network == "tf_efficientnet_lite0"
    return "efficientnet_lite0" if official else f"timm/{options.feature_network}"


MODEL = ModelDeclaration(discriminator=DiscriminatorOptions, feature_weights=weights_of)
