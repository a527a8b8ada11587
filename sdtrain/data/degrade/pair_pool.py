"""The training-pair pool of Real-ESRGAN: pairs of many steps are mixed, so that a batch is not degraded all alike.

Published behaviour, per process: while not full, keep the batch and train on it as it is; when full, permute the pool,
train on its first entries and put the new batch in their place. A process is a ghost here, the permutation is looked up
from (seed, step, ghost), and the content is part of the checkpoint: the official one loses it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from sdtrain.data.degrade.check import pool_problem
from sdtrain.data.degrade.options import DegradationOptions
from sdtrain.errors import ConfigError, RunError
from sdtrain.rng import Draws

State = dict[int, dict[str, Tensor]]
ORDER = "_order"  # [pool_size] int64: which slot stands at each place of the queue
FILLED = "_filled"  # [] int64: pairs kept so far
RESERVED = {ORDER, FILLED}
NOT_LEVELS = "an eight_bit field of the pair pool holds values that are not k / 255: store it as float"


def encode(x: Tensor) -> Tensor:
    """Levels k / 255 to bytes k, [...] float -> the same shape uint8.

    Raises ValueError for a tensor that would not come back bit for bit.
    """
    coded = (x * 255).round().to(torch.uint8)
    if x.is_cuda:  # asked on the device: nobody waits
        torch._assert_async((decode(coded) == x).all(), NOT_LEVELS)
    elif not torch.equal(decode(coded), x):
        raise ValueError(NOT_LEVELS)
    return coded


def decode(x: Tensor) -> Tensor:
    """Bytes [...] uint8 to levels in [0, 1], float32."""
    return x.float() / 255


def pool_for(options: DegradationOptions, ghost_batch: int) -> PairPool | None:
    """The pool that fits `Degradation.pair` under the same options; None when it is switched off.

    Raises ConfigError if the size is not a multiple of ghost_batch.
    """
    if options.pool_size == 0:
        return None
    return PairPool(options.pool_size, ghost_batch)


class PairPool:
    """Pools of `size` pairs, one a ghost.

    Fields named in `eight_bit` are kept as bytes, a quarter of the memory, and come back bit-equal (checked at every
    step); all others keep their type. Permuting moves an index, not the images. A batch of other fields than those kept
    begins an empty pool.
    """

    def __init__(self, size: int, ghost_batch: int, eight_bit: Collection[str] = ("lq", "hq")):
        problem = pool_problem(size, ghost_batch)
        if problem:
            raise ConfigError(problem)
        self.size, self.ghost_batch, self.eight_bit = size, ghost_batch, frozenset(eight_bit)
        self._ghosts: State = {}

    def __call__(self, batch: Mapping[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Exchange a batch of {name: [N, ...]}, N = draws.num_samples, ghost by ghost, for the one to train on."""
        if draws.ghost_batch != self.ghost_batch:
            raise ValueError(f"pool of ghosts of {self.ghost_batch} samples was given ghosts of {draws.ghost_batch}")
        parts = [
            self._exchange(
                ghost, {name: field[i * self.ghost_batch :][: self.ghost_batch] for name, field in batch.items()}, draws
            )
            for i, ghost in enumerate(draws.ghosts)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in batch}

    def _exchange(self, ghost: int, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        pool = self._ghosts.get(ghost, {})
        if pool.keys() - RESERVED != batch.keys():  # none yet, or a stage of other pairs begins: sharpened are not raw
            pool = self._ghosts[ghost] = self._empty(batch)
        filled = int(pool[FILLED])
        if filled < self.size:
            self._put(pool, pool[ORDER][filled : filled + self.ghost_batch], batch)
            pool[FILLED] += self.ghost_batch
            return batch
        generator = draws.generator("pair_pool", ghost)
        pool[ORDER] = pool[ORDER][torch.randperm(self.size, generator=generator)]
        slots = pool[ORDER][: self.ghost_batch]
        out = self._take(pool, slots, batch)
        self._put(pool, slots, batch)
        return out

    def _empty(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pool = {}
        for name, field in batch.items():
            dtype = torch.uint8 if name in self.eight_bit else field.dtype
            pool[name] = torch.zeros(self.size, *field.shape[1:], dtype=dtype, device=field.device)
        pool[ORDER], pool[FILLED] = torch.arange(self.size), torch.tensor(0)
        return pool

    def _put(self, pool: dict[str, Tensor], slots: Tensor, batch: dict[str, Tensor]) -> None:
        for name, field in batch.items():
            pool[name][slots.to(field.device, non_blocking=True)] = encode(field) if name in self.eight_bit else field

    def _take(self, pool: dict[str, Tensor], slots: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {name: pool[name][slots.to(pool[name].device, non_blocking=True)] for name in batch}
        return {name: decode(field) if name in self.eight_bit else field for name, field in out.items()}

    def state(self) -> State:
        """{ghost: {name: tensor}}: the live tensors, to be written before the next step changes them."""
        return {ghost: dict(pool) for ghost, pool in self._ghosts.items()}

    def load_state(
        self,
        state: Mapping[int, Mapping[str, Tensor]],
        ghosts: Collection[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the pools of `ghosts` (None = all) from a state that any layout of ranks has written.

        `state`: {ghost: {name: [size, ...], FILLED: []}}; absent ghosts start empty. Raises RunError for another size.
        """
        wanted = [ghost for ghost in state if ghosts is None or ghost in ghosts]
        for ghost in wanted:
            if len(state[ghost][ORDER]) != self.size:
                raise RunError(
                    f"the checkpoint's pair pool of ghost {ghost} holds {len(state[ghost][ORDER])} pairs, this run's"
                    f" {self.size}: resume with the same pool_size"
                )
        self._ghosts = {ghost: {k: self._own(k, v, device) for k, v in state[ghost].items()} for ghost in wanted}

    @staticmethod
    def _own(name: str, tensor: Tensor, device: torch.device | str) -> Tensor:
        return tensor.detach().clone().to("cpu" if name in RESERVED else device)
