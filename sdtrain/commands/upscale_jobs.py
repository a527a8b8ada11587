"""Which pictures `sdtrain upscale` reads, and where it writes their results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import ConfigError


@dataclass(frozen=True)
class Job:
    source: Path
    target: Path


def find_jobs(inputs: list[Path], out: Path) -> list[Job]:
    """What to read and where to write it, each target once. ConfigError when there is nothing to do."""
    from sdtrain.data.read.images import is_image_name

    jobs: list[Job] = []
    read: set[Path] = set()
    taken: set[Path] = set()
    for source, folder in _sources(inputs, is_image_name):
        actual = source.resolve()
        # results of an earlier run may lie inside an input folder
        is_result = folder in inputs and out.resolve() in actual.parents
        if actual in read or is_result:
            continue
        read.add(actual)
        target = next(name for name in _names(out / source.relative_to(folder)) if name not in taken)
        taken.add(target)
        jobs.append(Job(source, target))
    if not jobs:
        raise ConfigError(
            f"there are no pictures in {', '.join(map(str, inputs))}; give files, or folders that hold some"
        )
    return jobs


def _names(path: Path) -> Iterator[Path]:
    """a.png, a_jpg.png, a_jpg_2.png, ... for a.jpg."""
    yield path.with_suffix(".png")
    stem = f"{path.stem}_{path.suffix.lstrip('.').lower()}"
    yield path.with_name(f"{stem}.png")
    yield from (path.with_name(f"{stem}_{n}.png") for n in itertools.count(2))


def _sources(inputs: list[Path], is_picture: Callable[[str], bool]) -> Iterator[tuple[Path, Path]]:
    """(file, folder its target's name is relative to); files that were named are tried whatever they are called."""
    for path in inputs:
        if path.is_dir():
            yield from ((file, path) for file in sorted(path.rglob("*")) if file.is_file() and is_picture(file.name))
        else:
            yield path, path.parent


def num_pixels(path: Path) -> int:
    """From the header, for the progress bar; 0 for a file that will be refused."""
    from sdtrain.data.read.images import ImageRejected, size_of_image

    try:
        width, height = size_of_image(path)
        return width * height
    except (ImageRejected, OSError):  # the reader that decides says why; here only the estimate suffers
        return 0
