"""What a method tells the loop: phases, each of which moves one player by one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sdtrain.rng import Draws

Terms = dict[str, Tensor]  # named scalar losses by their paper names, for the log
Loss = tuple[Tensor, Terms]  # what is minimised, and the terms it is made of


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some ghosts of the global batch at one step: what one forward pass sees."""

    step: int
    seen_img: int  # images seen before this step
    real: Tensor  # [num_samples, 3, H, W] float32 in the range the method asked for
    labels: Tensor | None  # one-hot [num_samples, num_classes] or None
    draws: Draws  # the random numbers of these ghosts at this step
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # what `prepare` made of the images (lq, ...)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One optimizer step of one player: sum of all terms, one backward a chunk, one step.

    `loss` is a mean over the samples of its chunk. `prepass`, where given, returns scalar means over a chunk without a
    graph; their means over the global batch are handed to `receive` before any loss is formed.
    """

    name: str
    player: str
    loss: Callable[[Chunk], Loss]
    reaches_all: bool = True  # every parameter of the player gets a gradient (else gradients are summed after backward)
    fp32: bool = False  # penalties with second derivatives run outside autocast
    prepass: Callable[[Chunk], Terms] | None = None
    receive: Callable[[Terms], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the one clock with its own players. `end_img` counts from the start of the run."""

    name: str
    end_img: int
