"""Memory of a forward: what autograd keeps for backward in every phase, counted with tensors that have no data.

Counted are storages that autograd saves, each once, and not the parameters. What a single operation needs beside that
(workspaces, the teacher's layer of the moment) comes on top; it is small against the sum.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
from sdtrain.trainer import Trainer

DependsOnValues = (DataDependentOutputException, DynamicOutputShapeException)


def kept_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes that a forward of one chunk keeps for its backward, by STAGE/PHASE.

    `trainer` is used up: its networks have seen tensors without data. Allocates nothing and takes seconds at any size.
    Raises one of `DependsOnValues` when a shape or a branch depends on the numbers in a tensor.
    """
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            return _count(trainer, _blank_chunk(trainer))
    finally:
        _forget_cached()


def _count(trainer: Trainer, x: Chunk) -> dict[str, int]:
    engine, found = trainer.engine, dict[str, int]()
    modules = engine.modules(trainer.nets)
    for stage in trainer.method.stages:
        trainer.enter(stage)
        for phase in trainer.method.phases(stage, 0):
            with engine.fence(phase):
                open_phase(*modules)
                next_chunk(*modules)
                _prepass(phase, x)
                with saved_storages() as kept:
                    engine.loss(phase, x)
            found[f"{stage.name}/{phase.name}"] = total_bytes(kept, beside=modules)
    return found


def _blank_chunk(trainer: Trainer) -> Chunk:
    builder, draws = trainer.builder, trainer.draws(tuple(range(trainer.ghosts_at_once)))
    side, classes = builder.resolution, len(builder.class_counts)
    real = torch.zeros(draws.num_samples, 3, side, side)
    labels = torch.zeros(draws.num_samples, classes) if classes else None
    return trainer.method.blank(Chunk(step=0, seen_img=0, real=real, labels=labels, draws=draws))


def _prepass(phase: Phase, x: Chunk) -> None:
    """Means over ranks have no value here; a one stands for each."""
    if phase.prepass is not None and phase.receive is not None:
        names = list(phase.prepass(x))
        with unset_fake_temporarily():
            phase.receive({name: torch.ones(()) for name in names})


@contextmanager
def saved_storages() -> Iterator[dict[int, UntypedStorage]]:
    """Storages that autograd keeps for backward while the block runs, each once; they live as long as the result."""
    kept: dict[int, UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        """A tensor [...], handed on as it is; its storage is noted."""
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
