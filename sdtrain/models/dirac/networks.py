"""The players of the Dirac-GAN (Mescheder et al. 2018): G(z) = theta and D(x) = psi * x, one parameter each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.models.dirac.options import DiscriminatorOptions, GeneratorOptions


class Generator(nn.Module):
    """G(z) = theta: every image is one pixel of one channel, whatever the latent."""

    z_dim = 1

    def __init__(self, options: GeneratorOptions, *, resolution: int = 1, num_classes: int = 0):
        super().__init__()
        self.resolution = resolution
        self.theta = nn.Parameter(torch.tensor(float(options.start)))

    def forward(self, z: Tensor, c: Tensor | None = None, draws: Any = None) -> Tensor:
        """z [N, 1] -> theta [N, 1, 1, 1]; c and draws are ignored."""
        return self.theta.expand(len(z), 1, 1, 1)


class Discriminator(nn.Module):
    """D(x) = psi * x."""

    def __init__(self, options: DiscriminatorOptions, *, resolution: int = 1, num_classes: int = 0):
        super().__init__()
        self.psi = nn.Parameter(torch.tensor(float(options.start)))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """x [N, 1, 1, 1] -> psi * x [N, 1]; c is ignored."""
        return self.psi * x.flatten(1)
