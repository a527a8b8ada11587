"""A network that this process holds whole, and what every engine does with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.contracts import Net, Tensors
from sdtrain.engine.ema import freeze, update_ema
from sdtrain.errors import RunError


class LocalNet:
    """See `contracts.Net`. Averages and frozen networks are this; students too where no gradients are shared."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train(was_training)

    def state(self, at: int | None = None) -> dict[str, Tensor]:
        """See `contracts.Net`."""
        return own_tensors(self.module)

    def copied(self) -> dict[str, Tensor]:
        """What every rank holds a copy of, [...] by official name."""
        return own_tensors(self.module)

    def load(self, tensors: Tensors, where: str) -> None:
        """Tensors [...] by official name. Raises `RunError` naming the first difference."""
        load_strictly(self.module, tensors, where)

    def follow(self, other: Net, beta: float) -> None:
        assert isinstance(other, LocalNet)
        with other.gathered():
            update_ema(self.module, other.module, beta)

    def gathered(self) -> AbstractContextManager[None]:
        """Its module is complete inside. Entered by all ranks together."""
        return nullcontext()

    def freeze(self) -> None:
        freeze(self.module)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def size(self, trained: bool = False) -> int:
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad or not trained)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its state, [...] by official name, without a frozen feature network, which comes from a weights file."""
    frozen = tuple(getattr(module, "frozen_prefixes", ()))
    return {k: v for k, v in module.state_dict().items() if not (frozen and k.startswith(frozen))}


def load_strictly(module: nn.Module, tensors: Tensors, where: str) -> None:
    """Load by exact names and shapes [...], frozen parts excepted.

    Raises `RunError` naming the first difference.
    """
    require_fit(own_tensors(module), tensors, where)
    module.load_state_dict(tensors, strict=False)  # only frozen parts can be missing, everything else was compared


def require_fit(wanted: Tensors, tensors: Tensors, where: str) -> None:
    """Both have the same names and shapes [...]. Raises `RunError` naming the first difference."""
    wrong = [k for k in wanted if k not in tensors or tensors[k].shape != wanted[k].shape]
    wrong += [k for k in tensors if k not in wanted]
    if wrong:
        what = f"tensor {wrong[0]} and {len(wrong) - 1} more do not fit this network"
        raise RunError(f"{where}: {what}; is it of another configuration?")
