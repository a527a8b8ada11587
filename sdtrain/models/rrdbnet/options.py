"""Options of RRDBNet. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count
from sdtrain.models.width import narrowed


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    num_in_ch: Count = 3
    """[channels] Image channels in."""
    num_out_ch: Count = 3
    """[channels] Image channels out."""
    scale: Literal[1, 2, 4] = 4
    """[times] Enlargement; 2 and 1 fold the input by pixel-unshuffle."""
    num_feat: Count = 64
    """[channels] Width of the trunk."""
    num_block: Count = 23
    """[blocks] Number of RRDBs."""
    num_grow_ch: Count = 32
    """[channels] What each dense convolution adds."""


def scaled(
    options: GeneratorOptions, C: float | str, growth: Literal["scaled", "fixed"] = "scaled", **others: str
) -> GeneratorOptions:
    """A student's options: C of the trunk's channels and, unless `growth` is fixed, of the growth channels."""
    grow = options.num_grow_ch if growth == "fixed" else narrowed("num_grow_ch", options.num_grow_ch, C)
    return replace(options, num_feat=narrowed("num_feat", options.num_feat, C), num_grow_ch=grow)


def deepened(options: GeneratorOptions) -> GeneratorOptions:
    """OMGD's deep teacher: twice as many blocks."""
    return replace(options, num_block=2 * options.num_block)


MODEL = ModelDeclaration(
    generator=GeneratorOptions, scaled=scaled, deepened=deepened, blocks={"generator": ("body.*",)}
)
