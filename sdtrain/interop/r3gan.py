"""R3GAN's networks in official files: their architecture from shapes, and what only a snapshot's modules say.

A snapshot holds whole modules by class (G, D, G_ema); older released files name the same classes in other modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.interop.budget import Budget, index_of
from sdtrain.interop.pickle_machine import Record, Token
from sdtrain.interop.safe_pickle import modules_of

State = Mapping[str, Tensor]
WHAT = "R3GAN snapshot"
BLOCK = re.compile(r"(Model\.MainLayers\.(\d+)\.Layers\.\d+\.)LinearLayer1\.Layer\.weight")


def is_snapshot(modules: Mapping[str, Record]) -> bool:
    """Whether all modules are R3GAN's, of either generation of names."""
    return all(re.match(r"training\.networks(_baseline)?\.", module.name) for module in modules.values())


def generator(state: State) -> dict[str, Any]:
    """R3GAN generator"""
    found = _described(state, upwards=True)
    inputs = _sizes(state, "Model.MainLayers.0.Layers.0.LinearLayer.weight")[1]
    found["options"]["z_dim"] = inputs - found["options"].get("embed_dim", 0)
    return found


def discriminator(state: State) -> dict[str, Any]:
    """R3GAN discriminator"""
    return _described(state, upwards=False)


def _described(state: State, upwards: bool) -> dict[str, Any]:
    options = _stages(state, upwards)
    classes = 0
    if "Model.EmbeddingLayer.weight" in state:
        options["embed_dim"], classes = _sizes(state, "Model.EmbeddingLayer.weight")[:2]
    return {"options": options, "resolution": 4 << (len(options["widths"]) - 1), "num_classes": classes}


def _sizes(state: State, name: str) -> tuple[int, ...]:
    """The sizes of a weight that must be there, at least a matrix and not empty. Raises WeightsError."""
    sizes = tuple(state[name].shape) if name in state else ()
    if len(sizes) < 2 or 0 in sizes:
        raise WeightsError(f"a network that begins like R3GAN has no usable {name}; the file is damaged")
    return sizes


def _stages(state: State, upwards: bool) -> dict[str, Any]:
    """Widths, groups, blocks and expansion, 4x4 first, from the residual blocks in the network's order."""
    blocks: dict[int, list[str]] = {}
    for found in filter(None, map(BLOCK.fullmatch, state)):
        blocks.setdefault(index_of(found[2]), []).append(found[1])
    if not blocks:
        raise WeightsError("a network that begins like R3GAN has no residual blocks; the file is damaged")
    rows = []
    for stems in (blocks[stage] for stage in sorted(blocks)):
        inner, width = _sizes(state, f"{stems[0]}LinearLayer1.Layer.weight")[:2]
        per_group = _sizes(state, f"{stems[0]}LinearLayer2.Layer.weight")[1]
        rows.append((width, inner // per_group, len(stems), inner // width))
    widths, groups, counts, expansions = map(list, zip(*(rows if upwards else reversed(rows))))
    return {"widths": widths, "groups": groups, "blocks": counts, "expansion": expansions[0]}


def low_precision_res(budget: Budget, module: Record, upwards: bool) -> int:
    """How many highest resolutions the modules say to run in bfloat16."""
    formats = [
        record.attributes.get("DataType")
        for name, record in modules_of(budget, module)
        if re.fullmatch(r"Model\.MainLayers\.\d+", name)
    ]
    low = [isinstance(value, Token) and value.name == "torch.bfloat16" for value in formats]
    return [*(reversed(low) if upwards else low), False].index(False)
