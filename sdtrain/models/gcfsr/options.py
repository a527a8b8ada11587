"""Options of GCFSR. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count, CountOrZero, Positive
from sdtrain.models.width import fraction, narrowed


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    num_style_feat: Count = 512
    """[numbers] Length of a style code."""
    channel_multiplier: Count = 2
    """[times] Widens the levels from 64 px upwards."""
    narrow: Positive = 1.0
    """Share of the official channels at every level."""
    factor_max: Count = 64
    """[times] The condition is factor / factor_max: 64 for the 1024 px network, 32 for the 512 px one."""
    blind: bool = False
    """The variant without a factor: condition 1 always, twice as wide a path to the codes."""
    extra_convs: CountOrZero = 0
    """[layers] Further style convolutions after each level, without noise and condition (OMGD's deep teacher)."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    channel_multiplier: Count = 2
    """[times] Widens the levels from 64 px upwards."""
    narrow: Positive = 1.0
    """Share of the official channels at every level."""
    stddev_group: CountOrZero = 0
    """[samples] Samples that share a minibatch-stddev channel; 0 = no such channel, as GCFSR trains."""


def scaled(
    options: GeneratorOptions | DiscriminatorOptions,
    C: float | str,
    style: Literal["fixed", "scaled"] = "fixed",
    **others: str,
) -> GeneratorOptions | DiscriminatorOptions:
    """A student's options: C of every level's channels and, for a generator with `style` scaled, of the style width."""
    narrow = options.narrow * float(fraction(C))
    if style == "fixed" or isinstance(options, DiscriminatorOptions):
        return replace(options, narrow=narrow)
    width = narrowed("num_style_feat", options.num_style_feat, C)
    return replace(options, narrow=narrow, num_style_feat=width)


def deepened(options: GeneratorOptions) -> GeneratorOptions:
    """OMGD's deep teacher: one more convolution at each level of the decoder."""
    return replace(options, extra_convs=options.extra_convs + 1)


MODEL = ModelDeclaration(
    generator=GeneratorOptions,
    discriminator=DiscriminatorOptions,
    scaled=scaled,
    deepened=deepened,
    blocks={
        "generator": (
            *("conv_body_first", "conv_body_down.*", "condition_shift.*"),
            *("style_conv1", "style_convs.*", "to_rgbs.*"),
        ),
        "discriminator": ("conv_body.*",),
    },
)
