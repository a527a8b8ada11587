"""What cannot work in a configuration of SDAKD beside what `restoration/checks.py` finds; free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.restoration import checks

if TYPE_CHECKING:
    from sdtrain.data.read.dataset import Dataset
    from sdtrain.methods.sdakd.options import Loaded


def problems(config: Loaded) -> list[tuple[str, str]]:
    """Combinations that cannot work, as (keys, sentence)."""
    by_recipe = not {"teacher", "naive"}.isdisjoint(config.stages)
    return [*checks.problems(config, by_recipe), *_stages(config)]


def _stages(config: Loaded) -> Iterator[tuple[str, str]]:
    names, files = list(config.stages), config.teacher
    order = [name for name in ("teacher", "supervised", "adversarial", "naive") if name in names]
    if not names or names != order or ("naive" in names and len(names) > 1):
        yield "stages", "stages must be some of teacher, supervised, adversarial in this order, or naive alone"
    needing = [name for name in ("supervised", "adversarial") if name in names]
    missing = [name for name in ("generator", "discriminator") if not getattr(files, name)]
    if needing and missing and "teacher" not in names:
        yield (
            "stages, teacher.generator, teacher.discriminator",
            f"stage {needing[0]} needs a teacher {' and '.join(missing)} that nobody provides: "
            f"add teacher to stages, or give {' and '.join(f'teacher.{name}' for name in missing)}",
        )
    if files.discriminator and not files.generator:
        yield "teacher.generator", "teacher.discriminator is given without the generator it judged: give both"
    if config.adversary == "teacher" and names == ["naive"]:
        yield "adversary", "a naive baseline has no teacher to judge it: set adversary: student"


def data_problems(config: Loaded, dataset: Dataset) -> list[str]:
    """What the opened training data cannot do for this configuration, and teachers that are not there."""
    missing = [
        f"teacher.{name} {path} does not exist: give a .pth or .safetensors file, or let stage 1 train one"
        for name in ("generator", "discriminator")
        if (path := getattr(config.teacher, name)) and set(config.stages) != {"naive"} and not _exists(path)
    ]
    return missing + checks.data_problems(config, dataset)


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()
