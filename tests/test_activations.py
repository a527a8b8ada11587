"""The memory a plan promises is what autograd really keeps; else people would learn it from an out-of-memory error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_style_training import STYLE, STYLENAT
from tiny import make_shards, tiny_config, write_config

from sdtrain.activations import kept_bytes, saved_storages
from sdtrain.config.load import load_config
from sdtrain.contracts import Chunk
from sdtrain.models.fastgan import networks as fastgan
from sdtrain.plan import make_plan, render
from sdtrain.trainer import Trainer

SIDE, CPU = 32, torch.device("cpu")


def configured(folder: Path, options: dict[str, Any]) -> Any:
    own = json.loads(json.dumps(options))  # YAML would write what two configurations share as an alias
    return load_config(write_config(folder / "c.yaml", tiny_config(folder / "shards", **own)))


def trainer_of(config: Any) -> Trainer:
    return Trainer(config, CPU, SIDE, num_samples=100, random_weights=True)


def watching(loss: Callable[[Chunk], Any], kept: dict[int, torch.UntypedStorage]) -> Callable[[Chunk], Any]:
    def watched(x: Chunk) -> Any:
        with saved_storages() as found:
            result = loss(x)
        kept.update(found)
        return result

    return watched


def really_kept(config: Any) -> dict[str, int]:
    """Bytes that a forward of one ghost keeps, by phase, counted by the same rule in phases that really run."""
    trainer, found = trainer_of(config), {}
    stage = trainer.method.stages[0]
    trainer.enter(stage)
    draws = trainer.draws((0,))
    real = torch.rand(config.ghost_batch, 3, SIDE, SIDE) * 2 - 1
    held = [p for net in trainer.engine.modules(trainer.nets) for p in net.state_dict().values()]
    weights = {p.untyped_storage()._cdata for p in held}
    for phase in trainer.method.phases(stage, 0):
        kept: dict[int, torch.UntypedStorage] = {}
        watched = dataclasses.replace(phase, loss=watching(phase.loss, kept))
        trainer.engine.run(watched, [Chunk(step=0, seen_img=0, real=real, labels=None, draws=draws)])
        found[f"{stage.name}/{phase.name}"] = sum(
            storage.nbytes() for number, storage in kept.items() if number not in weights
        )
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"sd__loss": "lpips-vgg", "precision": "bf16"}, {**STYLE, "augment": {"kind": "none"}}, STYLENAT],
    ids=["FastGAN", "LPIPS in bf16", "StyleGAN2", "StyleNAT"],
)
def test_what_is_counted_without_data_is_what_a_run_keeps(tmp_path: Path, options: dict[str, Any]) -> None:
    config = configured(tmp_path, options)
    counted, real = kept_bytes(trainer_of(config)), really_kept(config)
    assert counted.keys() == real.keys() and all(real.values())
    for phase, size in real.items():
        assert counted[phase] == pytest.approx(size, rel=0.05), phase


def test_ada_counts_as_if_it_reached_as_far_as_it_may(tmp_path: Path) -> None:
    config = configured(tmp_path, {**STYLE, "augment": {"kind": "ada", "p": 0.3, "target": 0.6, "interval": 2}})
    counted, real = kept_bytes(trainer_of(config)), really_kept(config)
    assert counted.keys() == real.keys() == {"main/G", "main/G_pl", "main/D", "main/D_r1"}
    assert all(counted[phase] >= real[phase] > 0 for phase in real)


def test_two_ghosts_at_once_keep_twice_as_much_and_the_plan_says_which_phase_needs_most(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    config = configured(tmp_path, {})
    fast = dataclasses.replace(config, summation="fast", ghosts_at_once=2)
    one, two = (kept_bytes(trainer_of(c)) for c in (config, fast))
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
