"""Every configuration that is shipped loads and can be planned. Without this a renamed key would break the paper's runs
on the day somebody starts them, after hours of waiting for a machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from sdtrain import cli
from sdtrain.config import schema
from sdtrain.config.compare import dump
from sdtrain.config.keys import valid_world_sizes
from sdtrain.config.load import load_config
from sdtrain.plan import make_plan, render

FILES = sorted(path for path in (REPO / "configs").rglob("*.yaml") if path.parent.name != "suites")
SD_NAMES = [path for path in FILES if path.name.startswith("sdgan_projected") or path.parent.name == "ablation"]
SMALL = ("quickstart.yaml",)


def name_of(path: Path) -> str:
    return path.relative_to(REPO / "configs").as_posix()


def overrides(path: Path, shards: Path | str = "anywhere") -> list[str]:
    """Point the data at `shards`, unless the method has none."""
    method = next((line.split()[1] for line in path.read_text().splitlines() if line.startswith("method:")), "sdgan")
    return [] if method == "dirac" else [f"data.train={shards}"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures of 32 px."""
    torch.set_num_threads(1)
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards") / "toy"
    noise = np.random.default_rng(0)
    for i in range(64):
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02d}.png")
    assert cli.main(["pack", str(folder), str(out), "--resolution", "32", "--workers", "1"]) == 0
    return out


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_configuration_loads_and_survives_being_written_out(path, tmp_path):
    config = load_config(path, overrides(path))
    assert config.name == path.stem
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_configuration_says_what_it_is_for(path):
    assert path.read_text().startswith("# "), "the first line is a sentence for people"


@pytest.mark.parametrize("name", SMALL)
def test_small_configurations_can_be_planned(name, shards):
    plan = make_plan(load_config(REPO / "configs" / name, [f"data.train={shards}", "data.labels=null"]))
    assert plan["networks"]["G"]["parameters"] == plan["networks"]["G_ema"]["parameters"]
    assert "1, 2" in render(plan)


@pytest.mark.parametrize("path", SD_NAMES, ids=name_of)
def test_runs_of_the_paper_share_everything_but_data_and_distance(path):
    main, config = load_config("sdgan_projected"), load_config(path)
    for key in (
        "batch_size",
        "ghost_batch",
        "model",
        "optimizer",
        "ema",
        "augment",
        "adversarial",
        "d_passes",
        "metrics",
    ):
        assert getattr(config, key) == getattr(main, key), key
    assert valid_world_sizes(config) == [1, 2, 4, 8]
    assert config.sd.noise == "independent" and config.data.xflip


def test_the_projected_gan_recipe_is_the_official_one():
    """Fact sheet of the official code, written out; D's rescaling is its known quirk."""
    config = load_config("sdgan_projected")
    G, D = config.optimizer.G, config.optimizer.D
    assert (G.lr, G.betas) == (2e-4, (0.0, 0.99))
    assert (D.lr, D.betas, D.rescale, config.r1.every, config.r1.gamma) == (2e-4, (0.0, 0.99), "all", 16, 0)
    assert (config.ema.half_life_img, config.ema.rampup) == (config.batch_size * 10 / 32 * 1000, 0.05)
    assert (config.batch_size, config.ghost_batch, config.precision) == (64, 8, "fp32")
    assert (config.sd.alpha, config.sd.loss, config.sd.augment) == (1.0, "lpips-vgg", True)
    assert (config.metrics.num_fake, config.metrics.num_real) == (50_000, None)


def test_the_ablation_has_the_variants_of_figure_5():
    found = {}
    for path in (REPO / "configs" / "ablation").glob("*.yaml"):
        config = load_config(path)
        assert (config.data.resolution, config.total_img) == (128, 4_000_000)
        found[path.stem] = (config.sd.alpha, config.sd.loss, config.sd.augment)
    baseline = found.pop("baseline")
    assert baseline[0] == 0
    assert found == {
        "lpips": (1.0, "lpips-vgg", True),
        "lpips_plain": (1.0, "lpips-vgg", False),
        "l1": (1.0, "l1", False),
        "l2": (1.0, "l2", False),
        "ms_ssim": (1.0, "ms-ssim", False),
    }


def test_baselines_need_no_perceptual_network():
    needed = schema.method("sdgan").weights_needed
    assert needed(load_config("sdgan_projected")) == {"lpips_vgg": "lpips"}
    for name in ("sdgan_projected_baseline", "sdgan_projected_l1", "sdgan_projected_church_baseline"):
        assert needed(load_config(name)) == {}, name
