"""Gradients that belong to the player: taken a chunk at a time, added up, shared once at the end of the phase.

Autograd is asked for the gradients instead of leaving them in `p.grad`, so that no hook of whoever holds the networks
(DeepSpeed's reduction, FSDP's) fires in between, and second derivatives work with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdtrain.contracts import Phase
from sdtrain.engine.player import BasePlayer
from sdtrain.engine.ranks import sum_over_ranks, world


class SumPlayer(BasePlayer):
    """Exact: every chunk is one ghost, sums in float64. Fast: chunks of any size, sums in the parameters' precision."""

    exact = True
    meets_once = True
    sums: list[Tensor | None]

    def clear(self) -> None:
        super().clear()
        self.sums = []

    def backward(self, loss: Tensor, share: float) -> None:
        """`loss`: a scalar. Its gradient moves into the sums; fast, weighted by `share`."""
        found = torch.autograd.grad(loss if self.exact else loss * share, self.leaves, allow_unused=True)
        self.sums = [self._plus(*pair) for pair in zip(self.sums, found, strict=True)] if self.sums else owned(found)

    def _plus(self, total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return total
        return owned([gradient])[0] if total is None else self._wide(total).add_(gradient)

    def _wide(self, total: Tensor) -> Tensor:
        """What is added up to. The first gradient stays as it is until there is a second: a sum of one is exact."""
        return total.double() if self.exact else total

    def finish(self, phase: Phase, num_chunks: int) -> None:
        """The mean over all ghosts of all ranks, rounded to the parameters' precision once."""
        # a parameter that no loss has reached takes part: all ranks must add up the same list
        pairs = zip(self.sums or [None] * len(self.leaves), self.leaves, strict=True)
        sums = [torch.zeros_like(p) if total is None else total for total, p in pairs]
        self.sums = []
        shares = (num_chunks if self.exact else 1) * world()
        if shares > 1:
            sums = self.over_ranks([self._wide(total) for total in sums])
            torch._foreach_div_(sums, shares)
        for p, mean in zip(self.params, sums, strict=True):
            p.grad = mean.to(p.dtype)

    def over_ranks(self, sums: list[Tensor]) -> list[Tensor]:
        """Sums [...] as `leaves` -> what this rank holds of their sums over all ranks, [...] as `params`."""
        sum_over_ranks(sums)
        return sums

    def norm(self) -> Tensor:
        """Of the averaged gradient, all parameters together: a float64 scalar, so that no engine rounds another way."""
        return self.norms().square().sum().sqrt()

    def norms(self) -> Tensor:
        """float64 [tensors]: those of what this rank holds."""
        return torch.stack([g.double().norm() for g in self.gradients()])

    def clip_gradients(self) -> None:
        if self.options.clip_norm:
            factor = (self.options.clip_norm / (self.norm() + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_(self.gradients(), factor)


def owned(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients [...] of autograd, each contiguous and alone on its memory: they will be changed in place."""
    taken: set[int] = set()
    own: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None:
            gradient = gradient.contiguous()
            place = gradient.untyped_storage()._cdata  # tensors without data have one as well
            gradient = gradient.clone() if place in taken else gradient
            taken.add(place)
        own.append(gradient)
    return own
