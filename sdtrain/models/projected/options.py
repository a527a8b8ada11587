"""Options of the projected discriminator. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from sdtrain.config.declare import ModelDeclaration


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    num_discs: int = 4  # heads, from the finest scale down
    separable: bool = False  # depthwise-separable heads (official with the StyleGAN2 generator)
    patch: bool = False  # a 1x1 convolution after every down block
    interpolate_to: int | None = 224  # pixels; smaller data is enlarged to it first; None = never (our small sibling)
    projection_width: int = 64  # channels of the finest projection; coarser ones have 1, 2 and 4 times as many
    expand: bool = True  # wider channel mixing at coarser scales; false = projection_width everywhere
    head_width: int | None = None  # channels of all head layers; None = official table, 64 to 512
    num_embeddings: int = 1000  # rows of the class embedding of conditional heads; official checkpoints have 1000
    embedding_dim: int = 128  # columns of the class embedding
    cmap_dim: int = 64  # numbers compared between image and class at each place
    projection_seed: int | None = None  # seed of the random projections; none: the run's


MODEL = ModelDeclaration(discriminator=DiscriminatorOptions, feature_weights="efficientnet_lite0")
