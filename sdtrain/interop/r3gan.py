"""R3GAN's networks in official files: their architecture from shapes, and what only a snapshot's modules say.

A snapshot holds whole modules by class (G, D, G_ema); older released files name the same classes in other modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdtrain.errors import WeightsError
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
    embed = state.get("Model.EmbeddingLayer.weight")
    options = _stages(state, upwards=True)
    options["z_dim"] = state["Model.MainLayers.0.Layers.0.LinearLayer.weight"].shape[1]
    if embed is not None:
        options["z_dim"] -= embed.shape[0]
    return _described(options, embed)


def discriminator(state: State) -> dict[str, Any]:
    """R3GAN discriminator"""
    return _described(_stages(state, upwards=False), state.get("Model.EmbeddingLayer.weight"))


def _described(options: dict[str, Any], embed: Tensor | None) -> dict[str, Any]:
    if embed is not None:
        options["embed_dim"] = embed.shape[0]
    resolution = 4 << (len(options["widths"]) - 1)
    return {"options": options, "resolution": resolution, "num_classes": 0 if embed is None else embed.shape[1]}


def _stages(state: State, upwards: bool) -> dict[str, Any]:
    """Widths, groups, blocks and expansion, 4x4 first, from the residual blocks in the network's order."""
    blocks: dict[int, list[str]] = {}
    for found in filter(None, map(BLOCK.fullmatch, state)):
        blocks.setdefault(int(found[2]), []).append(found[1])
    if not blocks:
        raise WeightsError("a network that begins like R3GAN has no residual blocks; the file is damaged")
    rows = []
    for stems in (blocks[stage] for stage in sorted(blocks)):
        inner, width = state[f"{stems[0]}LinearLayer1.Layer.weight"].shape[:2]
        per_group = state[f"{stems[0]}LinearLayer2.Layer.weight"].shape[1]
        rows.append((width, inner // per_group, len(stems), inner // width))
    widths, groups, counts, expansions = map(list, zip(*(rows if upwards else reversed(rows))))
    return {"widths": widths, "groups": groups, "blocks": counts, "expansion": expansions[0]}


def low_precision_res(source: str, module: Record, upwards: bool) -> int:
    """How many highest resolutions the modules say to run in bfloat16."""
    formats = [
        record.attributes.get("DataType")
        for name, record in modules_of(source, module)
        if re.fullmatch(r"Model\.MainLayers\.\d+", name)
    ]
    low = [isinstance(value, Token) and value.name == "torch.bfloat16" for value in formats]
    return [*(reversed(low) if upwards else low), False].index(False)
