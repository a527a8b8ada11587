"""Options of FastGAN. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    z_dim: Count = 256
    """[numbers] Length of a latent."""
    ngf: Count = 128
    """[channels] Width at 128 pixels; every other width is a multiple."""
    lite: bool = False
    """One convolution a block and no noise instead of two with noise."""
    num_embeddings: Count = 1000
    """[classes] Rows of the class embedding; official checkpoints have 1000 whatever the data."""
    own_norms: Count = 1
    """[ghosts] Batch norms with an affine transform and statistics of their own, one a ghost (batch_size / ghost_batch
    of them), as the authors' fork has with gbn_splits; 1 = one for all, as on so many GPUs."""


MODEL = ModelDeclaration(generator=GeneratorOptions)
