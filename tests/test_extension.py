"""The how-to of sdtrain/README.md, done: without these tests adding a GAN could come to need changes elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_shards, tiny_config, write_config

import sdtrain.methods
import sdtrain.models
from sdtrain.config import schema
from sdtrain.main import main
from sdtrain.metrics.table import METRICS, Metric, Settings, shared

MODEL_OPTIONS = """
from __future__ import annotations
from dataclasses import dataclass
from sdtrain.config.declare import ModelDeclaration
from sdtrain.config.options import Count

@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    z_dim: Count = 4
    '''[numbers] Length of a latent.'''

@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    width: Count = 3
    '''[channels] Width of the one hidden layer.'''

MODEL = ModelDeclaration(generator=GeneratorOptions, discriminator=DiscriminatorOptions)
"""
NETWORKS = """
from torch import nn

class Generator(nn.Module):
    def __init__(self, options, resolution, num_classes):
        super().__init__()
        self.options, self.z_dim, self.side = options, options.z_dim, resolution
        self.linear = nn.Linear(options.z_dim, 3 * resolution**2)

    def forward(self, z, c=None, draws=None):
        return self.linear(z).view(-1, 3, self.side, self.side).tanh()

class Discriminator(nn.Module):
    def __init__(self, options, resolution, num_classes):
        super().__init__()
        self.options = options
        self.layers = nn.Sequential(nn.Conv2d(3, options.width, 4, 4), nn.ReLU(), nn.Conv2d(options.width, 1, 4, 4))

    def forward(self, x, c=None):
        return self.layers(x).flatten(1)
"""
METHOD_OPTIONS = """
from __future__ import annotations
from dataclasses import dataclass
from sdtrain.config.declare import MethodDeclaration
from sdtrain.config.options import NonNegative

@dataclass(frozen=True, kw_only=True)
class Options:
    bound: NonNegative = 1.0
    '''Weight of the size of the images.'''

METHOD = MethodDeclaration(options=Options)
"""
METHOD = """
from sdtrain.contracts import Method, Phase, Stage

class Plain(Method):
    task = "generation"

    def __init__(self, options, nets, z_dim, total_img):
        self.o, self.nets, self.z_dim = options, nets, z_dim
        players = {"G": ("G",), "D": ("D",)}
        self.stages = [Stage(name="main", end_img=total_img, players=players, averages={"G_ema": "G"})]

    def phases(self, stage, step):
        return [Phase(name="G", player="G", loss=self.loss_G), Phase(name="D", player="D", loss=self.loss_D)]

    def loss_G(self, x):
        fake = self.nets["G"](x.draws.sub("G").normal("z", self.z_dim))
        terms = {"G/adv": -self.nets["D"](fake).mean(), "G/bound": fake.square().mean()}
        return terms["G/adv"] + self.o.bound * terms["G/bound"], terms

    def loss_D(self, x):
        fake = self.nets["G"](x.draws.sub("D").normal("z", self.z_dim)).detach()
        loss = (self.nets["D"](fake) - self.nets["D"](x.real)).mean()
        return loss, {"D/adv": loss}
"""
BUILD = """
from sdtrain.methods.plain.method import Plain

def build(config, builder):
    G, D = builder.generator(config.model.generator), builder.discriminator(config.model.discriminator)
    return Plain(config, builder.nets({"G": G, "D": D}, {"G_ema": "G"}), G.z_dim, config.total_img)
"""
FOLDERS = {
    ("models", "toy"): {"options.py": MODEL_OPTIONS, "networks.py": NETWORKS},
    ("methods", "plain"): {"options.py": METHOD_OPTIONS, "method.py": METHOD, "build.py": BUILD},
}


@pytest.fixture(autouse=True)
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GAN and a method of two and three small files, found because their folders are there."""
    for (room, name), files in FOLDERS.items():
        folder = tmp_path / room / name
        folder.mkdir(parents=True)
        for file, text in {"__init__.py": "", **files}.items():
            (folder / file).write_text(text)
        package = getattr(sdtrain, room)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / room)])
    yield
    for room, name in FOLDERS:
        vars(getattr(sdtrain, room)).pop(name, None)
        for module in [found for found in sys.modules if found.startswith(f"sdtrain.{room}.{name}")]:
            del sys.modules[module]
    for cached in (schema.method, schema.model, schema.schema, schema.role_class):
        cached.cache_clear()


def trained(tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    """The rows of a run of three steps with the toy players."""
    make_shards(tmp_path / "shards")
    toys = {"generator": {"kind": "toy"}, "discriminator": {"kind": "toy"}}
    sizes = {"batch_size": 8, "ghost_batch": 4, "total_img": 24, "log_img": 8, "save_img": 24}
    config = tiny_config(tmp_path / "shards", model=toys, **sizes, **changes)
    assert main(["--cfg", str(write_config(tmp_path / "c.yaml", config)), "--out", str(tmp_path / "run")]) == 0
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]


def test_a_gan_is_one_folder_and_a_configuration(tmp_path: Path) -> None:
    rows = [row for row in trained(tmp_path, sd__loss="l1") if row["kind"] == "train"]
    assert len(rows) == 3 and {"G/adv", "G/sd", "D/real"} <= set(rows[0])


def test_a_method_is_one_folder_and_a_configuration(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    config = tiny_config(tmp_path / "shards", model={role: {"kind": "toy"} for role in ("generator", "discriminator")})
    sizes = {"batch_size": 8, "ghost_batch": 4, "total_img": 24, "log_img": 8, "eval_img": 0}
    tree = {**{key: config[key] for key in ("data", "model")}, "method": "plain", "bound": 0.5, **sizes}
    path = write_config(tmp_path / "plain.yaml", tree)
    for out in ("whole", "parts"):
        if out == "parts":  # what stops and goes on ends where the whole ends
            assert main(["--cfg", str(path), "--out", str(tmp_path / out), "--set", "total_img=16"]) == 0
        assert main(["--cfg", str(path), "--out", str(tmp_path / out)]) == 0
    whole, parts = (tmp_path / out / "checkpoints" / "img_000000024" / "G.safetensors" for out in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_metric_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(settings: Settings, real: Any, fake: Any) -> dict[str, float]:
        return {"spread": float(fake.sums["features"].sum.std() / real.sums["features"].sum.std())}

    row = Metric(shown={"spread": 3}, labels={"spread": "Spread"}, nets=shared, values=spread)
    monkeypatch.setitem(METRICS, "spread", row)
    from sdtrain.metrics.evaluate import Evaluator
    from sdtrain.metrics.images import open_images

    make_shards(tmp_path / "shards")
    real = open_images(str(tmp_path / "shards"))
    measure = Evaluator(real, metrics=("spread",), num_fake=8, extractor="random-inception", tap=64, workers=0)
    import torch

    values, protocol = measure.measure(lambda indices: torch.zeros(len(indices), 3, 32, 32, dtype=torch.uint8))
    assert set(values) == {"spread"} and protocol["metrics"] == ["spread"]


def test_an_engine_is_one_class_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtrain.engine import make
    from sdtrain.engine.ddp import Ddp

    moved: list[str] = []

    class Counting(Ddp):
        def run(self, phase: Any, chunks: Any) -> Any:
            moved.append(phase.player)
            return super().run(phase, chunks)

    monkeypatch.setitem(make.ENGINES, "ddp", Counting)
    trained(tmp_path, sd__loss="l1")
    assert moved == ["G", "D"] * 3
