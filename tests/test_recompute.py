"""Blocks that compute again in backward change memory and time alone. Without these a key that promises the same
numbers could advance a statistic twice, draw other noise, or lose a second derivative, and no curve would tell."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_activations import CPU, SIDE, configured
from test_engine import Small
from test_sdakd import FACES, settings
from test_style_training import R3GAN, STYLE, STYLENAT
from tiny import make_shards, write_config
from torch import Tensor, nn

from sdtrain.config import schema
from sdtrain.config.load import load_config
from sdtrain.contracts import Stage
from sdtrain.data.read.stream import Batch
from sdtrain.errors import ConfigError
from sdtrain.models.ghost import close_phase, next_chunk, open_phase, set_ghost_batch
from sdtrain.models.recompute import blocks_of, keeping, recompute
from sdtrain.plan import make_plan, render
from sdtrain.trainer import Trainer

LISTS = {"train": "nowhere", "val": "nowhere", "test": "nowhere"}


def images(count: int, step: int) -> Tensor:
    """uint8 [count, 3, SIDE, SIDE], a function of the step."""
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(step)).byte()


def after_two_steps(config: Any, stage: Stage | None = None) -> dict[str, Tensor]:
    """Every tensor of networks and optimizers; the first step has all lazy phases."""
    trainer = Trainer(config, CPU, SIDE, num_samples=100, random_weights=True)
    trainer.enter(stage or trainer.method.stages[-1])
    for step in range(2):
        batch = Batch(step=step, images=images(config.batch_size, step), labels=None, indices=torch.arange(0))
        trainer.advance(trainer.chunks(batch))
    nets = {f"{n}.{k}": v for n, net in trainer.nets.items() for k, v in net.state().items()}
    return nets | {f"{n}/{k}": v for n, p in trainer.engine.players.items() for k, v in p.state().items()}


def apart(config: Any) -> list[str]:
    """Tensors that differ where blocks compute again, of two steps."""
    plain = after_two_steps(config)
    again = after_two_steps(dataclasses.replace(config, checkpoint_activations=True))
    return sorted({*plain, *again} - {n for n in plain if n in again and torch.equal(plain[n], again[n])})


GANS = {"StyleGAN2": STYLE, "StyleNAT": STYLENAT, "R3GAN": R3GAN}
WAYS = {"exact": {}, "bf16": {"precision": "bf16"}, "fast": {"summation": "fast", "ghosts_at_once": 2}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", GANS)
def test_a_game_whose_blocks_compute_again_is_the_same_bit_for_bit(tmp_path: Path, kind: str, way: str) -> None:
    assert apart(configured(tmp_path, {**GANS[kind], **WAYS[way], "sd__loss": "l1"})) == []


@pytest.mark.parametrize("kind", ["Real-ESRGAN", "GCFSR"])
def test_a_distilled_student_whose_blocks_compute_again_is_the_same_bit_for_bit(tmp_path: Path, kind: str) -> None:
    assert apart(written(tmp_path, kind)) == []


def two_passes(again: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Second derivatives through a network that is called twice a chunk, and its state afterwards."""
    torch.manual_seed(0)
    net = nn.Sequential(Small(), nn.Conv2d(4, 3, 1), Small()).train()
    set_ghost_batch(net, 2)
    recompute(net, ("0", "2") if again else ())
    found = []
    open_phase(net)
    for seed in range(2):
        next_chunk(net)
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        out = net(x).square().sum() + net(x.sin()).cos().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        found += torch.autograd.grad(slope.square().sum() + out, list(net.parameters()), allow_unused=True)
    close_phase(net)
    return [g for g in found if g is not None], net.state_dict()


def test_statistics_and_power_iterations_advance_once_however_often_a_block_is_computed() -> None:
    (gradients, state), (again, moved) = two_passes(False), two_passes(True)
    assert len(gradients) == len(again) and all(map(torch.equal, gradients, again))
    assert state.keys() == moved.keys() and all(torch.equal(state[k], moved[k]) for k in state)


def test_a_block_keeps_its_input_alone_and_a_teacher_is_left_as_it_is() -> None:
    block = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4))
    net = recompute(nn.Sequential(block), ("0",)).train()
    kept: list[Tensor] = []
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(x)
        assert [t.shape for t in kept if t.numel()] == [x.shape]
        kept.clear()
        with keeping([net]):
            net(x)
        assert len(kept) > 2
        kept.clear()
        net.eval()(x)  # somebody may look through a network in eval mode
        assert len(kept) > 2


def written(folder: Path, kind: str) -> Any:
    """The small configuration of a game or of a distillation."""
    if kind in GANS:
        return configured(folder, {**GANS[kind], "sd__loss": "l1"})
    tree = settings(LISTS, **{"GCFSR": FACES, "Real-ESRGAN": {}}[kind])
    return load_config(write_config(folder / "c.yaml", json.loads(json.dumps(tree))))


@pytest.mark.parametrize("kind", [*GANS, "Real-ESRGAN", "GCFSR"])
def test_every_block_that_a_model_names_is_there_and_none_lies_in_another(tmp_path: Path, kind: str) -> None:
    config = dataclasses.replace(written(tmp_path, kind), checkpoint_activations=True)
    nets = Trainer(config, CPU, SIDE, num_samples=100, random_weights=True).nets
    for role, net in (("generator", nets["G"]), ("discriminator", nets["D"])):
        names = schema.model(vars(config.model)[role].kind).blocks.get(role, ())
        found = blocks_of(net.module, names)
        assert all(blocks_of(net.module, [name]) for name in names)
        assert not any(one.startswith(f"{other}.") for one in found for other in found)
        assert {name for name, part in net.module.named_modules() if hasattr(part, "recomputes")} == set(found)


@pytest.mark.parametrize(
    "model",
    [{}, {"model__generator": {"kind": "srvgg"}, "model__discriminator": {"kind": "projected"}}],
)
def test_networks_without_blocks_are_refused_with_those_that_have_some(tmp_path: Path, model: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as told:
        configured(tmp_path, {**model, "checkpoint_activations": True})
    assert "discriminator projected cannot compute blocks again; of the generators gcfsr, r3gan, rrdbnet" in str(
        told.value
    )
    assert str(told.value).count("\n") == 0


def test_the_plan_says_what_computing_again_saves_and_costs_whether_the_key_is_set_or_not(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    plain = make_plan(configured(tmp_path, {**STYLENAT, "sd__loss": "l1"}))
    again = make_plan(configured(tmp_path, {**STYLENAT, "sd__loss": "l1", "checkpoint_activations": True}))
    found = plain["checkpointing"]
    assert found["gb"]["again"] == pytest.approx(again["checkpointing"]["gb"]["again"], rel=0.01)
    assert not found["used"] and again["checkpointing"]["used"] and found["computes_again"]
    for used, way in ((plain, "plain"), (again, "again")):  # cached constants count where they are first made
        assert used["activations_gb"] == pytest.approx(found["gb"][way], rel=0.01)
    assert found["gb"]["again"]["main/G"] < 0.7 * found["gb"]["plain"]["main/G"]
    assert 0 < found["more_gflop"]["main/G"]
    assert "checkpoint_activations: true would leave" in render(plain)
    assert "instead of" in render(again).partition("recompute")[2].splitlines()[0]
