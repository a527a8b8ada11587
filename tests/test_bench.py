"""What `sdtrain bench` says of super-resolution, memory and regime. Without these a table of costs could compare unlike
things: one variant measured in another state of the machine, or training's arithmetic with that of official code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sdakd import tar

from sdtrain import cli
from sdtrain.commands import bench, variants
from sdtrain.config.load import load_config

BOTH = ["--variants", "baseline,sd-l1", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return tar(tmp_path_factory.mktemp("photos") / "train", range(16), side=64)


def measured(file: Path, *words: object) -> dict[str, Any]:
    """The figures of `bench --cfg quickstart_sdakd`."""
    assert cli.main([*map(str, ["bench", "--cfg", "quickstart_sdakd", *BOTH, "--json", file, *words])]) == 0
    return json.loads(file.read_text().splitlines()[-1])


@pytest.mark.parametrize("lq", ["bicubic", "second_order"])
def test_super_resolution_is_measured_on_images_with_interleaved_variants(photos, tmp_path, capsys, monkeypatch, lq):
    order, step = [], variants.Variant.step

    def noted(self: Any, chunks: Any, clock: Any) -> Any:
        order.append(self.name)
        return step(self, chunks, clock)

    monkeypatch.setattr(variants.Variant, "step", noted)
    found = measured(tmp_path / "b.jsonl", "--steps", 2, "--set", f"data.train={photos}", "--set", f"lq={lq}")
    assert order == ["baseline", "sd-l1"] * 3  # one round warms up
    said = capsys.readouterr().out
    assert f"images of {photos}, 1 workers" in said and "medians of 2 interleaved steps" in said
    for variant in found["variants"].values():
        assert set(variant["phases"]) == {"G", "D", "ema"} and variant["sec_per_kimg"] > 0
        assert 0 < variant["memory_mean_gb"] < variant["memory_gb"]
    assert found["variants"]["sd-l1"]["memory_mean_gb"] > found["variants"]["baseline"]["memory_mean_gb"]


def test_super_resolution_is_measured_on_noise_without_images(tmp_path, capsys):
    found = measured(tmp_path / "b.jsonl", "--steps", 1, "--resolution", 64, "--set", "data.train=no/such/shards")
    assert "noise instead of images" in capsys.readouterr().out
    assert list(found["variants"]) == ["baseline", "sd-l1"]


def test_the_header_says_whether_it_is_trainings_regime_or_the_official_one(photos, tmp_path, capsys):
    words = ["--steps", 1, "--set", f"data.train={photos}"]
    measured(tmp_path / "b.jsonl", *words)
    assert "as training runs it: summation exact, 1 of 2 ghosts in a forward" in capsys.readouterr().out
    measured(tmp_path / "b.jsonl", *words, "--single")
    said = capsys.readouterr().out
    assert "--single, as official code on one GPU: summation fast, 2 of 2 ghosts in a forward" in said
    assert "peak GB *" in said and "mean GB *" in said


def test_peak_is_the_largest_phase_and_mean_weighs_lazy_phases_by_how_often_they_run(monkeypatch):
    made = variants.Variant.__new__(variants.Variant)
    made.memory = {"G": 4.0, "G_pl": 12.0, "D": 2.0}
    monkeypatch.setattr(variants.Variant, "shares", lambda self: {"ema": 1.0, "G": 1.0, "G_pl": 0.25, "D": 1.0})
    assert made.peak == 12.0
    assert made.average == pytest.approx((4 + 12 / 4 + 2) / 2.25)


def test_every_phase_has_its_own_memory_whoever_moves_first(photos):
    config = load_config("quickstart_sdakd", [f"data.train={photos}", "order=D first"])
    torch.set_num_threads(1)
    source = bench.Source(config, None, torch.device("cpu"))
    variant = variants.Variant("sr", config, torch.device("cpu"), 64)
    with source.feeding(variant.method.feed):
        variants.compare([variant], source.stream, 1, variants.Clock(torch.device("cpu")))
    assert list(variant.memory) == ["D", "G"] and variant.peak == max(variant.memory.values())
