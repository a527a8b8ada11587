"""What decides the numbers of a run besides its configuration, kept in checkpoints and compared on resume.

Other images are refused. Other versions, devices and numbers of threads only end the equality to the bit: a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sdtrain import __version__
from sdtrain.config.keys import Config
from sdtrain.data.read.dataset import Dataset
from sdtrain.data.read.identity import differences, identity
from sdtrain.engine.ranks import gather_objects, is_main, world
from sdtrain.engine.runfolder import git_commit
from sdtrain.errors import RunError
from sdtrain.precision import exact_sums

DATA_KEY = "data.train"  # what --allow has to name
LOST = "from here on the numbers are not those of an uninterrupted run to the bit"

log = logging.getLogger("sdtrain")


def origin_of(config: Config, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Plain data; all ranks together, the main one reads the shards."""
    mine: dict[str, Any] = {"threads": torch.get_num_threads(), "device": describe(device)}
    if is_main():
        mine["data"] = identity(dataset, full=config.data.check == "full")
        mine["sdtrain"] = " ".join(filter(None, [__version__, git_commit()]))
    found = gather_objects(mine)
    return {
        "data": found[0]["data"],
        "torch": torch.__version__,
        "sdtrain": found[0]["sdtrain"],
        "devices": sorted({rank["device"] for rank in found}),
        "threads": sorted({rank["threads"] for rank in found}) if device.type == "cpu" else [],
        "world": [] if exact_sums(config, device) else [world()],
        "summation": ["exact" if exact_sums(config, device) else "fast"],
        "compile": [config.compile],
    }


def describe(device: torch.device) -> str:
    """Its kind, and what a processor of that kind computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def compare_origin(old: Mapping[str, Any], new: Mapping[str, Any], allow: Sequence[str], where: str) -> None:
    """Warn of what ends the equality to the bit. Raises `RunError` for other images, unless they are allowed."""
    changed = differences(old["data"], new["data"])
    if changed and DATA_KEY not in allow:
        listed = "".join(f"\n  {text}" for text in changed)
        raise RunError(
            f"the training data is not that of {where}:{listed}\n"
            f"put these shards back, choose another folder with --out, or go on with the new ones: --allow {DATA_KEY}"
        )
    for sentence in (*changed, *warnings(old, new)):
        if is_main():
            log.warning("unlike %s: %s", where, sentence)


def warnings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One sentence a difference that only ends the equality to the bit."""
    words: dict[str, Callable[[Any], str]] = {
        "torch": lambda value: f"torch {value}",
        "sdtrain": lambda value: f"sdtrain {value}",
        "devices": lambda value: ", ".join(value),
        "threads": lambda value: f"{' or '.join(map(str, value))} threads a rank (OMP_NUM_THREADS)",
        "world": lambda value: f"{value[0]} ranks with summation: fast",
        "summation": lambda value: f"summation: {value[0]}",
        "compile": lambda value: f"compile: {value[0]}",
    }
    there = [what for what in words if old.get(what) and new.get(what)]  # earlier versions have written less
    pairs = [(words[what], old[what], new[what]) for what in there]
    return [f"{say(before)} then, {say(after)} now; {LOST}" for say, before, after in pairs if before != after]
