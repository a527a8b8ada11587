"""Running a phase: chunks forward and backward, agreement that all is finite, one optimizer step, pass state moves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdtrain.contracts import Chunk, Phase, Terms
from sdtrain.engine.player import Net, Player, only_training
from sdtrain.engine.ranks import agree_max, gather_objects, rank, sum_over_ranks, world
from sdtrain.models.ghost import close_phase, next_chunk, open_phase


class NonFinite(RuntimeError):
    """A loss or gradient was not finite; no optimizer of this phase has moved on any rank."""


class Meter:
    """Means of named scalars over steps and ranks, kept as float64 sums on the device until somebody asks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, terms: Terms, weight: float = 1.0) -> None:
        for name, value in terms.items():
            value = value.detach().double() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def count(self, names: Sequence[str]) -> None:
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Global means since `clear`, in the order in which the terms first appeared."""
        names = list(self.sums)
        if not names:
            return {}
        total = torch.stack([self.sums[n].reshape(()) for n in names])
        sum_over_ranks([total])
        return {n: t / world() / self.counts[n] for n, t in zip(names, total.tolist())}

    def clear(self) -> None:
        self.sums, self.counts = {}, {}

    def state(self) -> dict[str, list[float]]:
        """This rank's sums and counts; floats survive JSON exactly."""
        return {n: [float(s), float(self.counts[n])] for n, s in self.sums.items()}

    @staticmethod
    def shared_out(states: dict[str, dict[str, list[float]]], num_ranks: int) -> dict[str, list[float]]:
        """What a rank takes over from those that saved: its own sums, or their mean if they were another number."""
        if len(states) == num_ranks:
            return states[str(rank())]
        first = next(iter(states.values()), {})
        return {n: [sum(s[n][0] for s in states.values()) / len(states), count] for n, (_, count) in first.items()}

    def load_state(self, state: dict[str, list[float]], device: torch.device) -> None:
        self.sums = {n: torch.tensor(s, dtype=torch.float64, device=device) for n, (s, _) in state.items()}
        self.counts = {n: int(c) for n, (_, c) in state.items()}


class Engine:
    """Moves players. Knows ranks, precision and devices; knows nothing of losses."""

    def __init__(
        self,
        players: dict[str, Player],
        nets: dict[str, Net],
        device: torch.device,
        precision: str,
        exact: bool = False,
    ) -> None:
        """`exact`: every chunk is one ghost, and gradients are added up in float64 (config key `summation`)."""
        self.players, self.nets, self.device, self.exact = players, nets, device, exact
        self.bf16 = precision == "bf16"
        self.meter = Meter()

    def run(self, phase: Phase, chunks: Sequence[Chunk]) -> Terms:
        """One phase over this rank's share of the global batch. Raises `NonFinite` on all ranks together."""
        player = self.players[phase.player]
        player.set_lr(chunks[0].seen_img)
        modules = [net.module for net in self.nets.values()]
        with only_training(player, list(self.players.values())):
            self._prepass(phase, chunks)
            open_phase(*modules)
            terms = self._backward(phase, player, chunks, modules)
            finite = self._agree_finite(phase, player, terms)
            close_phase(*modules, sum_over_ranks=sum_over_ranks, apply=finite)
            if not finite:
                raise NonFinite(self._explain(phase, terms, chunks[0].step))
            if not phase.fp32:  # penalties are not clipped (official StyleNAT)
                player.clip_gradients()
            player.step()
        self.meter.add(terms)
        self.meter.count(list(terms))
        return terms

    def _backward(self, phase: Phase, player: Player, chunks: Sequence[Chunk], modules: list) -> Terms:
        share = Meter()
        overlap = phase.reaches_all and not self.exact
        for i, chunk in enumerate(chunks):
            next_chunk(*modules)
            weight = chunk.draws.num_samples / sum(c.draws.num_samples for c in chunks)
            with player.sharing(overlap, last=i == len(chunks) - 1):
                with self.autocast(not phase.fp32):
                    loss, terms = phase.loss(chunk)
                (loss if self.exact else loss * weight).backward()
            if self.exact:
                player.collect_gradients()
            share.add({**terms, f"{phase.name}/loss": loss}, weight)
        if self.exact:
            player.average_collected(len(chunks) * world())
        elif not overlap:
            player.average_gradients()
        return share.sums

    def _prepass(self, phase: Phase, chunks: Sequence[Chunk]) -> None:
        if phase.prepass is None:
            return
        means = Meter()
        modules = [net.module for net in self.nets.values()]
        for chunk in chunks:
            open_phase(*modules)
            with torch.no_grad() if not phase.fp32 else torch.enable_grad(), self.autocast(not phase.fp32):
                terms = phase.prepass(chunk)
            means.add(terms, chunk.draws.num_samples / sum(c.draws.num_samples for c in chunks))
            close_phase(*modules, apply=False)
        means.count(list(means.sums))
        values = means.means()
        if phase.receive is not None:
            phase.receive({n: torch.tensor(v, device=self.device, dtype=torch.float32) for n, v in values.items()})

    def autocast(self, wanted: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16 and wanted)

    def _agree_finite(self, phase: Phase, player: Player, terms: Terms) -> bool:
        numbers = [t.reshape(()).float() for t in terms.values()]
        numbers += [n.float() for n in torch._foreach_norm(player.gradients())]
        bad = not bool(torch.stack(numbers).isfinite().all())
        return agree_max(int(bad), self.device) == 0

    def _explain(self, phase: Phase, terms: Terms, step: int) -> str:
        mine = {n: float(t) for n, t in terms.items()}
        for found in gather_objects((rank(), mine)):
            bad = [f"{n}={v}" for n, v in found[1].items() if not math.isfinite(v)]
            if bad:
                return f"phase {phase.name} at step {step}: {', '.join(bad)} on rank {found[0]}"
        return f"phase {phase.name} at step {step}: the losses are finite but a gradient is not"
