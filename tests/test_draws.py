"""Random numbers that are counted out: a noise map of StyleGAN2 above 65536 numbers a ghost.

Without these tests two ghosts or steps could see the same noise or a shifted copy of it, a GPU other noise than the
CPU, or noise that is not normal; pictures would be a little worse, and nothing would say why.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from sdtrain import rng
from sdtrain.rng import Draws, normal_of, seed_of, splitmix64

SIDE = 257  # odd, and its square is more than torch draws


def maps(
    *ghosts: int, seed: int = 0, step: int = 3, purpose: str = "noise", ghost_batch: int = 1, side: int = SIDE
) -> Tensor:
    return Draws(seed=seed, step=step, ghosts=ghosts, ghost_batch=ghost_batch).normal(purpose, 1, side, side)


@pytest.fixture(scope="module")
def many() -> Tensor:
    """float64 [4 million]: of one ghost."""
    return maps(0, ghost_batch=4, side=1024).flatten().double()


def test_the_whole_numbers_are_those_of_the_published_generator() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [n % 2**64 for n in splitmix64([0, 1234567], 4)[1].tolist()] == published
    assert splitmix64([0], 1).item() % 2**64 == 0xE220A8397B1DCDAF


def test_another_program_finds_the_same_numbers_from_uint64() -> None:
    seeds, count = [seed_of("a"), seed_of("b"), (1 << 63) - 1], 100_000
    with np.errstate(over="ignore"):
        x = np.array(seeds, np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            2**64 + rng.GAMMA
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    low, high = (x & np.uint64(0xFFFFFFFF)).astype(np.int32), (x >> np.uint64(32)).astype(np.int32)
    radius = np.sqrt(-2 * np.log((low.astype(np.float64) + 2.0**31 + 0.5) / 2**32))
    angle = 2 * np.pi * high.astype(np.float64) / 2**32
    wanted = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(3, -1)
    words = splitmix64(seeds, count)
    assert np.array_equal(words.numpy().view(np.uint64), x)
    apart = normal_of(words).numpy() != wanted.astype(np.float32)
    assert apart.mean() < 1e-5  # where float64 lies between two float32
    assert np.allclose(normal_of(words).numpy(), wanted, rtol=1e-7, atol=1e-9)


def test_a_ghost_has_its_numbers_in_any_company_and_samples_theirs_among_fewer() -> None:
    torch.manual_seed(0)
    ambient = torch.get_rng_state()
    both = maps(7, 2, ghost_batch=3)
    assert both.shape == (6, 1, SIDE, SIDE) and both.dtype == torch.float32
    assert torch.equal(both, torch.cat([maps(7, ghost_batch=3), maps(2, ghost_batch=3)]))
    draws = Draws(seed=0, step=3, ghosts=(7, 2), ghost_batch=3)
    assert torch.equal(
        draws.first(2).normal("noise", 1, SIDE, SIDE), both.view(2, 3, 1, SIDE, SIDE)[:, :2].flatten(0, 1)
    )
    few = draws.normal("noise", 1, 100, 100), draws.first(2).normal("noise", 1, 100, 100)  # torch's
    assert torch.equal(few[1], few[0].view(2, 3, 1, 100, 100)[:, :2].flatten(0, 1))
    assert torch.equal(ambient, torch.get_rng_state())


def test_a_plan_is_told_shapes_alone() -> None:
    draws = Draws(seed=0, step=0, ghosts=(0, 1), ghost_batch=2, device="meta")
    for found in (draws.normal("noise", 1, 512, 512), draws.first(1).normal("noise", 1, 512, 512)):
        assert found.device.type == "meta" and found.shape[1:] == (1, 512, 512)
    assert len(draws.first(1).normal("noise", 1, 512, 512)) == 2


def test_numbers_are_normal(many: Tensor) -> None:
    count = len(many)
    # mean and the first moments of the normal law, each within four of its own deviations
    deviations = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0, 6: 10170.0}
    for power, variance in deviations.items():
        wanted = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 6: 15.0}[power]
        assert abs(float(many.pow(power).mean()) - wanted) < 4 * math.sqrt(variance / count), power
    law = 0.5 * (1 + torch.erf(many.sort().values / math.sqrt(2)))
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps[1:] - law).abs().max(), (law - steps[:-1]).abs().max())
    assert float(distance) < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov, one in a thousand
    for bound in (2.0, 3.0, 4.0):
        rare = count * math.erfc(bound / math.sqrt(2))
        assert abs(int((many.abs() > bound).sum()) - rare) < 4 * math.sqrt(rare), bound
    assert 4.7 < float(many.abs().max()) < 6.8


def related(x: Tensor, y: Tensor) -> float:
    """The largest correlation of two sequences [N], of their squares and of their sizes, in its own deviations."""
    pairs = [(f(x.double()), f(y.double())) for f in (torch.clone, torch.square, torch.abs)]
    return max(abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) for pair in pairs) * math.sqrt(len(x))


def test_neighbours_in_a_map_are_unrelated(many: Tensor) -> None:
    for lag in (1, 2, 3, 4, 16, 1024, 1 << 20):
        assert related(many[:-lag], many[lag:]) < 4.5, lag
    assert related(many[0::2], many[1::2]) < 4.5  # the two of a pair


def test_maps_of_neighbouring_ghosts_steps_seeds_and_purposes_are_unrelated() -> None:
    apart = {
        "itself": maps(5),
        **{f"ghost {g}": maps(g) for g in (4, 6, 7, 13)},
        **{f"step {s}": maps(5, step=s) for s in (2, 4, 5, 1003)},
        **{f"seed {s}": maps(5, seed=s) for s in (1, 2, 1 << 40)},
        "purpose": maps(5, purpose="noise2"),
    }
    for one, two in combinations(apart, 2):
        assert related(apart[one].flatten(), apart[two].flatten()) < 5.0, (one, two)


def test_bits_of_many_ghosts_are_as_often_one_as_zero_and_change_with_any_bit_of_the_seed() -> None:
    def ones(words: Tensor) -> Tensor:
        """float64 [64]: the share of words with each bit."""
        return torch.stack([(words >> bit & 1).double().mean() for bit in range(64)])

    seeds = [seed_of(0, "noise", step, ghost) for step in range(256) for ghost in range(64)]
    words = splitmix64(seeds, 4)
    assert float((ones(words) - 0.5).abs().max()) < 0.5 * 4.5 / math.sqrt(words.numel())
    for bit in (0, 1, 31, 32, 62):
        flipped = splitmix64([seed ^ 1 << bit for seed in seeds], 4)
        assert float((ones(words ^ flipped) - 0.5).abs().max()) < 0.5 * 4.5 / math.sqrt(words.numel()), bit
