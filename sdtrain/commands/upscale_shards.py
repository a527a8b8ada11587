"""`sdtrain upscale SHARDS`: a data set of tar shards in, the same one enlarged out (see shard_jobs.py)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from sdtrain.commands import shard_jobs
from sdtrain.commands.overlap import overlapped
from sdtrain.commands.shard_jobs import Job, Manifest, Tick, shard_of
from sdtrain.commands.upscaler import Upscaler
from sdtrain.data.read.budget import PictureLimits
from sdtrain.data.read.dataset import Dataset, open_dataset
from sdtrain.data.read.images import ImageRejected
from sdtrain.data.read.picture import Picture, picture_of, png_of
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, DataError, UserError
from sdtrain.files import sha256_of_file

SHOWN = 20


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 when a picture was refused. Raises ConfigError, DataError before anything is written."""
    upscaler = shard_jobs.on_this_rank(lambda: Upscaler.of(args))
    dataset = open_dataset(str(args.inputs[0]), limits=upscaler.limits)
    jobs = plan_jobs(dataset, upscaler, args.out)
    refuse_own(args.out, dataset)
    shard_jobs.refuse_other(args.out, jobs[0].plan)
    about = {"source": dataset.hash, "model": upscaler.path.name, "resolution": side_of(dataset, upscaler)}
    rank, world = shard_jobs.rank_and_world()
    mine = jobs[rank::world]
    work = shard_jobs.shards(args.out, jobs, about, dataset.label_names)
    manifest = shard_jobs.fill(work, jobs, mine, lambda job, tick: enlarge(job, dataset, upscaler, tick), "upscaling")
    shard_jobs.told(args.out, manifest, len(mine), len(jobs))
    return told(args.out, manifest, len(jobs))


def plan_jobs(dataset: Dataset, upscaler: Upscaler, out: Path) -> list[Job]:
    """A job for each shard, with the digest of everything that its bytes depend on."""
    settings = upscaler.settings | {"megabytes": upscaler.limits.megabytes}
    plan = shard_jobs.digest_of([dataset.hash, sha256_of_file(upscaler.path), settings])
    samples: dict[int, list[int]] = {number: [] for number in range(len(dataset.shards))}
    for sample, shard in enumerate(dataset.index.shard.tolist()):
        samples[shard].append(sample)
    return [Job(number, str(out), plan, tuple(found)) for number, found in samples.items()]


def refuse_own(out: Path, dataset: Dataset) -> None:
    if any(Path(shard).resolve().parent == out.resolve() for shard in dataset.shards):
        raise ConfigError(f"--out {out} is the folder of the input; choose another")


def enlarge(job: Job, dataset: Dataset, upscaler: Upscaler, tick: Tick) -> None:
    """Write one shard, then its marker. A sample that cannot be used is left out, and counted with its reason."""
    name = os.path.basename(dataset.shards[job.number])
    with shard_of(job) as shard:
        shard.rejected += [(member, reason) for place, member, reason in dataset.damage if place == name and member]
        for sample, found in enlarged(dataset, job.samples, upscaler):
            key = dataset.index.key(sample)
            if isinstance(found, str):
                shard.rejected.append((key, found))
            else:
                shard.add(key, "png", found, int(dataset.index.label[sample]))
            tick(1)


def enlarged(dataset: Dataset, samples: Sequence[int], upscaler: Upscaler) -> Iterator[tuple[int, bytes | str]]:
    """Of each its enlarged picture as a PNG, or why there is none. Raises DataError where the disk fails."""

    def compute(picture: Picture | str) -> Picture | str:
        try:
            return picture if isinstance(picture, str) else upscaler(picture)
        except UserError as error:
            return str(error)

    def png(picture: Picture | str) -> bytes | str:
        return picture if isinstance(picture, str) else png_of(picture)

    def beside(last: Picture | str, this: Picture | str) -> bool:
        return isinstance(last, str) or isinstance(this, str) or upscaler.both_fit(last, this)

    with closing(overlapped(samples, partial(picture_or_why, dataset, upscaler.limits), compute, png, beside)) as work:
        yield from ((sample, found.get()) for sample, found in work)


def picture_or_why(dataset: Dataset, limits: PictureLimits, sample: int) -> Picture | str:
    try:
        return picture_of(dataset.read(sample), limits)
    except OSError as error:
        shard, _ = dataset.locate(sample)
        raise DataError(
            f"{shard} cannot be read ({error.strerror or error}); mend that, and the same command goes on there"
        ) from None
    except (ImageRejected, EOFError) as error:
        return str(error)


def side_of(dataset: Dataset, upscaler: Upscaler) -> int | None:
    """Of the results, where all inputs are squares of one side."""
    times = upscaler.enlargement
    return round(dataset.resolution * times) if dataset.resolution and times else None


def told(out: Path, manifest: Manifest, shards: int) -> int:
    """Say what is there; 2 where pictures were refused."""
    if not manifest:
        return EXIT_OK
    done, refused = manifest["count"], manifest["rejected"]
    print(f"upscaled {done:,} of {done + len(refused):,} pictures into {shards} shards in {out}")
    if not refused:
        return EXIT_OK
    shown = [f"  {key}: {reason}" for key, reason in refused[:SHOWN]]
    more = [f"  and {len(refused) - SHOWN} more, in manifest.json"] if len(refused) > SHOWN else []
    print(f"refused {len(refused)}:", *shown, *more, sep="\n", file=sys.stderr)
    return EXIT_USER_ERROR
