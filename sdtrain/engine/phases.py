"""Running a phase: chunks forward and backward, agreement that all is finite, one optimizer step, pass state moves."""

from __future__ import annotations

import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.config.options import Optimizer
from sdtrain.contracts import Chunk, Loss, Net, Phase, Stage, Terms
from sdtrain.engine.agree import raise_together
from sdtrain.engine.meter import Meter
from sdtrain.engine.net import LocalNet
from sdtrain.engine.player import BasePlayer, Span, only_training
from sdtrain.engine.pulse import PULSE
from sdtrain.engine.ranks import agree_max, any_rank, backends, first_difference, gather_objects, rank, sum_over_ranks
from sdtrain.engine.verdicts import Asked, Verdicts
from sdtrain.errors import Together
from sdtrain.models.ghost import advancing_layers, close_phase, next_chunk, open_phase

FINE, NOT_FINITE, FAILED = 0, 1, 2  # what a rank says of its share of a phase


class Unlike(RuntimeError, Together):
    """Copies of a network are not the same on all ranks."""


class NonFinite(RuntimeError, Together):
    """A loss or gradient was not finite; no optimizer of this phase has moved on any rank."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What engines that share networks out can be told."""

    name: str = "ddp"
    """The engine's."""
    ranks: int | None = None
    """Ranks that share one copy of a network; None = all."""
    teacher: bool = False
    """Averages and teachers are dealt out too."""
    stage: int = 0
    """ZeRO's."""
    offload: bool = False
    """Optimizer state lives in the memory of the host."""


