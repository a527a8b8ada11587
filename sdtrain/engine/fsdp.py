"""Every rank holds a part of each trained network: weights, gradients and optimizer, by torch's `fully_shard`.

Within a phase a network is gathered when it is first called and stays so until the phase ends: ghosts of one phase use
it again and again, and second derivatives need it. Gradients are ours (`sums.py`): FSDP would share them at the end of
each backward of each block, and a network that is called twice would be rounded twice. Its hooks around forwards are
taken off: they lead the inputs of a block through a function of theirs, so that the gradients of an input with several
uses are added up block by block, in another order than under ddp.

hsdp: the same, with a copy of the networks on every group of `shard_ranks` neighbouring ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from sdtrain.config.options import Optimizer
from sdtrain.contracts import Net, Phase, Tensors
from sdtrain.engine.ema import copy_all
from sdtrain.engine.layout import Dealer
from sdtrain.engine.net import LocalNet, own_tensors, require_fit
from sdtrain.engine.nonfinite import clamp_nonfinite
from sdtrain.engine.phases import PhaseEngine
from sdtrain.engine.player import BasePlayer, Span
from sdtrain.engine.ranks import sum_over_ranks, world
from sdtrain.engine.sums import SumPlayer

BLOCKS = 8  # a block has at most this part of its network, unless a single layer is larger


class ShardedNet(LocalNet):
    """Parts on all ranks of a mesh; scalars and networks from weights files are whole on each."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__(module)
        self.dealer = dealer_of(mesh)
        self.hollow = hollow(module)
        frozen = tuple(getattr(module, "frozen_prefixes", ()))
        ignored = {p for n, p in module.named_parameters() if not p.dim() or (frozen and n.startswith(frozen))}
        self.blocks = shard(module, mesh, ignored)
        self.gather()
        self.leaves = dict(module.named_parameters())  # the same objects whenever it is gathered
        self.rest()
        self.stored = dict(module.named_parameters())
        self.held = {name: _held(p) for name, p in self.stored.items()}
        self.trained = [name for name, p in self.held.items() if p.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.gather()
        return super().__call__(*args, **kwargs)

    def gather(self) -> None:
        """Make it whole here, with all ranks, unless it is."""
        for block in self.blocks:
            block.unshard()

    def rest(self) -> None:
        """Keep the own part only."""
        for block in self.blocks:
            block.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self.gather()
        try:
            yield
        finally:
            self.rest()

    def ask(self, wanted: bool) -> None:
        for name in self.trained:
            self.leaves[name].requires_grad_(wanted)
            self.stored[name].requires_grad_(wanted)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: self.held[name] for name in self.trained}

    def size(self, trained: bool = False) -> int:
        return sum(self.leaves[name].numel() for name in (self.trained if trained else self.leaves))

    def freeze(self) -> None:
        super().freeze()
        self.ask(False)
        self.trained = []

    def parts(self) -> list[str]:
        """Names of the parameters that are dealt out."""
        return [name for name, p in self.stored.items() if isinstance(p, DTensor)]

    def copied(self) -> dict[str, Tensor]:
        dealt = set(self.parts())
        return {n: p for n, p in self.held.items() if n not in dealt} | dict(self.module.named_buffers())

    def everything(self, at: int | None = None) -> dict[str, Tensor]:
        """Whole parameters and buffers [...] by name, with all ranks, for rank `at` or all."""
        names = self.parts()
        parts, shapes = [self.held[n].detach() for n in names], [self.leaves[n].shape for n in names]
        wholes = self.dealer.gather(parts, shapes, at)
        rest = {n: p.detach() for n, p in self.held.items() if n not in names}
        return {**dict(zip(names, wholes, strict=True)), **rest, **dict(self.module.named_buffers())}

    def state(self, at: int | None = None) -> dict[str, Tensor]:
        found = self.everything(at)
        return {name: found[name] for name in own_tensors(self.module)}

    @torch.no_grad()
    def load(self, tensors: Tensors, where: str) -> None:
        require_fit(own_tensors(self.module), tensors, where)
        parts, buffers = set(self.parts()), dict(self.module.named_buffers())
        for name, value in tensors.items():
            own = self.held[name] if name in self.held else buffers[name]
            own.copy_(self.dealer.part(value) if name in parts else value)

    @torch.no_grad()
    def follow(self, other: Net, beta: float) -> None:
        """No rank talks to another: an average is dealt out as the network it follows."""
        assert isinstance(other, ShardedNet)
        torch._foreach_lerp_(list(self.held.values()), list(other.held.values()), 1.0 - beta)
        copy_all(list(self.module.buffers()), list(other.module.buffers()))

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """A plain copy, which costs its size for as long as it is used."""
        made = copy.deepcopy(self.hollow)
        for name, value in self.everything().items():
            path, _, last = name.rpartition(".")
            owner = made.get_submodule(path)
            if last in owner._parameters:
                setattr(owner, last, nn.Parameter(value, requires_grad=False))
            else:
                owner._buffers[last] = value.clone()
        with torch.no_grad():
            yield made.eval()


