"""Random numbers are looked up, never drawn from ambient state: value = f(seed, purpose, step, ghost).

A *ghost* is a virtual device of `ghost_batch` consecutive samples of the global batch. Whoever asks for the numbers of
ghost 3 at step 17 gets the same ones on any rank, in any order, however many ghosts are processed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Above this many numbers per ghost the device's own generator is used: copying noise maps from the host would cost more
# than the forward pass. The sequence then depends on the kind of device, never on the number of ranks.
HOST_NUMBERS_MAX = 1 << 16


def seed_of(*parts: object) -> int:
    """Map any printable parts to a seed in [0, 2**63)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose state is a function of `parts` alone."""
    return torch.Generator(device=device).manual_seed(seed_of(*parts))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of some ghosts at one step.

    Every method returns numbers for `len(ghosts) * ghost_batch` consecutive samples (or one row a ghost for the
    `*_per_ghost` forms). Asking twice with the same purpose gives the same numbers; that is how a teacher shares noise.
    For sampling and evaluation use `ghost_batch=1` and sample indices as ghosts: each image then has its own numbers.
    """

    seed: int
    step: int
    ghosts: Sequence[int]
    ghost_batch: int
    device: torch.device | str = "cpu"
    path: str = ""
    drawn: int | None = None
    """Samples of a ghost that numbers are drawn for, of which `ghost_batch` are the first; None = as many."""

    @property
    def num_samples(self) -> int:
        return len(self.ghosts) * self.ghost_batch

    @property
    def _rows(self) -> int:
        return self.drawn or self.ghost_batch

    def sub(self, purpose: str) -> Draws:
        """An independent family of numbers for the same ghosts."""
        return replace(self, path=f"{self.path}/{purpose}")

    def select(self, ghosts: Sequence[int]) -> Draws:
        return replace(self, ghosts=tuple(ghosts))

    def first(self, num: int) -> Draws:
        """The numbers that the first `num` samples of each ghost have among all of them."""
        return replace(self, ghost_batch=num, drawn=self.drawn or self.ghost_batch)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers [num_samples, *shape], float32."""
        return self._each(purpose, (self._rows, *shape), torch.randn)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) [num_samples, *shape], float32."""
        return self._each(purpose, (self._rows, *shape), torch.rand)

    def integers(self, purpose: str, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high) [num_samples, *shape], int64."""
        return self._each(purpose, (self._rows, *shape), lambda *a, **k: torch.randint(low, high, *a, **k))

    def uniform_per_ghost(self, purpose: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) [len(ghosts), *shape]: decisions that a whole ghost shares."""
        return self._each(purpose, (1, *shape), torch.rand)

    def generator(self, purpose: str, ghost: int, device: torch.device | str = "cpu") -> torch.Generator:
        return generator(self.seed, f"{self.path}/{purpose}", self.step, ghost, device=device)

    def _each(self, purpose: str, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
        if torch.device(self.device).type == "meta":  # a plan asks for shapes only
            return torch.empty((len(self.ghosts) * min(shape[0], self.ghost_batch), *shape[1:]), device="meta")
        on_host = torch.Size(shape).numel() <= HOST_NUMBERS_MAX
        device = torch.device("cpu" if on_host else self.device)
        rows = [draw(shape, generator=self.generator(purpose, g, device), device=device) for g in self.ghosts]
        return torch.cat([row[: self.ghost_batch] for row in rows]).to(self.device, non_blocking=True)
