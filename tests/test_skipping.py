"""`on_nonfinite: skip`: a phase that is not finite is as if its step had never had it.

Without these tests one NaN could stay behind in a moment of Adam, in batch statistics, in ADA's p, in the mean path
length or in the log, where the run would carry it on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_late_verdicts import ADA, step, trainer_of

from sdtrain.contracts import Chunk, Phase, Terms
from sdtrain.engine.phases import NonFinite
from sdtrain.trainer import Trainer

PENALTIES: dict[str, Any] = {"path_length__weight": 2.0, "path_length__every": 2, "r1__every": 2, "augment": ADA}
PROJECTED: dict[str, Any] = {
    "model": {
        "generator": {"kind": "fastgan", "z_dim": 16, "ngf": 2, "num_embeddings": 1},
        "discriminator": {
            "kind": "projected", "num_discs": 2, "interpolate_to": None, "projection_width": 8, "head_width": 8,
            "num_embeddings": 1,
        },
    },
    "adversarial": "hinge", "augment": {"kind": "diffaug"}, "style_mixing": 0.0, "r1__gamma": 0.0,
}  # fmt: skip
BAD = 2  # step, with every lazy phase


def nan(loss: Callable[[Chunk], Any], x: Chunk) -> tuple[torch.Tensor, Terms]:
    """A loss that is not finite."""
    total, terms = loss(x)
    return total * torch.nan, terms


def nan_means(prepass: Callable[[Chunk], Terms], x: Chunk) -> Terms:
    return {n: value * torch.nan for n, value in prepass(x).items()}


def changed(trainer: Trainer, change: Callable[[list[Phase]], list[Phase]], steps: Sequence[int] = (BAD,)) -> Trainer:
    """With other phases in some steps."""
    phases = trainer.method.phases
    trainer.method.phases = lambda stage, number: (  # type: ignore[method-assign]
        change(list(phases(stage, number))) if number in steps else phases(stage, number)
    )
    return trainer


def spoilt(name: str, phases: list[Phase]) -> list[Phase]:
    return [dataclasses.replace(p, loss=partial(nan, p.loss)) if p.name == name else p for p in phases]


def spoilt_before(phases: list[Phase]) -> list[Phase]:
    bad = [p for p in phases if p.prepass]
    means = {p.name: partial(nan_means, p.prepass) for p in bad if p.prepass}
    return [dataclasses.replace(p, prepass=means[p.name]) if p in bad else p for p in phases]


def without(name: str, phases: list[Phase]) -> list[Phase]:
    assert name in {p.name for p in phases}
    return [p for p in phases if p.name != name]


def everything(trainer: Trainer) -> dict[str, Any]:
    """Whatever a checkpoint would hold of the step."""
    found: dict[str, Any] = {f"{n}:{k}": v for n, net in trainer.nets.items() for k, v in net.state().items()}
    players = trainer.engine.players.items()
    found |= {f"{n}/{k}": v for n, player in players for k, v in player.state().items()}
    plain = {"method": trainer.method.state(), "meter": trainer.engine.meter.state(), "step": trainer.step}
    return {**{n: v.tolist() for n, v in found.items()}, **plain}


@pytest.mark.parametrize("name", ["G", "D", "G_pl", "D_r1", "G_pl's prepass", "ProjectedGAN's G", "ProjectedGAN's D"])
def test_a_phase_that_is_not_finite_is_as_if_it_had_not_been_there(tmp_path: Path, name: str) -> None:
    keys = PROJECTED if name.startswith("Projected") else PENALTIES
    phase = name.rpartition(" ")[2] if name.startswith("Projected") else name.partition("'")[0]
    change = spoilt_before if name.endswith("prepass") else partial(spoilt, phase)
    skips = changed(trainer_of(tmp_path, on_nonfinite="skip", **keys), change)
    lacks = changed(trainer_of(tmp_path, **keys), partial(without, phase))
    for number in range(5):
        step(skips)
        step(lacks)
        assert everything(skips) == everything(lacks), number
        assert (skips.skipped, skips.skipped_in_a_row) == (int(number >= BAD), int(number == BAD))


def test_what_is_left_out_is_told_and_ten_such_steps_in_a_row_end_training_before_anything_moves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = changed(trainer_of(tmp_path, on_nonfinite="skip"), partial(spoilt, "D"), range(1, 99))
    with caplog.at_level(logging.WARNING, "sdtrain"):
        for _ in range(10):
            step(trainer)
    assert len(caplog.messages) == 9 and (trainer.skipped, trainer.skipped_in_a_row) == (9, 9)
    assert caplog.messages[0].startswith("phase D at step 1: D/loss=nan on rank 0; this phase is left out")
    with pytest.raises(NonFinite, match="10 steps in a row were not finite; phase D at step 10: D/loss=nan"):
        step(trainer)
    assert trainer.step == 10
