"""Configurations of R3GAN against the official presets: a mistyped width or schedule would only show after weeks."""

from __future__ import annotations

import json

import pytest
from conftest import GOLDEN, REPO

from sdtrain.config.load import load_config
from sdtrain.config.schedule import Schedule, position_img

PRESETS = json.loads((GOLDEN / "r3gan" / "presets.json").read_text())
FILES = {
    "cifar10": "CIFAR10",
    "ffhq64": "FFHQ-64",
    "ffhq256": "FFHQ-256",
    "imagenet32": "ImageNet-32",
    "imagenet64": "ImageNet-64",
}
LISTS = {"widths": "WidthPerStage", "groups": "CardinalityPerStage", "blocks": "BlocksPerStage"}


def cosine(schedule: object) -> tuple[float, float, float]:
    """(start, end, images) of a schedule from the first image on."""
    assert isinstance(schedule, Schedule) and schedule.curve == "cosine" and len(schedule.points) == 2
    (begin, start), (over, end) = schedule.points
    assert position_img(begin, (0, 0)) == 0
    return start, end, position_img(over, (0, 0))


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_has_the_numbers_of_its_preset(name: str):
    config, preset = load_config(REPO / "configs" / "r3gan" / f"{name}.yaml"), PRESETS[FILES[name]]
    rows = preset["schedulers"].items()
    official = {key.removesuffix("_scheduler"): tuple(map(float, row.values())) for key, row in rows}
    assert cosine(config.r1.gamma) == official["gamma"]
    assert (config.r1.on, config.r1.every, config.r1.joint, config.order) == ("both", 1, True, "D first")
    assert cosine(config.augment.p) == official["aug"] and config.augment.policy == "r3gan"
    assert cosine(config.ema.half_life_img) == official["ema"] and config.ema.rampup is None
    for adam in (config.optimizer.G, config.optimizer.D):
        assert cosine(adam.lr) == official["lr"] and cosine(adam.betas[1]) == official["beta2"]
        assert (adam.betas[0], adam.rescale) == (0.0, "none")
    assert (config.batch_size, config.data.resolution) == (preset["batch"], preset["img_resolution"])
    assert config.data.labels == bool(preset["c_dim"]) and config.fake_labels == "real"
    for section, letter, turn in ((config.model.generator, "G", 1), (config.model.discriminator, "D", -1)):
        theirs = preset[f"{letter}_kwargs"]
        assert all(list(getattr(section, ours)) == theirs[key][::turn] for ours, key in LISTS.items())
        assert section.num_low_precision_res == len(theirs["FP16Stages"])
    assert config.model.generator.z_dim == preset["G_kwargs"]["NoiseDimension"]
