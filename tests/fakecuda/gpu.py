"""A GPU that computes nothing: tensors on it have shapes, types and a device, the host's are real.

Everything that touches the device passes through `Gpu`, which counts it. What host and device say to each other:

    wait      the host stands still until the device has done all it was given: a number that is read, a copy to the
              host, a copy from the host that is not told not to block
    copy      numbers from the host that nobody waits for
    launch    an operation that reads or writes memory of the device
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sdtrain.activations import _forget_cached

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
MAKES_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
MAKES_NOTHING |= {"detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh"}
ASKS = {"device", "layout", "sym_size", "sym_stride", "is_contiguous", "sym_is_contiguous", "dim"}
MAKES_NOTHING |= ASKS
SHAPES_FROM_NUMBERS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
INDEXES = {"index", "index_put", "index_put_"}
OF_ONE_TYPE = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "grid_sampler_2d", "dot", "mv"}
OF_FULL_PRECISION = ("linalg_", "_linalg_", "_fft_", "inverse")
LOW = (torch.bfloat16, torch.float16)


class WrongType(RuntimeError):
    """A kernel of the device would refuse these types."""


class Gpu(TorchDispatchMode):
    """Inside, `cuda` works. `launches`, `waits` and `copies` count by what and where."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.clear()

    def clear(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        there = [t for t in flat if isinstance(t, FakeTensor) and t.device.type == "cuda"]
        wanted = kwargs.get("device")
        wanted = wanted if wanted is None else torch.device(wanted).type
        name = func.overloadpacket.__name__
        if not there:
            if wanted != "cuda":
                return func(*args, **kwargs)
            if name == "_to_copy":
                self.carried(kwargs.get("non_blocking", False))
            elif not func.is_view and name not in MAKES_NOTHING:
                self.launches[name] += 1
            with self.fake:
                return func(*args, **kwargs)
        return self.run(func, name, args, kwargs, flat, there, wanted)

    def run(self, func: Any, name: str, args: Any, kwargs: Any, flat: Any, there: list[Tensor], wanted: Any) -> Any:
        """An operation with tensors of the device."""
        if name == "_local_scalar_dense":
            self.waited("read")
            return answer(there[0]).item()
        if name == "equal":
            self.waited("equal")
            return True
        if name == "_to_copy" and wanted == "cpu":
            self.waited("to host") if not kwargs.get("non_blocking") else self.carried(True)
            return answer(there[0], kwargs.get("dtype"))
        if name == "copy_" and args[0].device.type == "cpu":
            self.waited("to host") if not (args[2:] or [kwargs.get("non_blocking")])[0] else self.carried(True)
            return args[0].copy_(answer(args[0]))
        if name == "copy_" and args[1].device.type == "cpu":
            self.carried(bool((args[2:] or [kwargs.get("non_blocking")])[0]))
        if name in SHAPES_FROM_NUMBERS:
            self.waited(name)
        if name in INDEXES and any(i is not None and i.device.type == "cpu" for i in args[1]):
            self.waited("index of the host")
        if name == "_linalg_check_errors":
            return self.waited(name)
        if not func.is_view and name not in MAKES_NOTHING:
            self.launches[name] += 1
        check_types(name, [t for t in flat if isinstance(t, Tensor)])
        if name.startswith("_fused_"):  # moves what it is given
            return None
        with self.fake:
            return func(*args, **kwargs)

    def carried(self, quietly: bool) -> None:
        if quietly:
            self.copies[place()] += 1
        else:
            self.waited("from host")

    def waited(self, what: str) -> None:
        self.waits[f"{what} in {place()}"] += 1


def answer(asked: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a tensor [...] of the device holds, as far as the host is told: numbers are 1, and nothing is so."""
    dtype = dtype or asked.dtype
    return torch.full(asked.shape, dtype != torch.bool, dtype=dtype)


def place() -> str:
    """Where in the product an operation came from."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if ROOT / "sdtrain" in path.parents:
            return f"{path.relative_to(ROOT / 'sdtrain')}:{frame.lineno} {frame.name}"
    return "?"


def check_types(name: str, tensors: list[Tensor]) -> None:
    """What shapes alone do not show: kernels that take one type only, or none of 16 bits."""
    types = {t.dtype for t in tensors if t.is_floating_point()}
    if name in OF_ONE_TYPE and len(types) > 1:
        raise WrongType(f"{name} of {types} in {place()}")
    if name.startswith(OF_FULL_PRECISION) and types & set(LOW):
        raise WrongType(f"{name} in 16 bits in {place()}")


def moved(module: nn.Module, device: Any = None, *args: Any, **kwargs: Any) -> nn.Module:
    """`module.to(device)`, which cannot put a tensor without data in a real one's place."""
    memo: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            made = tensor.detach().to(device)
            is_weight = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_weight else made
        return memo[id(tensor)]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: there(t) for name, t in held.items() if t is not None})
    return module


@contextmanager
def gpu() -> Iterator[Gpu]:
    """A process that has a GPU, for as long as the block runs."""
    made = Gpu()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` is made here and carried over
    read_list = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        """One copy; a tensor without data is read number by number otherwise."""
        return read_list(tensor.cpu() if isinstance(tensor, FakeTensor) and tensor.ndim else tensor)

    def synchronize(event: Any) -> None:
        made.waited("event")

    lists = mock.patch.object(Tensor, "tolist", tolist)
    events = mock.patch.object(torch.cuda.Event, "synchronize", synchronize)
    several = mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda tensors, device: True)
    adam = mock.patch("torch.optim.adam._default_to_fused_or_foreach", lambda *a, **k: (False, True))
    try:
        with mock.patch.object(nn.Module, "to", moved), several, adam, lists, events, made:
            yield made
    finally:
        _forget_cached()
        torch._C._set_only_lift_cpu_tensors(before)
