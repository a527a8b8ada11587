"""Options of the Dirac-GAN's players. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from sdtrain.config.declare import ModelDeclaration


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    start: float = 1.0
    """Theta before the first step."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    start: float = 1.0
    """Psi before the first step."""


MODEL = ModelDeclaration(generator=GeneratorOptions, discriminator=DiscriminatorOptions)