def _held(stored: nn.Parameter) -> nn.Parameter:
    """The part as a plain tensor that shares its memory; what is whole stays what it is."""
    if not isinstance(stored, DTensor):
        return stored
    return nn.Parameter(stored.to_local().detach(), requires_grad=stored.requires_grad)


def hollow(module: nn.Module) -> nn.Module:
    """A copy whose parameters have no memory."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> list[FSDPModule]:
    """`fully_shard` for every block and the rest; the network itself comes first in the answer."""
    total = sum(p.numel() for p in module.parameters() if p not in ignored)

    def visit(part: nn.Module) -> None:
        for child in part.children():
            sizes = [p.numel() for p in child.parameters() if p not in ignored]
            if sum(sizes) * BLOCKS > total and len(sizes) > 1:
                visit(child)
            if sizes and not isinstance(child, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
                _fully_shard(child, mesh, ignored)

    visit(module)
    _fully_shard(module, mesh, ignored)
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _fully_shard(module: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    fully_shard(module, mesh=mesh, ignored_params=ignored)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        hooks.clear()


def dealer_of(mesh: DeviceMesh) -> Dealer:
    if mesh.ndim == 1:
        return Dealer(mesh.get_group(), None)
    return Dealer(mesh.get_group("shard"), mesh.get_group("replicate"))


class ShardedPlayer(SumPlayer):
    """The optimizer moves this rank's parts, held as plain tensors."""

    meets_once = False  # networks are gathered in between

    def __init__(self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None, exact: bool) -> None:
        super().__init__(nets, options, span, lazy)
        self.exact = exact
        self.nets = [net for net in nets if isinstance(net, ShardedNet)]
        self.dealer = self.nets[0].dealer
        self.leaves = [net.leaves[name] for net in self.nets for name in net.trained]
        dealt = [name in net.parts() for net in self.nets for name in net.trained]
        self.dealt = [i for i, it_is in enumerate(dealt) if it_is]
        self.copied = [i for i, it_is in enumerate(dealt) if not it_is]

    def ask(self, wanted: bool) -> None:
        for net in self.nets:
            net.ask(wanted)

    def over_ranks(self, sums: list[Tensor]) -> list[Tensor]:
        own: dict[int, Tensor] = dict(enumerate(sums))
        own |= dict(zip(self.dealt, self.dealer.scatter_sum([sums[i] for i in self.dealt]), strict=True))
        sum_over_ranks([own[i] for i in self.copied])
        return [own[i] for i in range(len(sums))]

    def norm(self) -> Tensor:
        squares = self.norms().square()
        dealt = squares[self.dealt].sum()
        torch.distributed.all_reduce(dealt, group=self.dealer.group)
        return (dealt + squares[self.copied].sum()).sqrt()

    def clamp(self) -> Tensor:
        gradients = self.gradients()
        count = clamp_nonfinite([gradients[i] for i in self.dealt])
        torch.distributed.all_reduce(count, group=self.dealer.group)
        return count + clamp_nonfinite([gradients[i] for i in self.copied])

    def state(self, at: int | None = None) -> dict[str, Tensor]:
        """See `contracts.Player`. All ranks together."""
        own = super().state()
        shapes = {key: leaf.shape for key, leaf in zip(self.named, self.leaves, strict=True)}
        dealt = {list(self.named)[i] for i in self.dealt}
        names = [n for n, t in own.items() if n.rpartition("/")[0] in dealt and t.dim()]  # Adam's step is a scalar
        wholes = self.dealer.gather([own[n] for n in names], [shapes[n.rpartition("/")[0]] for n in names], at)
        return own | dict(zip(names, wholes, strict=True))

    def load_state(self, tensors: Tensors) -> None:
        dealt = {list(self.named)[i] for i in self.dealt}
        super().load_state(
            {
                name: self.dealer.part(t).clone() if t.dim() and name.rpartition("/")[0] in dealt else t
                for name, t in tensors.items()
            }
        )


class Fsdp(PhaseEngine):
    """See `contracts.Engine`."""

    @cached_property
    def mesh(self) -> DeviceMesh:
        """One for all networks."""
        share = self.sharing.ranks
        if share is None:
            return init_device_mesh(self.device.type, (world(),))
        return init_device_mesh(self.device.type, (world() // share, share), mesh_dim_names=("replicate", "shard"))

    def net(self, module: nn.Module, trained: bool = True) -> LocalNet:
        placed = module.to(self.device)
        return ShardedNet(placed, self.mesh) if trained or self.sharing.teacher else LocalNet(placed)

    def player(self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None) -> BasePlayer:
        return ShardedPlayer(nets, options, span, lazy, self.exact)

    def modules(self, nets: Mapping[str, Net]) -> list[nn.Module]:
        self.sharded = [net for net in nets.values() if isinstance(net, ShardedNet)]
        return [net.module for net in nets.values() if isinstance(net, LocalNet)]

    @contextmanager
    def fence(self, phase: Phase) -> Iterator[None]:
        """What was gathered for the phase goes when it is over."""
        with super().fence(phase):
            try:
                yield
            finally:
                for net in self.sharded:
                    net.rest()
