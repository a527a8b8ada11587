"""How whole tensors are dealt out over ranks: along dimension 0, in equal parts, the last ones shorter or empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Dealer:
    """This rank among those that share one copy (`group`), and among those that hold the same part (`twins`)."""

    group: dist.ProcessGroup
    twins: dist.ProcessGroup | None

    @property
    def num_parts(self) -> int:
        return self.group.size()

    def rows(self, whole: torch.Size) -> int:
        """Rows of a part of a tensor of shape `whole`, with padding."""
        return -(-whole[0] // self.num_parts)

    def part(self, whole: Tensor) -> Tensor:
        """What this rank holds of [rows, ...], a view."""
        per = self.rows(whole.shape)
        begin = min(self.group.rank() * per, len(whole))
        return whole[begin : min(begin + per, len(whole))]

    def gather(self, parts: Sequence[Tensor], wholes: Sequence[torch.Size], at: int | None = None) -> list[Tensor]:
        """Parts [...] of tensors of shapes `wholes`, all of one type -> the whole tensors. One collective.

        Where they are wanted `at` one rank alone, the others get back their parts.
        """
        if not parts:
            return []
        sizes = [self.rows(shape) * shape[1:].numel() for shape in wholes]
        flat = parts[0].new_zeros(sum(sizes))
        for room, part in zip(flat.split(sizes), parts, strict=True):
            room[: part.numel()].copy_(part.reshape(-1))
        every = self._every(flat, at)
        if every is None:
            return list(parts)
        columns = every.view(self.num_parts, -1).split(sizes, dim=1)
        return [column.reshape(-1)[: shape.numel()].view(shape) for column, shape in zip(columns, wholes, strict=True)]

    def _every(self, flat: Tensor, at: int | None) -> Tensor | None:
        """[numbers] of this rank -> [parts * numbers], or None where nothing was wanted."""
        if at is None:
            every = flat.new_empty(self.num_parts * len(flat))
            dist.all_gather_into_tensor(every, flat, group=self.group)
            return every
        if at not in dist.get_process_group_ranks(self.group):  # another copy serves it
            return None
        if dist.get_rank() != at:
            dist.gather(flat, dst=at, group=self.group)
            return None
        every = flat.new_empty(self.num_parts * len(flat))
        dist.gather(flat, list(every.split(len(flat))), dst=at, group=self.group)
        return every

    def scatter_sum(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors [rows, ...] of one type -> this rank's part of their sums over all ranks."""
        if not wholes:
            return []
        sizes = [self.rows(t.shape) * t.shape[1:].numel() for t in wholes]
        every = wholes[0].new_zeros(self.num_parts, sum(sizes))
        for column, whole in zip(every.split(sizes, dim=1), wholes, strict=True):
            padded = whole.new_zeros(column.numel())
            padded[: whole.numel()].copy_(whole.reshape(-1))
            column.copy_(padded.view_as(column))
        mine = every.new_empty(every.shape[1])
        dist.reduce_scatter_tensor(mine, every.view(-1), group=self.group)
        if self.twins is not None:
            dist.all_reduce(mine, group=self.twins)
        rooms = zip(mine.split(sizes), wholes, strict=True)
        return [room[: self.part(whole).numel()].view_as(self.part(whole)) for room, whole in rooms]
