"""Numbers of a configuration that no machine can hold: --plan builds networks, and says so in a sentence."""

from __future__ import annotations

import argparse
import copy
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzz.configs import as_yaml
from fuzz.harness import Inputs
from fuzz.mutate import NAMES, places
from fuzz.runs import template
from sdtrain import main
from sdtrain.config.compare import dump
from sdtrain.config.load import load_config

SMALL = ("quickstart", "stylenat/small32", "r3gan/small32")
SECTIONS = ("model", "model", "model", "data", "optimizer", "augment", "metrics", "degradation", "student", "ema", "sd")
SHARDS = "SHARDS"  # becomes the folder of this process
# a network of 10^5 channels is what the user asks of this machine; what no machine has is refused
EXTREME = (0, 1, 3, 7, 10**3, 2**20 + 1, 10**9, 2**31, 2**62, 2**63, 10**30, 0.5, 1e-320, 1e300)


@cache
def originals() -> tuple[dict[str, Any], ...]:
    """Small configurations of all kinds, with every default in them."""
    found = [yaml.safe_load(dump(template().config))]
    for name in SMALL:
        given = ["weights.lpips=random", "weights.inception=random", "weights.perceptual=random", "weights.alex=random"]
        found.append(yaml.safe_load(dump(load_config(name, given))))
    for tree in found:
        tree["data"] |= {"train": SHARDS, "labels": None, "val": None, "test": None}
    return tuple(found)


def numbers(chance: Random, folder: Path) -> Path:
    """A configuration of which some numbers are far too small or large, or of another type."""
    tree = copy.deepcopy(chance.choice(originals()))
    for _ in range(chance.choice((1, 1, 2, 3))):
        section = tree.get(chance.choice((*SECTIONS, *tree)))
        inner = places(section)
        if not inner:
            continue
        *outer, last = chance.choice(inner)
        for key in outer:
            section = section[key]
        section[last] = chance.choice(EXTREME if chance.random() < 0.9 else NAMES)
    path = folder / "input.yaml"
    path.write_text(as_yaml(tree), errors="replace")
    return path


def plan(path: Path) -> None:
    """`sdtrain train --plan`."""
    path.write_text(path.read_text().replace(SHARDS, str(template().config.data.train)))
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    main.run(parser.parse_args(["--cfg", str(path), "--out", str(path.parent / "out"), "--plan"]))


originals()
CLASSES = {"numbers of --plan": Inputs(numbers, plan, seconds=20.0, memory_mb=1024)}
