"""Means of named scalars over steps and ranks, kept as float64 sums on the device until somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdtrain.contracts import Terms
from sdtrain.engine.ranks import rank, sum_over_ranks, world

Sums = dict[str, list[float]]  # name -> [sum, count]; floats survive JSON exactly
Means = tuple[dict[str, float], list[float]]


class Meter:
    """See `contracts.Meter`."""

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
        return self.means_and_sums([])[0]

    def means_and_sums(self, more: Sequence[float], device: torch.device | str = "cpu") -> Means:
        """`means`, and the sums over ranks of `more` numbers of `device`, in one collective."""
        names = list(self.sums)
        if not (names or more):
            return {}, []
        parts = [self.sums[n].reshape(1) for n in names]
        total = torch.cat([*parts, torch.tensor(more, dtype=torch.float64, device=device)] if more else parts)
        sum_over_ranks([total])
        found = total.tolist()
        # counts are not added up: every rank takes part in every phase
        means = {n: t / world() / self.counts[n] for n, t in zip(names, found)}
        return means, found[len(names) :]

    def clear(self) -> None:
        self.sums, self.counts = {}, {}

    def state(self) -> Sums:
        """This rank's sums and counts."""
        return {n: [float(s), float(self.counts[n])] for n, s in self.sums.items()}

    @staticmethod
    def shared_out(states: dict[str, Sums], num_ranks: int) -> Sums:
        """What a rank takes over from those that saved: its own sums, or their mean if they were another number."""
        if len(states) == num_ranks:
            return states[str(rank())]
        first: Sums = next(iter(states.values()), {})
        return {n: [sum(s[n][0] for s in states.values()) / len(states), count] for n, (_, count) in first.items()}

    def load_state(self, state: Sums, device: torch.device) -> None:
        self.sums = {n: torch.tensor(s, dtype=torch.float64, device=device) for n, (s, _) in state.items()}
        self.counts = {n: int(c) for n, (_, c) in state.items()}