class PhaseEngine(ABC):
    """What engines share: the order of things within a phase. See `contracts.Engine`."""

    def __init__(
        self,
        device: torch.device,
        options: Mapping[str, Optimizer],
        precision: str = "fp32",
        exact: bool = True,
        clamp: bool = False,
        sharing: Sharing | None = None,
        late: bool = False,
    ) -> None:
        """`options`: by player. `exact`: one ghost a chunk, sums in float64. `clamp`: repair gradients, never stop.

        `late`: see `verdicts.py`; a step that is not finite is then the last one.
        """
        self.sharing = sharing or Sharing()
        self.device, self.options, self.exact, self.clamp = device, options, exact, clamp
        self.bf16 = precision == "bf16"
        self.players: dict[str, BasePlayer] = {}
        self.meter = Meter()
        self.verdicts = Verdicts(device) if late and device.type == "cuda" else None

    def described(self) -> dict[str, Any]:
        """What is used, for environment.json and the log."""
        used = {"precision": "bf16" if self.bf16 else "fp32", "summation": "exact" if self.exact else "fast"}
        where = {"device": str(self.device), "process_group": backends()}
        return {**asdict(self.sharing), "class": type(self).__name__, **used, **where}

    @abstractmethod
    def net(self, module: nn.Module, trained: bool = True) -> Net:
        """Take a network over."""

    @abstractmethod
    def player(self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None) -> BasePlayer:
        """The player of these networks."""

    @abstractmethod
    def modules(self, nets: Mapping[str, Net]) -> list[nn.Module]:
        """What holds the layers that have pass state."""

    def begin(self, stage: Stage, start_img: int, nets: Mapping[str, Net], lazy: Mapping[str, int]) -> None:
        for player in self.players.values():
            player.close()
        span = (start_img, stage.end_img)
        self.players = {
            name: self.player([nets[net] for net in own], self.options[name], span, lazy.get(name))
            for name, own in stage.players.items()
        }
        for player in self.players.values():
            player.clear()
        self.layers = list(advancing_layers(*self.modules(nets)))

    def check_copies(self, nets: Mapping[str, Net]) -> None:
        """Networks of which every rank holds a copy are the same on all. Raises `RuntimeError` on all ranks."""
        copies = {n: net.copied() for n, net in nets.items() if isinstance(net, LocalNet)}
        found = first_difference({f"{n}: {k}": t for n, tensors in copies.items() for k, t in tensors.items()})
        if found:
            raise Unlike(f"ranks hold different copies of {found}; nothing was saved: resume the last checkpoint")

    def run(self, phase: Phase, chunks: Sequence[Chunk]) -> Terms:
        """See `contracts.Engine`. Raises `NonFinite` or `RankFailed` on all ranks, before its optimizer moves."""
        player = self.players[phase.player]
        player.set_clock(chunks[0].seen_img)
        with self.fence(phase):
            self._prepass(phase, chunks)
            open_phase(self.layers)
            terms, failure = self._backward(phase, player, chunks)
            if self.clamp:
                terms[f"{phase.name}/clamped"] = player.clamp()
            found = self._agree(phase, player, terms, failure, chunks[0].step)
            # before the raise: a phase that comes to nothing must leave no trace in running statistics either
            close_phase(self.layers, sum_over_ranks=sum_over_ranks, apply=found == FINE)
            if found == FAILED:
                raise_together(failure)
            if found == NOT_FINITE:
                raise NonFinite(self._explain(phase.name, terms, chunks[0].step))
            if not phase.fp32:  # penalties are not clipped (official StyleNAT)
                player.clip_gradients()
            player.step()
        self.meter.add(terms)
        self.meter.count(list(terms))
        return terms

    def fence(self, phase: Phase) -> AbstractContextManager[None]:
        """Only the networks of the phase's player ask for gradients inside."""
        return only_training(self.players[phase.player], list(self.players.values()))

    def loss(self, phase: Phase, chunk: Chunk) -> Loss:
        """The forward pass of one chunk, in the precision of the phase."""
        with self.autocast(not phase.fp32):
            return phase.loss(chunk)

    def autocast(self, wanted: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16 and wanted)

    def _backward(self, phase: Phase, player: BasePlayer, chunks: Sequence[Chunk]) -> tuple[Terms, Exception | None]:
        """The terms, and what failed here: this rank then still adds its part up with the others, who wait for it."""
        share = Meter()
        failure: Exception | None = None
        try:
            self._add_up(phase, player, chunks, share)
        except Exception as error:
            if not player.meets_once or self.verdicts is not None:
                raise
            failure = error
            traceback.clear_frames(error.__traceback__)  # they hold the memory of the graph
        player.finish(phase, len(chunks))
        return share.sums, failure

    def _add_up(self, phase: Phase, player: BasePlayer, chunks: Sequence[Chunk], share: Meter) -> None:
        total = sum(chunk.draws.num_samples for chunk in chunks)
        for i, chunk in enumerate(chunks):
            PULSE.beat()
            next_chunk(self.layers, ghosts=chunk.draws.ghosts)
            weight = chunk.draws.num_samples / total
            with player.chunk(phase, last=i == len(chunks) - 1):
                loss, terms = self.loss(phase, chunk)
                player.backward(loss, weight)
            share.add({**terms, f"{phase.name}/loss": loss}, weight)

    def _prepass(self, phase: Phase, chunks: Sequence[Chunk]) -> None:
        if phase.prepass is None:
            return
        means, total = Meter(), sum(chunk.draws.num_samples for chunk in chunks)
        for chunk in chunks:
            open_phase(self.layers)
            next_chunk(self.layers, ghosts=chunk.draws.ghosts)
            # a penalty's prepass takes derivatives itself (path lengths), so it needs the graph while it runs
            with torch.no_grad() if not phase.fp32 else torch.enable_grad(), self.autocast(not phase.fp32):
                terms = phase.prepass(chunk)
            means.add(terms, chunk.draws.num_samples / total)
            close_phase(self.layers, apply=False)  # the phase itself will see the same images again
        means.count(list(means.sums))
        values = means.global_means()
        if phase.receive is not None:
            phase.receive({n: v.float() for n, v in values.items()})

    def settle(self, late: bool = False) -> None:
        """See `contracts.Engine`; `late` leaves the phases since the last call unread: nobody waits for them."""
        bad = self.verdicts.read(late) if self.verdicts is not None else None
        if bad is not None:
            raise NonFinite(self._explain(bad.phase, bad.terms, bad.step))

    def _agree(self, phase: Phase, player: BasePlayer, terms: Terms, failure: Exception | None, step: int) -> int:
        """The worst that any rank has to say of the phase; where that is read late, the optimizer asks for itself."""
        if self.verdicts is None:
            mine = FINE
            if failure is not None:
                mine = FAILED
            elif not self.clamp and bool(_not_finite(player, terms)):
                mine = NOT_FINITE
            return agree_max(mine, self.device)
        if not self.clamp:
            asked = Asked(phase=phase.name, step=step, terms=terms, bad=any_rank(_not_finite(player, terms)))
            player.skip_where(self.verdicts.ask(asked))
        return FINE

    def _explain(self, phase: str, terms: Terms, step: int) -> str:
        mine = {n: float(t) for n, t in terms.items()}
        for found in gather_objects((rank(), mine)):
            bad = [f"{n}={v}" for n, v in found[1].items() if not math.isfinite(v)]
            if bad:
                return f"phase {phase} at step {step}: {', '.join(bad)} on rank {found[0]}"
        return f"phase {phase} at step {step}: the losses are finite but a gradient is not"


def _not_finite(player: BasePlayer, terms: Terms) -> Tensor:
    """bool []: whether a term or a gradient of this rank is not finite."""
    # a norm is not finite when one element is not; one answer for all spares a wait for each
    numbers = [t.reshape(()) for t in terms.values()], torch._foreach_norm(player.gradients())
    return torch.cat([torch.stack(list(some)).float() for some in numbers]).isfinite().all().logical_not()
