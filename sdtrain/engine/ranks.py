"""What a rank may know of the others. Everything works without a process group, as a world of one."""

from __future__ import annotations

import datetime
import functools
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sdtrain.engine.heap import keep_freed_memory
from sdtrain.engine.launcher import wants_cpu
from sdtrain.engine.pulse import PULSE
from sdtrain.errors import ConfigError, MachineError, UserError
from sdtrain.precision import set_precision

RANK_TIMEOUT_SEC = 1800.0  # a collective waits this long for the slowest rank, unless a run says otherwise
# with GPUs too, what lies in the memory of the host goes over gloo: objects, counters, a checkpoint's tensors
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
FILES_A_RANK = 4  # connections that one process may have to each other: two to the store it may keep, two of the group
USUAL_FILES = 1024
P = ParamSpec("P")
R = TypeVar("R")


def has_gpu() -> bool:
    """Whether `auto` means a GPU here."""
    return torch.cuda.is_available() and not wants_cpu()


def pick_device(name: str = "auto", tf32: bool = False, deterministic: bool = False) -> torch.device:
    """auto (a GPU where there is one), cpu, cuda or cuda:1, with float32 as `set_precision` says.

    Raises ConfigError for a device that this machine has not.
    """
    try:
        device = torch.device(("cuda" if has_gpu() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ConfigError(f"--device {name} is no device; say auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name} cannot be used on this machine; leave it out, or say cpu")
    set_precision(tf32, deterministic)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def start_ranks(
    name: str = "auto", tf32: bool = False, deterministic: bool = False, timeout_sec: float = RANK_TIMEOUT_SEC
) -> torch.device:
    """Join the process group that accelerate or torchrun announced; returns this rank's device.

    Arguments and errors are those of `pick_device`; with several ranks each has a GPU of its own.
    """
    device = pick_device(name, tf32, deterministic)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    from accelerate import PartialState

    allow_files(FILES_A_RANK * int(os.environ["WORLD_SIZE"]))
    wait = datetime.timedelta(seconds=timeout_sec)
    state = PartialState(cpu=device.type == "cpu", timeout=wait, backend=BACKENDS[device.type])
    own: torch.device = state.device
    return own


def backends() -> str:
    """What tensors travel by: 'gloo', 'cpu:gloo,cuda:nccl', or 'none' in a world of one."""
    return str(dist.get_backend()) if _grouped() else "none"


def allow_files(wanted: int) -> None:
    """Let this process open `wanted` files beside the usual number, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted + USUAL_FILES if hard == resource.RLIM_INFINITY else min(wanted + USUAL_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _grouped() else 0


def world() -> int:
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    return rank() == 0


def destroy() -> None:
    """End this process's part in the group; its threads, left to the interpreter's exit, may abort a finished one."""
    if _grouped():
        dist.destroy_process_group()


def collective(function: Callable[P, R]) -> Callable[P, R]:
    """Whoever watches sees that this rank waits here for others. It raises `RankLost` when one of them has gone."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        PULSE.beat(waiting=function.__name__)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if not (_grouped() and _is_of_the_connection(error)):
                raise
            found = str(error).splitlines()[0]
            raise RankLost(f"rank {rank()} lost the others in {function.__name__}: {found}") from error
        finally:
            PULSE.beat()

    return call


def _is_of_the_connection(error: RuntimeError) -> bool:
    known = ("onnection", "gloo", "ocket", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in known)


class RankLost(MachineError):
    """Another rank has ended or cannot be reached."""


@collective
def barrier() -> None:
    if _grouped():
        dist.barrier()


@collective
def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Add tensors [...] of one device up over all ranks, in place, in one collective a data type."""
    if not _grouped() or not tensors:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):  # collectives must meet in one order on all ranks
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        torch._foreach_copy_(same, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in same]), same)])


@collective
def max_over_ranks(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """The largest of each number over all ranks, which have equally many."""
    if not _grouped():
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


@collective
def agree_max(value: int, device: torch.device | str = "cpu") -> int:
    """The largest `value` of all ranks: the way control-flow decisions are taken together."""
    if not _grouped():
        return value
    flag = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag.item())


@collective
def sum_up(values: Sequence[int], device: torch.device | str = "cpu") -> list[int]:
    """Each of `values` added up over all ranks, in one collective."""
    if not _grouped():
        return list(values)
    total = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return [int(value) for value in total.tolist()]


@collective
def any_rank(flag: Tensor) -> Tensor:
    """bool [] -> bool []: true on all ranks where it is true on one. The host does not wait for the device."""
    if not _grouped():
        return flag
    number = flag.int()
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return number.bool()


@collective
def first_difference(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor [...] whose bits are not those of the other ranks, None where all are alike."""
    if not _grouped() or not tensors:
        return None
    words = {name: torch.uint8 if t.element_size() % 4 else torch.int32 for name, t in tensors.items()}
    # the bits as whole numbers, added up: any one number that differs shows, and nothing is copied
    sums = [t.detach().reshape(-1).view(words[name]).sum(dtype=torch.int64) for name, t in tensors.items()]
    mine = torch.stack([*sums, *(-total for total in sums)])
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    unlike = (mine[: len(sums)] != -mine[len(sums) :]).nonzero()
    return list(tensors)[int(unlike[0])] if len(unlike) else None


@collective
def from_main(value: R) -> R:
    """Plain data of the main rank, on every rank; what the others give is not looked at."""
    return _from_rank(0, value)


def _from_rank(speaker: int, value: R) -> R:
    if not _grouped():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=speaker)
    return box[0]


def by_main(make: Callable[[], R]) -> R:
    """What `make` gives on the main rank, which alone calls it, on every rank. A `UserError` of it is raised on all."""
    found: Any = None
    problem: UserError | None = None
    if is_main():
        try:
            found = make()
        except UserError as error:
            problem = error
    found, problem = from_main((found, problem))
    if problem is not None:
        raise _of_all(problem)
    made: R = found
    return made


def by_all(make: Callable[[], R]) -> R:
    """What `make` gives, on each rank its own. A `UserError` of one is raised on all."""
    problem = ""
    try:
        found = make()
    except UserError as error:
        problem = f"rank {rank()}: {error}"
    if told := first_said(problem):
        raise _of_all(UserError(told))
    return found


def _of_all(problem: UserError) -> UserError:
    problem.of_all = True
    return problem


def first_said(said: R) -> R | None:
    """What the first rank has said that says anything, on every rank; None where none has. Else one number is sent."""
    speaker = world() - agree_max(world() - rank() if said else 0)
    return _from_rank(speaker, said) if speaker < world() else None


@collective
def tensors_from_main(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Those of the main rank, [...] on the CPU by name, on every rank; what the others give is not looked at."""
    listed = None if tensors is None else {name: (t.shape, t.dtype) for name, t in tensors.items()}
    if not _grouped() or (listed := _from_rank(0, listed)) is None:
        return None if tensors is None else dict(tensors)
    found = {}
    for name, (shape, dtype) in listed.items():
        own = tensors[name] if tensors is not None and is_main() else torch.empty(shape, dtype=dtype)
        found[name] = own.contiguous()
        dist.broadcast(found[name], src=0)
    return found


@collective
def gather_objects(value: Any) -> list[Any]:
    """Plain data of every rank, in rank order, on every rank: for the start and for what has failed, as it grows."""
    if not _grouped():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def shares(count: int, before_each: Callable[[], None] = lambda: None) -> Iterator[int]:
    """This rank's numbers below `count`. All ranks go through theirs together and call `before_each` equally often."""
    for first in range(0, count, world()):
        before_each()
        if first + rank() < count:
            yield first + rank()
