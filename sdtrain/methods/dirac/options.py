"""The keys of the Dirac-GAN simulation. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdtrain.config.declare import MethodDeclaration
from sdtrain.config.options import Count, NonNegative
from sdtrain.config.schedule import Schedule

if TYPE_CHECKING:
    from sdtrain.config.keys import Config


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How the system is followed; total_img / batch_size is the number of steps."""

    alpha: NonNegative = 1.0
    """Weight of L_SD in panel (b) of Figure 2; panel (a) is without."""
    updates: Literal["alternating", "simultaneous"] = "alternating"
    """Alternating: D answers to the new G, as in training. Simultaneous: both move from the same point."""


@dataclass(frozen=True, kw_only=True)
class Options:
    simulation: Simulation = Simulation()
    """What is followed, and how."""
    batch_size: Count = 1
    """[images] Copies of the one image a step; changes nothing but the count."""
    ghost_batch: Count = 1
    """[images] Copies in a ghost; changes nothing but the count."""
    data: Literal[None] = None
    """There is none: real images are zero."""


if TYPE_CHECKING:

    class Loaded(Options, Config):  # type: ignore[misc]  # a method may narrow a common key
        """A loaded configuration of this method."""


def problems(config: Loaded) -> Iterator[tuple[str, str]]:
    """Settings that Eq. (3)-(6) do not cover, as (key, sentence)."""
    for role in ("generator", "discriminator"):
        if getattr(config.model, role).kind != "dirac":
            yield (
                f"model.{role}.kind",
                f"model.{role}.kind must be dirac: the equations are about one parameter a player",
            )
    for player in ("G", "D"):
        if getattr(config.optimizer, player).kind != "sgd":
            yield f"optimizer.{player}.kind", f"optimizer.{player}.kind must be sgd: Eq. (3) is about gradient descent"
        if isinstance(getattr(config.optimizer, player).lr, Schedule):
            yield f"optimizer.{player}.lr", f"optimizer.{player}.lr must be a number: the equations have constant rates"
    if config.ema.decay is None or config.ema.decay == 1:
        yield "ema.decay", "ema.decay must be a number below 1: the equations are about a constant beta, such as 0.98"


METHOD = MethodDeclaration(options=Options, problems=problems)
