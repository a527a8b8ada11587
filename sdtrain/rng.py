"""Random numbers are looked up, never drawn from ambient state: value = f(seed, purpose, step, ghost).

A *ghost* is a virtual device of `ghost_batch` consecutive samples of the global batch. Whoever asks for the numbers of
ghost 3 at step 17 gets the same ones on any rank, on any device, in any order, however many ghosts are processed at
once. Few numbers are torch's own on the host. Many are counted out where they are needed, each by itself, from
SplitMix64 (Steele, Lea and Flood 2014): its whole numbers are equal to the bit on all devices, and normal ones of them
to the last bit of float32 in all but about one of 10^8, where two libraries round float64 another way.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Numbers of a ghost that torch draws on the host; more are noise maps, whose copying to a GPU would cost more than the
# forward pass. On a CPU torch's are drawn in a third of the time: small ones, of which a step has many, stay torch's.
HOST_NUMBERS_MAX = 1 << 16
# of SplitMix64; int64 wraps around as uint64 does
GAMMA, *FACTORS = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def seed_of(*parts: object) -> int:
    """Map any printable parts to a seed in [0, 2**63)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose state is a function of `parts` alone."""
    return torch.Generator(device=device).manual_seed(seed_of(*parts))


def splitmix64(seeds: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """The first `count` numbers of SplitMix64 from each of `seeds` in [0, 2**63), as int64 [len(seeds), count]."""
    starts = torch.tensor(seeds).unsqueeze(1).to(device, non_blocking=True)
    x = starts + torch.arange(1, count + 1, device=device).mul_(GAMMA)
    for shift, factor in zip((30, 27), FACTORS):
        x ^= _shifted(x, shift)
        x *= factor
    x ^= _shifted(x, 31)
    return x


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by for int64 [...] taken as uint64."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def normal_of(words: Tensor) -> Tensor:
    """Random int64 [N, count] -> standard normal float32 [N, 2 count]: Box and Muller in float64, rounded once."""
    halves = words.view(torch.int32).unflatten(1, (-1, 2))
    chance = halves[..., 0].double().add_(2.0**31 + 0.5).mul_(2.0**-32)  # in (0, 1): numbers reach 6.8
    radius = chance.log_().mul_(-2.0).sqrt_()
    angle = halves[..., 1].double().mul_(math.tau / 2**32)
    pairs = torch.empty(halves.shape, device=words.device)
    torch.mul(angle.cos(), radius, out=pairs[..., 0])
    torch.mul(angle.sin_(), radius, out=pairs[..., 1])
    return pairs.flatten(1)


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
        size = math.prod(shape)
        if self._rows * size <= HOST_NUMBERS_MAX or torch.device(self.device).type == "meta":
            return self._each(purpose, (self._rows, *shape), torch.randn)
        seeds = [seed_of(*self._parts(purpose, ghost)) for ghost in self.ghosts]
        found = normal_of(splitmix64(seeds, -(-self.ghost_batch * size // 2), self.device))
        return found[:, : self.ghost_batch * size].reshape(self.num_samples, *shape)

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
        """For what torch alone draws: Poisson counts, permutations. On a GPU they depend on its model."""
        return generator(*self._parts(purpose, ghost), device=device)

    def _parts(self, purpose: str, ghost: int) -> tuple[object, ...]:
        return self.seed, f"{self.path}/{purpose}", self.step, ghost

    def _each(self, purpose: str, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
        if torch.device(self.device).type == "meta":  # a plan asks for shapes only
            return torch.empty((len(self.ghosts) * min(shape[0], self.ghost_batch), *shape[1:]), device="meta")
        rows = [draw(shape, generator=self.generator(purpose, g)) for g in self.ghosts]
        return torch.cat([row[: self.ghost_batch] for row in rows]).to(self.device, non_blocking=True)
