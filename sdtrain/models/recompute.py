"""Activation checkpointing: blocks of a network keep their inputs alone and compute the rest again in backward.

A model says which parts are its blocks (`ModelDeclaration.blocks`), `Builder.module` hands them over here, and no
forward of a model knows. Gradients are the same, bit for bit: random numbers of a block are looked up by name
(`rng.py`), the layers of `ghost.py` find the pass they were in, and torch restores autocast.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sdtrain.models.ghost import Advancing, advancing_layers


def blocks_of(net: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The parts of a network that one of `names` means, by name; a `*` stands for one word between dots."""
    wanted = [re.compile(name.replace(".", r"\.").replace("*", r"[^.]+")) for name in names]
    return {name: part for name, part in net.named_modules() if any(name_of.fullmatch(name) for name_of in wanted)}


def recompute(net: nn.Module, names: Sequence[str]) -> nn.Module:
    """Let the blocks of `net` that `names` mean compute again in backward what they do not keep."""
    for block in blocks_of(net, names).values():
        block.recomputes = True  # type: ignore[assignment]
        # a bound method: copies of a network then call their own blocks
        block.forward = MethodType(_forward, block)
    return net


@contextmanager
def keeping(nets: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Inside, blocks keep everything, as if nobody had asked them to compute again; gives them."""
    blocks = [part for net in nets for part in net.modules() if hasattr(part, "recomputes")]
    for block in blocks:
        block.recomputes = False  # type: ignore[assignment]
    try:
        yield blocks
    finally:
        for block in blocks:
            block.recomputes = True  # type: ignore[assignment]


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain, layers = type(self).forward, list(advancing_layers(self))
    outside = any(layer._ledger is None for layer in layers)  # such layers have moved on when backward comes
    if not (self.recomputes and self.training and torch.is_grad_enabled()) or outside:
        return plain(self, *args, **kwargs)
    flat, shape = tree_flatten((args, kwargs))

    def run(*values: Any) -> Any:
        given, named = tree_unflatten(values, shape)
        return plain(self, *given, **named)

    again = Again(layers)
    return checkpoint(
        run, *flat, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again)
    )


class Again(AbstractContextManager):
    """Inside, layers with pass state are where they were when this was made, and record nothing."""

    def __init__(self, layers: Sequence[Advancing]) -> None:
        self.layers, self.passes = layers, [layer._pass for layer in layers]

    def __enter__(self) -> None:
        self.present = [layer._pass for layer in self.layers]
        self._put(self.passes, again=True)

    def __exit__(self, *error: object) -> None:
        self._put(self.present, again=False)

    def _put(self, passes: Sequence[int], again: bool) -> None:
        for layer, number in zip(self.layers, passes, strict=True):
            layer._pass, layer._again = number, again
