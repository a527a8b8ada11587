"""`sdtrain sample --shards N`: images of a generator as a data set of N tar shards, on as many ranks as are started.

Shards, markers and ranks are those of shard_jobs.py. Images are drawn in the batches that single files are drawn in,
and a shard is a number of whole batches, so that neither the cut nor the ranks decide how an image is rounded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import PIL
from PIL import Image

from sdtrain.commands import shard_jobs
from sdtrain.commands.shard_jobs import Job, Tick, shard_of
from sdtrain.data.pack.shaping import Shape, encode
from sdtrain.engine.threads import share
from sdtrain.errors import EXIT_OK, ConfigError
from sdtrain.files import sha256_of_file

if TYPE_CHECKING:
    from sdtrain.commands.source import Source

Sample = tuple[int, int, tuple[str, bytes]]


def run(args: argparse.Namespace, indices: Sequence[int], load: Callable[[], Source]) -> int:
    """Returns 0. Raises ConfigError before anything is written."""
    source = shard_jobs.on_this_rank(load)
    jobs = plan_jobs(args, list(dict.fromkeys(indices)), source)
    shard_jobs.refuse_other(args.out, jobs[0].plan)
    about = {"model": source.file.name, "role": source.role, "seed": source.seed, "resolution": source.resolution}
    about |= {**source.style, "jpeg": args.jpeg, "pillow": PIL.__version__}
    rank, world = shard_jobs.rank_and_world()
    mine = jobs[rank::world]
    work = shard_jobs.shards(args.out, jobs, about, source.label_names)
    manifest = shard_jobs.fill(work, jobs, mine, lambda job, tick: draw(job, source, args.jpeg, tick), "sampling")
    shard_jobs.told(args.out, manifest, len(mine), len(jobs))
    if manifest:
        drawn = f"{manifest['count']:,} images of {source.role} from {source.file}, seed {source.seed}"
        print(f"{drawn}, in {len(jobs)} shards in {args.out}")
    return EXIT_OK


def plan_jobs(args: argparse.Namespace, indices: list[int], source: Source) -> list[Job]:
    """Shards of nearly as many batches each. Raises ConfigError for more shards than batches."""
    size, num = source.batch_size, args.shards
    batches = -(-len(indices) // size)
    if num > batches:
        raise ConfigError(
            f"--shards {num}: {len(indices)} images in batches of {size} fill {batches} shards at most; "
            "take fewer shards or a smaller --batch"
        )
    drawn = [source.seed, source.class_counts, source.label_names, source.style, size, args.jpeg]
    drawn += [] if args.runtime in (None, "eager") else [args.runtime]  # it rounds in another way
    plan = shard_jobs.digest_of([sha256_of_file(source.file), indices, num, *drawn])
    cuts = [batches * n // num * size for n in range(num + 1)]
    return [Job(n, str(args.out), plan, tuple(indices[a:b])) for n, (a, b) in enumerate(zip(cuts, cuts[1:]))]


def draw(job: Job, source: Source, jpeg: int | None, tick: Tick) -> None:
    """Write one shard, then its marker."""
    shape = Shape(format="jpeg", quality=jpeg) if jpeg else Shape()
    with shard_of(job) as shard, ThreadPoolExecutor(share(os.environ)) as pool:
        for index, label, (ext, data) in encoded(job.samples, source, shape, pool):
            shard.add(f"{index:06d}", ext, data, label)
            tick(1)


def encoded(indices: Sequence[int], source: Source, shape: Shape, pool: ThreadPoolExecutor) -> Iterator[Sample]:
    """(index, label or -1, (extension, file)); the files of a batch are made while the next one is drawn."""
    waiting: list[tuple[int, int, Any]] = []
    for first in range(0, len(indices), source.batch_size):
        part = indices[first : first + source.batch_size]
        images = source(part).permute(0, 2, 3, 1).numpy()
        made, waiting = (
            waiting,
            [
                (index, label, pool.submit(encode, Image.fromarray(image), shape))
                for index, label, image in zip(part, source.labels(part), images)
            ],
        )
        yield from ((index, label, file.result()) for index, label, file in made)
    yield from ((index, label, file.result()) for index, label, file in waiting)
