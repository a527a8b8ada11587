"""The contracts between the rooms: what each may ask of the others, in one place, each member with its meaning.

    methods/   `Method`   which networks play in which `Stage`, and which `Phase` minimises what
    engine/    `Engine`   moves a `Player` by one optimizer step a phase; `Net` is a network whatever holds it
    tasks/     `Task`     what a run does once in a while: pictures, evaluation, the best weights, the end

A method never sees more of a network than that it can be called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sdtrain.rng import Draws

Tensors = Mapping[str, Tensor]  # by official name
Terms = dict[str, Tensor]  # named scalar losses by their paper names, for the log
Loss = tuple[Tensor, Terms]  # what is minimised, and the terms it is made of
State = dict[str, Any]  # plain data that JSON keeps exactly


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some ghosts of the global batch at one step: what one forward pass sees."""

    step: int
    """Steps before this one, from the start of the run."""
    seen_img: int
    """Images seen before this step."""
    real: Tensor
    """[num_samples, 3, H, W] float32 in the range the method asked for."""
    labels: Tensor | None
    """One-hot [num_samples, num_classes], or None."""
    draws: Draws
    """The random numbers of these ghosts at this step."""
    inputs: Tensors = field(default_factory=dict)
    """What `Method.prepare` made of the images (lq, ...)."""

    def first(self, num: int) -> Chunk:
        """The first `num` samples of each ghost, with their numbers."""
        labels = None if self.labels is None else self.first_of(self.labels, num)
        inputs = {name: self.first_of(t, num) for name, t in self.inputs.items()}
        real, draws = self.first_of(self.real, num), self.draws.first(num)
        return replace(self, real=real, labels=labels, inputs=inputs, draws=draws)

    def first_of(self, tensor: Tensor, num: int) -> Tensor:
        """The rows of the first `num` samples of each ghost: [num_samples, ...] -> [ghosts * num, ...]."""
        by_ghost: Tensor = tensor.unflatten(0, (len(self.draws.ghosts), -1))
        return by_ghost[:, :num].flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One optimizer step of one player: sum of all terms, one backward a chunk, one step."""

    name: str
    """Prefix of its rows in the log."""
    player: str
    """Who moves; every other player is frozen meanwhile."""
    loss: Callable[[Chunk], Loss]
    """A mean over the samples of its chunk."""
    reaches_all: bool = True
    """Every parameter of the player gets a gradient (else gradients are summed after backward)."""
    fp32: bool = False
    """Penalties with second derivatives run outside autocast."""
    prepass: Callable[[Chunk], Terms] | None = None
    """Scalar means over a chunk, without a graph; their means over the global batch go to `receive` first."""
    receive: Callable[[Terms], None] | None = None
    """Takes the global means of `prepass` before any loss is formed."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a network begins a stage with, where that is not its own last weights."""

    net: str
    """The network whose weights are taken."""
    best: bool = False
    """Those that validation liked best in the stage before, instead of its last."""
    otherwise: str | None = None
    """The network whose last weights are taken where validation chose none; None = leave things as they are."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the one clock with its own players."""

    name: str
    """For the log, the files and `optimizer`."""
    end_img: int
    """Images at its end, counted from the start of the run."""
    players: Mapping[str, tuple[str, ...]]
    """Who plays: the networks that each player's optimizer moves."""
    averages: Mapping[str, str] = field(default_factory=dict)
    """Running averages, each with the network it follows, Eq. (1) of SD-GAN."""
    frozen: tuple[str, ...] = ()
    """Networks that only look on: eval mode, no gradients."""
    evaluated: str = "G_ema"
    """The network that validation, samples and `best/` are about."""
    starts: Mapping[str, Start] = field(default_factory=dict)
    """What networks begin with."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What a method wants from the stream of images, beside their number."""

    crop: int | None = None
    """Side of the square cut from each image in pixels; None = images have the resolution already."""
    pad: bool = False
    """Images smaller than the crop are reflected to it."""
    paired: bool = False
    """Low-quality partners come with the images."""
    scale: int = 4
    """Ratio of the sides of a pair."""


