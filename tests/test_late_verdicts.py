"""A GPU is not waited for: what is known late must not change what is learnt, and nothing that is not finite is kept.

Without these tests a run could go on, and save, after a loss that was not finite, or steer ADA by other numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_style_training import STYLE
from tiny import SIDE, tiny_config, write_config

from sdtrain.config.load import load_config
from sdtrain.contracts import Chunk, Phase, Terms
from sdtrain.data.read.stream import Batch
from sdtrain.engine import player
from sdtrain.engine.phases import NonFinite
from sdtrain.engine.verdicts import Verdicts
from sdtrain.trainer import Trainer

ADA = {"kind": "ada", "p": 0.3, "interval": 4, "speed_img": 200}


class Arrived:
    """In place of an event of CUDA: numbers of the host are there at once."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def trainer_of(folder: Path, **keys: Any) -> Trainer:
    options = json.loads(json.dumps({**STYLE, "path_length__weight": 0.0, "augment": ADA, **keys}))
    config = load_config(write_config(folder / "c.yaml", tiny_config(folder / "absent", **options)))
    made = Trainer(config, torch.device("cpu"), SIDE, num_samples=100)
    made.enter(made.stage)
    return made


def step(trainer: Trainer) -> None:
    chance = torch.Generator().manual_seed(trainer.step)
    images = torch.randint(0, 256, (trainer.config.batch_size, 3, SIDE, SIDE), dtype=torch.uint8, generator=chance)
    batch = Batch(step=trainer.step, images=images, labels=None, indices=torch.zeros(0, dtype=torch.int64))
    trainer.advance(trainer.chunks(batch))


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer that does on a CPU what one on a GPU does."""
    make = player.make_optimizer
    monkeypatch.setattr(player, "make_optimizer", lambda *given: make(*given[:-1], fused=True))
    monkeypatch.setattr(torch.cuda, "Event", Arrived)
    trainer = trainer_of(tmp_path)
    trainer.waits = False
    trainer.engine.verdicts = Verdicts(torch.device("cpu"))
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n in ("G", "D") for k, v in trainer.nets[n].state().items() if "w_avg" not in k}


def poisoned(trainer: Trainer, phase: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = trainer.method.phases

    def nan(loss: Callable[[Chunk], Any], x: Chunk) -> tuple[torch.Tensor, Terms]:
        total, terms = loss(x)
        return total * torch.nan, terms

    def made(stage: Any, number: int) -> list[Phase]:
        found = phases(stage, number)
        bad = number == at
        return [dataclasses.replace(p, loss=partial(nan, p.loss)) if bad and p.name == phase else p for p in found]

    monkeypatch.setattr(trainer.method, "phases", made)


@pytest.mark.parametrize("phase", ["G", "D"])
def test_a_step_that_is_not_finite_moves_nobody_and_ends_the_run_one_step_later(
    late: Trainer, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(late, phase, 1, monkeypatch)
    step(late)
    before = weights(late)
    step(late)
    moved = {name.partition(".")[0] for name, value in weights(late).items() if not torch.equal(value, before[name])}
    assert moved == ({"G"} if phase == "D" else set()), "a phase before the bad one is a good one"
    held = weights(late)
    with pytest.raises(NonFinite, match=f"phase {phase} at step 1: {phase}/loss=nan on rank 0"):
        step(late)
    assert all(torch.equal(value, held[name]) for name, value in weights(late).items())


def test_nothing_is_written_before_the_last_step_is_known_to_be_finite(
    late: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(late, "D", 0, monkeypatch)
    step(late)
    with pytest.raises(NonFinite, match="phase D at step 0"):
        late.settle()


def test_numbers_that_come_late_steer_and_are_logged_as_if_they_had_come_at_once(late: Trainer, tmp_path: Path) -> None:
    prompt = trainer_of(tmp_path)
    for trainer in (prompt, late):
        for _ in range(6):
            step(trainer)
    assert [number for number, _ in late.uncontrolled] == [4, 5] and not prompt.uncontrolled
    late.settle()
    assert late.method.state()["p"] == prompt.method.state()["p"] != 0.3
    a, b = (trainer.engine.meter.means() for trainer in (prompt, late))
    assert a.keys() == b.keys() and a["ada/p"] == b["ada/p"]
    assert late.engine.meter.counts == prompt.engine.meter.counts
