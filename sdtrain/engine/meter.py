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
        if not terms:
            return
        shares = torch._foreach_mul([value.detach().double() for value in terms.values()], weight)
        new = dict(zip(terms, shares, strict=True))
        if known := [name for name in terms if name in self.sums]:
            totals = torch._foreach_add([self.sums[name] for name in known], [new[name] for name in known])
            new |= dict(zip(known, totals, strict=True))
        self.sums |= new

    def count(self, names: Sequence[str]) -> None:
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Global means since `clear`, in the order in which the terms first appeared, in one collective."""
        found = {n: float(self.sums[n]) / self.counts[n] for n in self._of_host()}
        names, total = self._totals()
        if names:
            found |= {n: t / world() / self.counts[n] for n, t in zip(names, total.tolist())}
        return {n: found[n] for n in self.sums}

    def global_means(self) -> dict[str, Tensor]:
        """The same as float64 scalars, which the host does not wait for."""
        names, total = self._totals()
        return {n: t / world() / self.counts[n] for n, t in zip(names, total)}

    def _of_host(self) -> list[str]:
        """Numbers that the host has put beside those of a device: they are the same on every rank."""
        places = {n: s.device.type for n, s in self.sums.items()}
        return [n for n, place in places.items() if place == "cpu"] if len(set(places.values())) > 1 else []

    def _totals(self) -> tuple[list[str], Tensor]:
        """Names, and their sums over all ranks, [names]; counts are not added up: every rank takes part in a phase."""
        names = [n for n in self.sums if n not in self._of_host()]
        total = torch.stack([self.sums[n].reshape(()) for n in names]) if names else torch.zeros(0)
        sum_over_ranks([total] if names else [])
        return names, total

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
