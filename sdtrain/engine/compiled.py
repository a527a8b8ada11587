"""torch.compile for what nobody trains: averages that teach and are measured, distances, the features of D.

A network names the parts of it that take tensors alone and have no second derivatives (`compiles`, where `*` stands for
a word between dots). They are compiled where they are, so names of weights, checkpoints and copies of a network stay
what they were. Numbers agree with those of plain calls up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdtrain.engine.agree import failure_of, raise_together
from sdtrain.engine.net import LocalNet
from sdtrain.errors import ConfigError
from sdtrain.models.ghost import close_phase, next_chunk, open_phase
from sdtrain.models.recompute import blocks_of

if TYPE_CHECKING:
    from sdtrain.trainer import Trainer

Parts = Mapping[str, nn.Module]
SHAPES = 8  # kinds of input (sizes, with or without a graph) that a part may meet; torch counts all parts together


def parts_of(name: str, net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network called `name` that can be compiled, each with its name: those without trained weights."""
    for path, owner in net.named_modules():
        for inner, part in blocks_of(owner, getattr(owner, "compiles", ())).items():
            if not any(p.requires_grad for p in part.parameters()):
                yield ".".join(filter(None, (name, path, inner))), part


def frozen_parts(trainer: Trainer) -> Parts:
    """What `compile: frozen` means in this run. Raises `ConfigError` where it means nothing."""
    config, nets = trainer.config, trainer.method.nets
    looked_at = {name: net.module for name, net in nets.items() if isinstance(net, LocalNet)}
    if getattr(getattr(config, "r1", None), "gamma", 0):  # D is differentiated twice, its features too
        looked_at = {name: net for name, net in looked_at.items() if not any(p.requires_grad for p in net.parameters())}
    looked_at |= {type(net).__name__: net for net in trainer.builder.watchers}
    found = {name: part for owner, net in looked_at.items() for name, part in parts_of(owner, net)}
    if not found:
        raise ConfigError(
            "compile: frozen has nothing to compile in this run, whose frozen networks have no such parts: set none"
        )
    return found


def described(parts: Parts) -> str:
    """'G_ema (12 parts), LPIPS (5 parts)'."""
    counts = Counter(name.partition(".")[0] for name in parts)
    return ", ".join(f"{owner} ({count} part{'s' * (count > 1)})" for owner, count in counts.items())


def compile_parts(parts: Parts) -> None:
    """Have each compiled when it is first called; a failure is then a `ConfigError` that names the part."""
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, SHAPES * len(parts))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, SHAPES * len(parts))
    for name, part in parts.items():
        vars(part).pop("forward", None)  # what nobody trains has no backward in which to compute again
        part.compile(fullgraph=True)
        part._compiled_call_impl = told(name, part._compiled_call_impl)  # type: ignore[arg-type]


def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose failure to compile is one sentence."""
    from torch._dynamo.exc import TorchDynamoException

    def compiled(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(
                f"compile: frozen cannot compile {name} on this machine ({reason[:200]}): set compile: none, or "
                "install what torch.compile needs (a C++ compiler on a CPU, triton on a GPU)"
            ) from error

    return compiled


def warm_up(trainer: Trainer) -> None:
    """Compile for the shapes of this stage before it begins, on all ranks together; no network or state moves.

    Training's shapes then come first whatever a run has measured before. Raises `RankFailed` on all ranks.
    """
    if trainer.parts:
        raise_together(failure_of(lambda: _call_once(trainer)), intact=False)


def _call_once(trainer: Trainer) -> None:
    engine, method, before = trainer.engine, trainer.method, trainer.method.state()
    x = trainer.blank()
    try:
        for phase in method.phases(trainer.stage, 0):
            if phase.fp32 or phase.prepass is not None:  # second derivatives, which no part has
                continue
            with engine.fence(phase):
                open_phase(engine.layers)
                next_chunk(engine.layers, ghosts=x.draws.ghosts)
                loss, _ = engine.loss(phase, x)
                torch.autograd.grad(loss, engine.players[phase.player].leaves, allow_unused=True)
                close_phase(engine.layers, apply=False)
    finally:
        method.load_state(before)
