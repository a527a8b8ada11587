"""Every rank holds every network whole, and ranks average gradients.

`summation: exact` takes one ghost a forward and adds gradients up in float64: ghosts then leave no trace of their order
or of the rank they were on. `fast` lets DistributedDataParallel share gradients while backward still runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdtrain.config.options import Optimizer
from sdtrain.contracts import Net, Phase
from sdtrain.engine.net import LocalNet
from sdtrain.engine.phases import PhaseEngine
from sdtrain.engine.player import BasePlayer, Span
from sdtrain.engine.ranks import sum_over_ranks, world
from sdtrain.engine.sums import SumPlayer

# torch 2.15 has renamed it, and warns of the old name
RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if RENAMED else "broadcast_buffers": False}


class DdpNet(LocalNet):
    """Called through DDP while its player trains: the bare module would let ranks drift apart without an error."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.wrapped: DistributedDataParallel | None = None
        self.live = False  # its player is training with gradients shared during backward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.wrapped if self.live and self.wrapped is not None else self.module)(*args, **kwargs)

    def wrap(self) -> None:
        """Buffers stay ours: pass state is summed over ranks by the ledger of `models/ghost.py`."""
        if self.parameters():  # DDP refuses a network in which nothing is trained
            self.wrapped = DistributedDataParallel(self.module, gradient_as_bucket_view=True, **OWN_BUFFERS)


class FastPlayer(BasePlayer):
    """Gradients of several ghosts at once, shared during the last backward (DDP) or after it."""

    def __init__(self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None) -> None:
        super().__init__(nets, options, span, lazy)
        self.ours = [net for net in nets if isinstance(net, DdpNet)]
        for net in self.ours if world() > 1 else ():
            net.wrap()

    @contextmanager
    def chunk(self, phase: Phase, last: bool) -> Iterator[None]:
        """DDP cannot follow losses that miss parameters or have second derivatives (`reaches_all` is false)."""
        with ExitStack() as stack:
            for net in self.ours:
                net.live = phase.reaches_all
                if net.live and net.wrapped is not None and not last:
                    stack.enter_context(net.wrapped.no_sync())
            try:
                yield
            finally:
                for net in self.ours:
                    net.live = False

    def backward(self, loss: Tensor, share: float) -> None:
        """`loss`: a scalar, weighted so that the chunks of this rank add up to their mean."""
        (loss * share).backward()

    def finish(self, phase: Phase, num_chunks: int) -> None:
        if phase.reaches_all or world() == 1:  # DDP has averaged during the last backward, or there is nobody else
            return
        for p in self.params:
            if p.grad is None:  # all ranks must add up the same list
                p.grad = torch.zeros_like(p)
        gradients = self.gradients()
        sum_over_ranks(gradients)
        torch._foreach_div_(gradients, world())


class Ddp(PhaseEngine):
    """See `contracts.Engine`."""

    def net(self, module: nn.Module, trained: bool = True) -> LocalNet:
        placed = module.to(self.device)
        return DdpNet(placed) if trained else LocalNet(placed)

    def player(self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None) -> BasePlayer:
        return (SumPlayer if self.exact else FastPlayer)(nets, options, span, lazy)

    def modules(self, nets: Mapping[str, Net]) -> list[nn.Module]:
        return [net.module for net in nets.values() if isinstance(net, LocalNet)]
