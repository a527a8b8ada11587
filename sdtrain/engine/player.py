"""A player owns its networks, one optimizer and the way its gradients are shared between ranks.

Methods call networks through `Net` and never learn which engine is behind it. Under DDP a network is called through the
wrapper while its player trains (else ranks would drift apart without an error) and directly while it is only looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdtrain.config.options import Optimizer
from sdtrain.engine.ranks import sum_over_ranks, world


class Net:
    """A network as methods see it: something to call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.wrapped: nn.Module | None = None
        self.live = False  # its player is training with gradients shared during backward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.wrapped if self.live and self.wrapped is not None else self.module)(*args, **kwargs)


class Player:
    """Networks that one optimizer moves."""

    def __init__(
        self,
        name: str,
        nets: Sequence[Net],
        options: Optimizer,
        stage_img: tuple[int, int] = (0, 0),
        overlap: bool = False,
    ) -> None:
        """`overlap`: share gradients during backward (DDP), not after it."""
        self.name, self.nets, self.options, self.stage_img = name, list(nets), options, stage_img
        self.named = {
            f"{i}.{key}" if len(self.nets) > 1 else key: p
            for i, net in enumerate(self.nets)
            for key, p in net.module.named_parameters()
            if p.requires_grad
        }
        self.params = list(self.named.values())
        self.optimizer = make_optimizer(self.params, options)
        self.exact_sums: dict[int, Tensor] = {}
        if overlap and world() > 1:
            for net in self.nets:
                net.wrapped = share_gradients(net.module)

    def set_lr(self, seen_img: int) -> None:
        """The learning rate is a function of images seen, never of a scheduler's own count."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * lr_factor(self.options, seen_img, self.stage_img)

    @contextmanager
    def sharing(self, overlap: bool, last: bool) -> Iterator[None]:
        """Forward and backward of one chunk: DDP averages gradients during the last backward, or not at all."""
        with ExitStack() as stack:
            for net in self.nets:
                net.live = overlap
                if overlap and isinstance(net.wrapped, DistributedDataParallel) and not last:
                    stack.enter_context(net.wrapped.no_sync())
            try:
                yield
            finally:
                for net in self.nets:
                    net.live = False

    def average_gradients(self) -> None:
        """Average over ranks after backward: for losses that miss parameters or have second derivatives."""
        if world() == 1:
            return
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self.params if p.grad is not None]
        sum_over_ranks(grads)
        torch._foreach_div_(grads, world())

    def collect_gradients(self) -> None:
        """Move the gradients of one ghost into float64 sums: added up there, ghosts leave no trace of their order."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                held = self.exact_sums.get(i)
                self.exact_sums[i] = p.grad.double() if held is None else held.add_(p.grad)
                p.grad = None

    def average_collected(self, num_ghosts: int) -> None:
        """The mean over all ghosts of all ranks, rounded to the parameters' precision once."""
        sums = [self.exact_sums.get(i, torch.zeros_like(p, dtype=torch.float64)) for i, p in enumerate(self.params)]
        sum_over_ranks(sums)
        for p, total in zip(self.params, sums):
            p.grad = (total / num_ghosts).to(p.dtype)
        self.exact_sums = {}

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def clip_gradients(self) -> None:
        """Shorten the averaged gradient to `clip_norm`, all parameters together; 0 leaves it."""
        if self.options.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.params, self.options.clip_norm)

    def step(self) -> None:
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by parameter name: `NAME/exp_avg`, `NAME/step`, ..."""
        return {
            f"{key}/{slot}": value
            for key, p in self.named.items()
            for slot, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave; a parameter that has nothing there starts afresh."""
        self.optimizer.state.clear()
        for key, p in self.named.items():
            slots = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == key}
            if slots:
                self.optimizer.state[p] = {k: v.to(p.device if k != "step" else "cpu") for k, v in slots.items()}


def share_gradients(module: nn.Module) -> nn.Module:
    """Wrap for DDP; buffers stay ours because pass state is summed over ranks by the ledger."""
    if not any(p.requires_grad for p in module.parameters()):
        return module
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def make_optimizer(params: list[nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    if options.kind == "sgd":
        return torch.optim.SGD(params, lr=options.lr)
    beta1, beta2 = options.betas
    return torch.optim.Adam(params, lr=options.lr, betas=(beta1, beta2), eps=options.eps)


def lr_factor(options: Optimizer, seen_img: int, stage_img: tuple[int, int] = (0, 0)) -> float:
    """Linear warm-up, then a factor `decay` at every milestone, then a straight line to zero between two positions.

    Milestones are positions in the run, or shares (`drop_at`) of the stage from `stage_img[0]` to `stage_img[1]`.
    """
    warm = min(1.0, seen_img / options.warmup_img) if options.warmup_img else 1.0
    start, end = stage_img
    steps = sum(seen_img >= milestone for milestone in options.milestones_img)
    steps += sum(seen_img >= start + share * (end - start) for share in options.drop_at)
    line = 1.0
    if options.linear_decay_img:
        start, end = options.linear_decay_img
        line = 1.0 - min(max((seen_img - start) / max(end - start, 1), 0.0), 1.0)
    return warm * options.decay**steps * line


@contextmanager
def only_training(player: Player, players: Sequence[Player]) -> Iterator[None]:
    """The fence: while `player` trains, no parameter of the others asks for a gradient, and none has one."""
    others = [p for other in players if other is not player for p in other.params]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
        for p in player.params:
            p.grad = None
        player.exact_sums = {}
