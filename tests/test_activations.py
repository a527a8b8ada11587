"""The memory a plan promises is what autograd really keeps; else people would learn it from an out-of-memory error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_style_training import STYLE, STYLENAT
from tiny import make_shards, tiny_config, write_config

from sdtrain.activations import Watch, costs
from sdtrain.config.load import load_config
from sdtrain.contracts import Chunk
from sdtrain.models.fastgan import networks as fastgan
from sdtrain.models.ghost import close_phase, open_phase
from sdtrain.plan import make_plan, render
from sdtrain.trainer import Trainer

SIDE, CPU = 32, torch.device("cpu")


def configured(folder: Path, options: dict[str, Any]) -> Any:
    own = json.loads(json.dumps(options))  # YAML would write what two configurations share as an alias
    return load_config(write_config(folder / "c.yaml", tiny_config(folder / "shards", **own)))


def trainer_of(config: Any) -> Trainer:
    return Trainer(config, CPU, SIDE, num_samples=100, random_weights=True)


def counted(config: Any) -> dict[str, int]:
    found = costs(trainer_of(config))
    return {phase: cost.bytes for phase, cost in found.get("again", found["plain"]).items()}


def really_alive(config: Any) -> dict[str, int]:
    """Bytes that tensors of one chunk take in forward and backward, by phase, in phases that really run."""
    trainer, found = trainer_of(config), {}
    stage, engine = trainer.method.stages[0], trainer.engine
    trainer.enter(stage)
    real = torch.rand(config.ghost_batch, 3, SIDE, SIDE) * 2 - 1
    x = Chunk(step=0, seen_img=0, real=real, labels=None, draws=trainer.draws((0,)))
    modules = engine.modules(trainer.nets)
    for phase in trainer.method.phases(stage, 0):
        with engine.fence(phase):
            engine._prepass(phase, [x])
            open_phase(*modules)
            with Watch() as seen:
                loss = engine.loss(phase, x)
                torch.autograd.grad(loss[0], engine.players[phase.player].leaves, allow_unused=True)
            close_phase(*modules, apply=False)
        found[f"{stage.name}/{phase.name}"] = seen.peak
        del loss
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sd__loss": "lpips-vgg", "precision": "bf16"},
        {**STYLE, "augment": {"kind": "none"}},
        STYLENAT,
        {**STYLE, "augment": {"kind": "none"}, "checkpoint_activations": True},
        {**STYLENAT, "checkpoint_activations": True},
    ],
    ids=["FastGAN", "LPIPS in bf16", "StyleGAN2", "StyleNAT", "StyleGAN2 again", "StyleNAT again"],
)
def test_what_is_counted_without_data_is_what_a_run_takes(tmp_path: Path, options: dict[str, Any]) -> None:
    config = configured(tmp_path, options)
    promised, real = counted(config), really_alive(config)
    gradients = max(net.size(trained=True) for net in trainer_of(config).nets.values()) * 4
    assert promised.keys() == real.keys() and all(real.values())
    for phase, size in real.items():  # a quarter: insides of StyleNAT's attention, transients of second derivatives
        least = 0.75 if config.checkpoint_activations else 0.95  # what came after the largest block is gone by then
        assert least * promised[phase] <= size <= 1.25 * promised[phase] + gradients, phase


def test_ada_counts_as_if_it_reached_as_far_as_it_may(tmp_path: Path) -> None:
    config = configured(tmp_path, {**STYLE, "augment": {"kind": "ada", "p": 0.3, "target": 0.6, "interval": 2}})
    promised, real = counted(config), really_alive(config)
    assert promised.keys() == real.keys() == {"main/G", "main/G_pl", "main/D", "main/D_r1"}
    assert all(1.5 * promised[phase] >= real[phase] > 0 for phase in real)


def test_two_ghosts_at_once_keep_twice_as_much_and_the_plan_says_which_phase_needs_most(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    config = configured(tmp_path, {})
    fast = dataclasses.replace(config, summation="fast", ghosts_at_once=2)
    one, two = (counted(c) for c in (config, fast))
    assert two["main/G"] == pytest.approx(2 * one["main/G"], rel=0.02)
    plan = make_plan(config)
    assert plan["activations_gb"] == {phase: size / 1e9 for phase, size in one.items()}
    assert "activations (main/G, 1 ghost at once)" in render(plan)


def test_a_network_that_looks_at_numbers_leaves_a_plan_without_activations(tmp_path: Path, monkeypatch) -> None:
    make_shards(tmp_path / "shards")
    forward = fastgan.Generator.forward

    def looks(self: Any, *args: Any, **kwargs: Any) -> Any:
        images = forward(self, *args, **kwargs)
        return images if float(images.mean()) < 0 else images * 1

    monkeypatch.setattr(fastgan.Generator, "forward", looks)
    plan = make_plan(configured(tmp_path, {}))
    assert plan["activations_gb"] == {} and "without activations a rank" in render(plan)
