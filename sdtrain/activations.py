"""Memory and work of a phase: what is alive when its forward ends, and FLOPs, counted with tensors that have no data.

Counted are the storages that operations make, each once, for as long as somebody holds it, and not the weights. Blocks
that compute again (`models/recompute.py`) have their insides in memory one after another; the largest is added, as
if it came first in backward.
Gradients, which a plan counts apart, and workspaces inside a single operation come on top.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sdtrain.config.blocks import split_by_blocks
from sdtrain.contracts import Chunk, Phase
from sdtrain.models.ghost import next_chunk, open_phase
from sdtrain.models.recompute import keeping
from sdtrain.trainer import Trainer

if TYPE_CHECKING:
    from sdtrain.config.keys import Config

DependsOnValues = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Cost:
    """Of one chunk in one phase."""

    bytes: int
    """At the moment that needs most, beside weights and gradients."""
    flops: int
    """Of forward, and of what backward computes again."""


def costs(trainer: Trainer) -> dict[str, dict[str, Cost]]:
    """`Cost` by STAGE/PHASE of keeping everything ("plain") and, where blocks can, of computing them "again".

    `trainer` is used up: its networks have seen tensors without data. Allocates nothing and takes seconds at any size.
    Raises one of `DependsOnValues` when a shape or a branch depends on the numbers in a tensor.
    """
    try:
        # what would be compiled keeps what its plain form keeps, or less
        plain = torch.compiler.set_stance("force_eager")
        with warnings.catch_warnings(), plain, FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            return _counted(trainer, trainer.blank())
    finally:
        _forget_cached()


def _counted(trainer: Trainer, x: Chunk) -> dict[str, dict[str, Cost]]:
    plain, again = dict[str, Cost](), dict[str, Cost]()
    for stage in trainer.method.stages:
        trainer.enter(stage)
        for phase in trainer.method.phases(stage, 0):
            name = f"{stage.name}/{phase.name}"
            with keeping(trainer.engine.modules(trainer.nets)) as blocks:
                seen, inside = _watched(trainer, phase, x, blocks)
            plain[name] = Cost(seen.peak, seen.flops)
            if blocks:
                seen, _ = _watched(trainer, phase, x, [])
                most = max(seen.peak, seen.now + inside.largest)
                # where second derivatives have everything in memory there is nothing to come
                again[name] = Cost(min(most, plain[name].bytes), seen.flops + inside.flops)
    return {"plain": plain, **({"again": again} if again else {})}


def _watched(trainer: Trainer, phase: Phase, x: Chunk, blocks: Sequence[nn.Module]) -> tuple[Watch, Inside]:
    """What the forward of a phase needs, and what `blocks` need of it."""
    engine = trainer.engine
    modules = engine.modules(trainer.nets)
    with engine.fence(phase):
        open_phase(*modules)
        _prepass(phase, x)
        next_chunk(*modules, ghosts=x.draws.ghosts)
        with Watch() as seen, Inside(seen, blocks) as inside:
            loss = engine.loss(phase, x)
            held = seen.now
        del loss
    seen.now = held
    return seen, inside


class Watch(TorchDispatchMode):
    """Bytes alive (`now`, at most `peak`) and FLOPs done inside, of what is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.present: set[int] = set()  # places of storages that are known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._new((args, kwargs)):  # it was there before
            self._note(storage, 0)
        out = func(*args, **(kwargs or {}))
        for storage in self._new(out):
            self._note(storage, storage.nbytes())
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _new(self, tree: Any) -> Iterator[UntypedStorage]:
        for leaf in tree_iter(tree):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self.present:
                yield storage

    def _note(self, storage: UntypedStorage, size: int) -> None:
        self.present.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size).atexit = False

    def _gone(self, place: int, size: int) -> None:
        self.present.discard(place)
        self.now -= size


class Inside(AbstractContextManager):
    """What blocks do while they are called: bytes that the largest of them leaves behind, and FLOPs of all."""

    def __init__(self, seen: Watch, blocks: Sequence[nn.Module]) -> None:
        self.seen, self.blocks = seen, blocks
        self.largest = self.flops = 0

    def __enter__(self) -> Inside:
        before = [block.register_forward_pre_hook(self._begin) for block in self.blocks]
        self.hooks = [*before, *(block.register_forward_hook(self._end) for block in self.blocks)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, *called: object) -> None:
        self.start = self.seen.now, self.seen.flops

    def _end(self, *called: object) -> None:
        if torch.is_grad_enabled():  # otherwise nothing is kept, and nothing computed again
            self.largest = max(self.largest, self.seen.now - self.start[0])
            self.flops += self.seen.flops - self.start[1]


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


def total_bytes(kept: dict[int, UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in kept.values())


def _forget_cached() -> None:
    """Functions with a cache may have put tensors without data into it."""
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("sdtrain.") else ():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def recomputing_of(config: Config, trainer: Trainer) -> dict[str, Any]:
    """What a forward of each phase needs for its backward, with blocks that keep everything and that compute again.

    Empty when that depends on values. Uses the trainer up.
    """
    try:
        found = costs(trainer)
    except DependsOnValues:  # somebody's network looks at numbers; the rest of the plan stands
        return {}
    plain, again = found["plain"], found.get("again", {})
    able, unable = split_by_blocks(config.model)
    return {
        "used": config.checkpoint_activations,
        "computes_again": able,
        "keeps_everything": unable,
        "gb": {way: {phase: cost.bytes / 1e9 for phase, cost in phases.items()} for way, phases in found.items()},
        "more_gflop": {phase: (cost.flops - plain[phase].flops) / 1e9 for phase, cost in again.items()},
        # a backward takes about two forwards
        "more_work": {phase: (cost.flops / plain[phase].flops - 1) / 3 for phase, cost in again.items()},
    }
