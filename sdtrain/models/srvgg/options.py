"""Options of SRVGGNetCompact. Free of torch."""

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
    num_feat: Count = 64
    """[channels] Width of every hidden layer."""
    num_conv: Count = 16
    """[layers] Hidden convolutions (32 in general-x4v3)."""
    upscale: Count = 4
    """[times] Enlargement."""
    act_type: Literal["relu", "prelu", "leakyrelu"] = "prelu"
    """Activation; leakyrelu has slope 0.1."""


def scaled(options: GeneratorOptions, C: float | str, **others: str) -> GeneratorOptions:
    """A student's options: C of the hidden channels."""
    return replace(options, num_feat=narrowed("num_feat", options.num_feat, C))


def deepened(options: GeneratorOptions) -> GeneratorOptions:
    """OMGD's deep teacher: twice as many convolutions."""
    return replace(options, num_conv=2 * options.num_conv)


MODEL = ModelDeclaration(generator=GeneratorOptions, scaled=scaled, deepened=deepened)