class Net(Protocol):
    """A network, whichever engine holds it. Methods call it; nothing else of it is theirs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward, in a way that lets the engine share gradients."""

    def whole(self) -> AbstractContextManager[nn.Module]:
        """The complete network as a local module in eval mode, without gradients. Entered by all ranks together.

        Inside, ranks may do different things: sampling, validation, pictures, export.
        """

    def state(self, at: int | None = None) -> dict[str, Tensor]:
        """Whole tensors [...] by official name, without the parts that come from a weights file. All ranks together.

        `at`: the one rank that needs them; what others get is not to be used.
        """

    def load(self, tensors: Tensors, where: str) -> None:
        """Take over what `state` gave, by exact names and shapes [...]. Raises `RunError` with `where`."""

    def follow(self, other: Net, beta: float) -> None:
        """theta <- beta * theta + (1 - beta) * theta_other, Eq. (1) of SD-GAN; buffers are copied."""

    def freeze(self) -> None:
        """Eval mode for good, no gradients."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What this rank holds of the parameters that ask for gradients, by official name."""

    def size(self, trained: bool = False) -> int:
        """Number of parameters of the whole network; `trained`: of those that ask for gradients."""


class Player(Protocol):
    """Networks that one optimizer moves."""

    def state(self, at: int | None = None) -> dict[str, Tensor]:
        """Optimizer state as whole tensors, `PARAMETER/SLOT` -> [...], for rank `at` or all. All ranks together."""

    def load_state(self, tensors: Tensors) -> None:
        """Take over what `state` gave, [...] by PARAMETER/SLOT; a parameter that has nothing there starts afresh."""

    def gradients(self) -> list[Tensor]:
        """What this rank holds of a phase's gradients, [...] as the parameters, between backward and step."""


class Meter(Protocol):
    """Means of named scalars over steps and ranks."""

    def add(self, terms: Terms, weight: float = 1.0) -> None:
        """Add scalars to the sums, without waiting for the device."""

    def count(self, names: Sequence[str]) -> None:
        """One more step in which these names had a value."""

    def means(self) -> dict[str, float]:
        """Global means since `clear`. All ranks together."""

    def clear(self) -> None:
        """Begin anew."""

    def state(self) -> dict[str, list[float]]:
        """This rank's sums and counts, for a checkpoint."""

    def load_state(self, state: dict[str, list[float]], device: torch.device) -> None:
        """Take over what `state` gave."""


class Engine(Protocol):
    """Holds networks and moves players. Knows ranks, precision and devices; knows nothing of losses."""

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors are."""

    @property
    def players(self) -> Mapping[str, Player]:
        """Those of the present stage."""

    @property
    def meter(self) -> Meter:
        """The losses since the last row of the log."""

    def net(self, module: nn.Module, trained: bool = True) -> Net:
        """Take a network over: placed, and wrapped or sharded where it is trained."""

    def begin(self, stage: Stage, start_img: int, nets: Mapping[str, Net], lazy: Mapping[str, int]) -> None:
        """Make the players of a stage, with fresh optimizers. `lazy`: interval of a player's lazy penalty in steps."""

    def run(self, phase: Phase, chunks: Sequence[Chunk]) -> Terms:
        """One phase over this rank's share of the global batch. Raises `NonFinite` on all ranks together."""

    def settle(self, late: bool = False) -> None:
        """Where a device is not waited for, `run` cannot know whether all was finite: raises `NonFinite` for what it
        has let pass, on all ranks together. Called before anything is written, and, with `late`, after every step."""


