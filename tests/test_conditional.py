"""Class labels of the shards reach G, D and the metrics; else a conditional run would quietly learn no class."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import picture, run_jobs, tiny_config, write_config

from sdtrain.data.read.dataset import open_dataset
from sdtrain.rng import Draws
from sdtrain.sampling import draws_for, labels_for

SAMPLES, CLASSES = 48, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain webdataset tars with `KEY.cls`: half of the samples are of class 0."""
    folder = tmp_path_factory.mktemp("labelled") / "shards"
    folder.mkdir()
    with tarfile.open(folder / "000.tar", "w") as tar:
        for number in range(SAMPLES):
            data = io.BytesIO()
            Image.fromarray(picture(number)).save(data, "PNG")
            label = str(0 if number % 2 else 1 + number % 4 // 2).encode()
            for suffix, content in (("png", data.getvalue()), ("cls", label)):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def test_labels_are_drawn_in_the_proportions_of_the_training_set(shards: Path):
    counts = open_dataset(str(shards)).class_counts
    assert counts == [24, 12, 12]
    drawn = labels_for(draws_for(range(4000), seed=0, device="cpu"), counts)
    assert drawn is not None and drawn.shape == (4000, CLASSES)
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.5, 0.25, 0.25]), atol=0.03, rtol=0.0)


def test_labels_of_a_chunk_belong_to_its_ghosts_and_a_class_without_samples_is_never_drawn():
    whole = Draws(seed=0, step=3, ghosts=range(50), ghost_batch=4)
    drawn = labels_for(whole.sub("G"), [5, 0, 5])
    assert drawn is not None and drawn.shape == (200, 3) and drawn[:, 1].sum() == 0 and drawn.sum() == 200
    parts = [labels_for(replace(whole, ghosts=range(a, a + 25)).sub("G"), [5, 0, 5]) for a in (0, 25)]
    assert torch.equal(torch.cat(parts), drawn)
    assert not torch.equal(labels_for(whole.sub("D"), [5, 0, 5]), drawn)  # fresh ones for each phase
    planned = labels_for(replace(whole, device="meta"), [5, 0, 5])
    assert planned.device.type == "meta" and planned.shape == (200, 3)


def test_a_conditional_run_trains_and_is_measured_and_labels_can_be_left_aside(shards: Path):
    metrics = {"names": ["fid"], "extractor": "random-inception", "num_fake": 8, "num_real": 8, "tap": 64}
    more = {"model__generator__num_embeddings": CLASSES, "model__discriminator__num_embeddings": CLASSES}
    config = tiny_config(shards, total_img=32, eval_img=32, metrics=metrics, **more)
    file = write_config(shards.parent / "conditional.yaml", config)
    arms = {"with": ["--set", "data.labels=true"], "without": ["--set", "data.labels=false"]}
    jobs = [{"args": ["--cfg", str(file), "--out", str(shards.parent / arm), *given]} for arm, given in arms.items()]
    for told in run_jobs(shards.parent, jobs):
        assert told["code"] == 0, told
    embeds = {}
    for arm in arms:
        rows = [json.loads(line) for line in (shards.parent / arm / "metrics.jsonl").read_text().splitlines()]
        assert any(row["kind"] == "eval" and row["fid"] > 0 for row in rows)
        names = load_file(shards.parent / arm / "checkpoints" / "img_000000032" / "G.safetensors").keys()
        embeds[arm] = any("embed" in name for name in names)
    assert embeds == {"with": True, "without": False}
