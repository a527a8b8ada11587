"""Run by torchrun from test_metrics.py: evaluate one sampler on all ranks, write the values; then let a rank fail.

usage: ranks_evaluate.py FOLDER WORLD OUT
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from sdtrain.errors import RankFailed
from sdtrain.exits import part
from sdtrain.metrics.evaluate import Evaluator
from sdtrain.metrics.images import open_images
from sdtrain.rng import generator


def sample(indices: list[int]) -> torch.Tensor:
    """Smooth coloured noise, each image a function of its index."""
    coarse = [torch.randint(0, 256, (3, 4, 4), generator=generator("fake", i)) for i in indices]
    return torch.nn.functional.interpolate(torch.stack(coarse).float(), (16, 16), mode="bilinear").to(torch.uint8)


def evaluator(folder: str, **more: object) -> Evaluator:
    settings = {"metrics": ("fid", "rfid", "kid", "pr"), "extractor": "random-inception", "tap": 64, "seeds": 2}
    return Evaluator(open_images(folder), num_fake=11, batch_size=4, workers=0, **{**settings, **more})  # type: ignore[arg-type]


if __name__ == "__main__":
    folder, world, out = sys.argv[1:]
    dist.init_process_group("gloo")
    assert dist.get_world_size() == int(world)
    judge = evaluator(folder)
    values = judge.measure(sample)[0]
    try:
        judge.measure(lambda indices: sample(indices) if dist.get_rank() == 0 else 1 / 0)  # type: ignore[arg-type]
        values["fault"] = "unnoticed"
    except RankFailed as error:
        values["fault"] = f"{type(error).__name__}: {error}"
    with open(f"{out}.{dist.get_rank()}", "w") as file:
        json.dump(values, file)
    part(0)
