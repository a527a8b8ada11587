"""Options of UNetDiscriminatorSN. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count
from sdtrain.models.width import narrowed


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    num_in_ch: Count = 3
    """[channels] Image channels."""
    num_feat: Count = 64
    """[channels] Width at full size; eight times as many at an eighth."""
    skip_connection: bool = True
    """Add encoder maps to decoder maps of equal size."""


def scaled(options: DiscriminatorOptions, C: float | str, **others: str) -> DiscriminatorOptions:
    """A student's options: C of every layer's channels."""
    return replace(options, num_feat=narrowed("num_feat", options.num_feat, C))


MODEL = ModelDeclaration(discriminator=DiscriminatorOptions, scaled=scaled)
