"""What each of some runs at once has of a machine: cores and GPUs of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Slot:
    """What one run has; nothing said means all there is."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    beside: bool = False
    """Whether others run at the same time."""

    def enter(self) -> None:
        """Keep the calling thread, and with it the processes that it starts, to the cores of the slot."""
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)

    def environment(self) -> dict[str, str]:
        return {**os.environ, **({VISIBLE: ",".join(self.gpus)} if self.gpus else {})}


def divided(jobs: int) -> list[Slot]:
    """This machine in so many parts."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    parts = zip(shares(cores, jobs), shares(gpus(os.environ), jobs), strict=True)
    return [Slot(tuple(some), tuple(others), beside=True) for some, others in parts]


def shares(things: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Things that lie beside each other for each part; where they are fewer than the parts, parts share one."""
    count = len(things)
    if count < parts:
        return [things[part % count : part % count + 1] if count else () for part in range(parts)]
    return [things[part * count // parts : (part + 1) * count // parts] for part in range(parts)]


def gpus(env: Mapping[str, str]) -> list[str]:
    """Their names, as the variable for the visible ones has them."""
    if VISIBLE in env:
        return [name for name in env[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
