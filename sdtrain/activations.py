"""Memory of a forward: what autograd keeps for backward in every phase, counted with tensors that have no data.

Counted are storages that autograd saves, each once, and not the parameters. What a single operation needs beside that
(workspaces, the teacher's layer of the moment) comes on top; it is small against the sum.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from sdtrain.contracts import Chunk, Phase
from sdtrain.models.ghost import next_chunk, open_phase
from sdtrain.rng import Draws

DependsOnValues = (DataDependentOutputException, DynamicOutputShapeException)


def kept_bytes(config: Any, method: Any, resolution: int, num_classes: int, ghosts: int = 1) -> dict[str, int]:
    """Bytes a forward of `ghosts` ghosts keeps, by STAGE/PHASE.

    `method` is used up: its networks have seen tensors without data. Allocates nothing and takes seconds at any size.
    Raises one of `DependsOnValues` when a shape or a branch depends on the numbers in a tensor.
    """
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            return _count(config, method, _blank_chunk(config, method, resolution, num_classes, ghosts))
    finally:
        _forget_cached()


def _count(config: Any, method: Any, x: Chunk) -> dict[str, int]:
    modules = [net.module for net in method.nets.values()]
    trainable = {name: [p for p in net.module.parameters() if p.requires_grad] for name, net in method.nets.items()}
    found: dict[str, int] = {}
    for stage in method.stages:
        if hasattr(method, "enter"):
            method.enter(stage.name, None)
        for phase in method.phases(stage.name, 0):
            for net, parameters in trainable.items():  # the fence of the engine
                asked = net in method.players(stage.name)[phase.player]
                for parameter in parameters:
                    parameter.requires_grad_(asked)
            open_phase(*modules)
            next_chunk(*modules)
            _prepass(phase, x)
            bf16 = config.precision == "bf16" and not phase.fp32
            found[f"{stage.name}/{phase.name}"] = _bytes_of(phase, x, modules, bf16)
    return found


def _blank_chunk(config: Any, method: Any, resolution: int, num_classes: int, ghosts: int) -> Chunk:
    draws = Draws(seed=0, step=0, ghosts=tuple(range(ghosts)), ghost_batch=config.ghost_batch)
    real = torch.zeros(draws.num_samples, 3, resolution, resolution)
    labels = torch.zeros(draws.num_samples, num_classes) if num_classes else None
    x = Chunk(step=0, seen_img=0, real=real, labels=labels, draws=draws)
    return method.blank(x) if hasattr(method, "blank") else x


def _prepass(phase: Phase, x: Chunk) -> None:
    """Means over ranks have no value here; a one stands for each."""
    if phase.prepass is not None and phase.receive is not None:
        names = list(phase.prepass(x))
        with unset_fake_temporarily():
            phase.receive({name: torch.ones(()) for name in names})


def _bytes_of(phase: Phase, x: Chunk, modules: list[Any], bf16: bool) -> int:
    with saved_storages() as kept, torch.autocast("cpu", enabled=bf16):
        phase.loss(x)
    return total_bytes(kept, beside=modules)


@contextmanager
def saved_storages() -> Iterator[dict[int, UntypedStorage]]:
    """Storages that autograd keeps for backward while the block runs, each once; they live as long as the result."""
    kept: dict[int, UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def total_bytes(kept: dict[int, UntypedStorage], beside: Sequence[nn.Module] = ()) -> int:
    """Bytes of storages, without those of the parameters and buffers of `beside`."""
    weights = {t.untyped_storage()._cdata for m in beside for t in (*m.parameters(), *m.buffers())}
    return sum(storage.nbytes() for number, storage in kept.items() if number not in weights)


def _forget_cached() -> None:
    """Functions with a cache may have put tensors without data into it."""
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("sdtrain.") else ():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
