"""A player owns the parameters of its networks, one optimizer, and the way a phase's gradients come together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdtrain.config.options import Optimizer
from sdtrain.config.schedule import value_at
from sdtrain.contracts import Net, Phase, Tensors
from sdtrain.engine.adam import CpuAdam
from sdtrain.engine.nonfinite import clamp_nonfinite
from sdtrain.losses.regularizers import lazy_adam

Span = tuple[int, int]  # images at the beginning and at the end of a stage


class BasePlayer(ABC):
    """See `contracts.Player`. An engine says how gradients of chunks and ranks are added up."""

    meets_once = False  # ranks meet in `finish` alone, so that one whose chunk has failed can still come there

    def __init__(self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None) -> None:
        """`lazy`: steps between two penalties of this player, None where it has none."""
        self.options, self.span, self.lazy = options, span, lazy
        self.named = {
            f"{i}.{key}" if len(nets) > 1 else key: p  # names of two networks may be equal
            for i, net in enumerate(nets)
            for key, p in net.parameters().items()
        }
        self.params = list(self.named.values())
        self.leaves = self.params  # what autograd differentiates by; sharded networks compute with other tensors
        fused = self.params[0].is_cuda
        self.optimizer = make_optimizer(self.params, *self.settings(span[0]), options, fused)

    def settings(self, seen_img: int) -> tuple[float, tuple[float, float]]:
        """(lr, betas) of Adam: functions of images seen, never of a scheduler's own count."""
        o = self.options
        lr = value_at(o.lr, seen_img, self.span)
        beta1, beta2 = (value_at(beta, seen_img, self.span) for beta in o.betas)
        slow_lr, slow_betas = lazy_adam(lr, (beta1, beta2), None if o.rescale == "none" else self.lazy)
        return slow_lr if o.rescale == "all" else lr, slow_betas

    def set_clock(self, seen_img: int) -> None:
        """Put the settings of this moment into the optimizer."""
        lr, betas = self.settings(seen_img)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if "betas" in group:  # SGD has none
                group["betas"] = betas

    @contextmanager
    def chunk(self, phase: Phase, last: bool) -> Iterator[None]:
        """Around forward and backward of one chunk of a phase; `last` is its last on this rank."""
        yield

    @abstractmethod
    def backward(self, loss: Tensor, share: float) -> None:
        """Backward of a chunk's mean loss, a scalar, `share` being its part of this rank's samples."""

    @abstractmethod
    def finish(self, phase: Phase, num_chunks: int) -> None:
        """Leave in `p.grad` the mean over the global batch, the same on every rank."""

    def clear(self) -> None:
        """No gradient outlives its phase."""
        for p in self.params:
            p.grad = None

    def ask(self, wanted: bool) -> None:
        """Whether its parameters ask for gradients."""
        for p in self.leaves:
            p.requires_grad_(wanted)

    def close(self) -> None:
        """The stage is over: let go of what outlives a list of parameters."""
        self.clear()

    def gradients(self) -> list[Tensor]:
        """Those that are there, shapes [...] as the parameters'."""
        return [p.grad for p in self.params if p.grad is not None]

    def clamp(self) -> Tensor:
        """Make every element of the averaged gradient finite; how many were not, an int64 scalar."""
        return clamp_nonfinite(self.gradients())

    def clip_gradients(self) -> None:
        """Shorten the averaged gradient to `clip_norm`, all parameters together; 0 leaves it."""
        if self.options.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.params, self.options.clip_norm)

    def skip_where(self, bad: Tensor) -> None:
        """The next step moves nothing where `bad`, float32 [], is 1: a fused optimizer looks at it on the device."""
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # as torch's GradScaler hands it over

    def step(self) -> None:
        self.optimizer.step()

    def state(self, at: int | None = None) -> dict[str, Tensor]:
        """PARAMETER/SLOT -> [...], what Adam holds of each parameter, in the same order on all ranks."""
        return {
            f"{key}/{slot}": value
            for key, p in self.named.items()
            for slot, value in sorted(self.optimizer.state.get(p, {}).items())  # a file's order is that of its reader
            if isinstance(value, Tensor)
        }

    def size(self) -> int:
        """Numbers in its parameters, all ranks' parts together."""
        return sum(p.numel() for p in self.leaves)

    def load_state(self, tensors: Tensors) -> None:
        """Take over PARAMETER/SLOT -> [...] from `state`; a parameter that has nothing there starts afresh."""
        self.optimizer.state.clear()
        slots: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            key, _, slot = name.rpartition("/")
            slots.setdefault(key, {})[slot] = value
        for key, p in self.named.items():
            if key in slots:
                # Adam counts its steps on the host, unless it is fused
                where = p.device if self.optimizer.defaults.get("fused") else "cpu"
                own = {k: v.to(p.device if k != "step" else where) for k, v in slots[key].items()}
                self.optimizer.state[p] = own


def make_optimizer(
    params: list[nn.Parameter], lr: float, betas: tuple[float, float], options: Optimizer, fused: bool = False
) -> torch.optim.Optimizer:
    """`fused`: one kernel for many parameters, on a GPU; it can be told on the device to skip a step."""
    if options.kind == "sgd":
        return torch.optim.SGD(params, lr=lr, fused=fused)
    if params[0].is_cpu:
        return CpuAdam(params, lr=lr, betas=betas, eps=options.eps)
    return torch.optim.Adam(params, lr=lr, betas=betas, eps=options.eps, fused=fused or None)


@contextmanager
def only_training(player: BasePlayer, players: Sequence[BasePlayer]) -> Iterator[None]:
    """The fence: while `player` trains, no parameter of the others asks for a gradient, and none has one."""
    others = [other for other in players if other is not player]
    for other in others:
        other.ask(False)
    try:
        yield
    finally:
        for other in others:
            other.ask(True)
        player.clear()
