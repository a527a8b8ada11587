"""Which image stands at which position: pure functions of the seed, so that resuming is arithmetic.

Only raw bits of numpy's Philox are used; numpy promises those never to change, unlike its permutations.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sdtrain.rng import seed_of

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=3)
def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of one epoch: every sample once. int64 [num_samples]."""
    bits = np.random.Philox(key=seed_of(seed, "order", epoch)).random_raw(num_samples)
    shuffled = np.argsort(bits, kind="stable")
    shuffled.setflags(write=False)
    return shuffled


def order(seed: int, position: int | np.ndarray, num_samples: int) -> np.ndarray:
    """Sample index at each position, without replacement within an epoch.

        order(seed, position, n) = permutation(seed, position // n, n)[position % n]

    `position` counts samples from the start of training: step * batch_size + index in the global batch.
    """
    positions = np.atleast_1d(np.asarray(position, np.int64))
    epochs, places = np.divmod(positions, num_samples)
    found = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permutation(seed, int(epoch), num_samples)[places[here]]
    return found.reshape(np.shape(position))


def hashed(seed: int, purpose: str, position: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each position (splitmix64 of seed, purpose and position)."""
    with np.errstate(over="ignore"):
        z = np.asarray(position, np.uint64) * GOLDEN + np.uint64(seed_of(seed, purpose))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def flipped(seed: int, position: int | np.ndarray) -> np.ndarray:
    """Whether the image at each position is mirrored: bool, half of them."""
    return (hashed(seed, "xflip", position) >> np.uint64(63)).astype(bool)


def substitute(seed: int, position: int, attempt: int, num_samples: int) -> int:
    """The sample that stands in for a bad one at `position`; other positions keep theirs."""
    return int(hashed(seed, f"substitute {attempt}", position) % np.uint64(num_samples))