class Method:
    """What networks minimise. A method sets `nets` and `stages`, implements `phases`, and overrides what it needs."""

    task: Literal["generation", "restoration"]
    """What its runs do once in a while: the file of `sdtrain/tasks`."""
    nets: Mapping[str, Net]
    """Every network by its role."""
    stages: Sequence[Stage]
    """In order of time."""
    given: tuple[str, ...] = ()
    """Networks that never change and are in no checkpoint."""
    steering: tuple[str, ...] = ()
    """Terms whose global mean `control` wants after every step."""
    feed: Feed = Feed()
    """What it wants from the stream."""
    snapshots: tuple[float, ...] = ()
    """Shares of the run after which the weights of G and its average are kept for good."""

    def phases(self, stage: Stage, step: int) -> Sequence[Phase]:
        """What happens in a step of this stage, in order."""
        raise NotImplementedError  # abstract

    def lazy(self) -> Mapping[str, int]:
        """Interval in steps of each player's lazy penalty, which Adam can be rescaled by."""
        return {}

    def to_range(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 in [-1, 1], or the range the networks want."""
        return images.float().div_(127.5).sub_(1.0)

    def prepare(self, x: Chunk, stage: Stage) -> Chunk:
        """What all phases of a step share, made of the images: low-quality inputs, crops."""
        return x

    def blank(self, x: Chunk) -> Chunk:
        """The shapes that `prepare` hands on, without its work, and the most costly switches: for a count of memory."""
        return x

    def steers_after(self, step: int) -> bool:
        """Whether `control` may change what the step after `step` does; else it may be called later, for many steps."""
        return False

    def control(self, step: int, means: Mapping[str, float]) -> dict[str, float]:
        """For every step, in order, with the global means of `steering`; returns numbers for the log."""
        return {}

    def state(self) -> State:
        """What a checkpoint must hold of the method beside networks."""
        return {}

    def load_state(self, state: State) -> None:
        """Take over what `state` gave."""

    def ghost_state(self) -> Mapping[int, Tensors]:
        """Tensors that belong to a ghost and outlive a step, {ghost: {name: [...]}}."""
        return {}

    def load_ghost_state(self, state: Mapping[int, Tensors], device: torch.device) -> None:
        """Take over what `ghost_state` gave ({ghost: {name: [...]}}), for the ghosts of this rank."""


class Inputs(Protocol):
    """How a super-resolution generator is fed."""

    scale: int
    """Ratio of the sides of output and input."""
    feed: Feed
    """What it wants from the stream."""

    def to_range(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 in the generator's range."""

    def signed(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] of the generator's range -> [-1, 1]."""

    def fixed(self, x: Chunk) -> Chunk:
        """`Method.prepare` without anything that remembers."""

    def __call__(self, G: Callable[..., Any], x: Chunk, draws: Draws, layers: Sequence[str] = ()) -> Any:
        """Images of the chunk, with the maps of `layers` where some are asked for."""


class Restoration(Method):
    """A method whose generator enlarges or restores images."""

    task = "restoration"
    inputs: Inputs
    judges: Mapping[str, str] = {}
    """Discriminators whose verdicts on the student's images are shown, each under the name that pictures give it."""


class Task:
    """What a run does once in a while. Every member is called by all ranks together."""

    ends_with_evaluation: bool = False
    """The last weights of a stage are validated before they are saved."""

    @property
    def eval_img(self) -> int:
        """Images between two evaluations; 0 = never."""
        return 0

    def pictures(self) -> None:
        """Samples for people."""

    def evaluate(self, split: str) -> None:
        """Measure the present weights, remember them when they are the best."""

    def hand_over(self) -> Mapping[str, Tensors]:
        """The best weights of the stage that is over, {net: {name: [...]}}; the next begins to collect its own."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold so that the next stage starts the same after a kill, {name: [...]}."""
        return {}

    def load_tensors(self, tensors: Tensors) -> None:
        """Take over what `tensors` gave, {name: [...]}."""

    def finish(self) -> None:
        """The end of the run: last pictures, the test list."""


def spans(stages: Sequence[Stage]) -> Iterator[tuple[Stage, int]]:
    """Each stage with the images at its beginning."""
    yield from zip(stages, [0, *(stage.end_img for stage in stages)], strict=False)
