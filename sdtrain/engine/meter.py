"""Means of named scalars over steps and ranks, kept as float64 sums on the device until somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdtrain.contracts import Terms
from sdtrain.engine.ranks import rank, sum_over_ranks, world

Sums = dict[str, list[float]]  # name -> [sum, count]; floats survive JSON exactly


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
        """Global means since `clear`, in the order in which the terms first appeared, in one collective."""
        names = list(self.sums)
        if not names:
            return {}
        total = torch.stack([self.sums[n] for n in names])
        sum_over_ranks([total])
        # counts are not added up: every rank takes part in every phase
        return {n: t / world() / self.counts[n] for n, t in zip(names, total.tolist())}

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
