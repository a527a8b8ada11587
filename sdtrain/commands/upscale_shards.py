"""`sdtrain upscale SHARDS`: a data set of tar shards in, the same one enlarged out, by as many ranks as are started.

    OUT/.pack/shard-000000.tar, 000000.json    a shard that is done, and its marker; what has one is not done again
    OUT/shard-000000.tar ..., index.npz, manifest.json    all of them, once the last rank has done its last

Shard N is rank N mod WORLD_SIZE's; ranks never wait for each other, so they may be started and killed at any time. A
shard depends on its input, the network and the settings alone: on machines alike, with as many threads, its bytes are
the same after any number of starts.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands.overlap import overlapped
from sdtrain.commands.running import form_of
from sdtrain.data.pack.pack import complete, other_plan
from sdtrain.data.pack.packing import MARKERS, ShardJob, finish, finished
from sdtrain.data.read.budget import PictureLimits
from sdtrain.data.read.dataset import Dataset, open_dataset
from sdtrain.data.read.images import ImageRejected
from sdtrain.data.read.picture import Picture, picture_of, png_of
from sdtrain.data.read.tars import ShardWriter
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, DataError, UserError
from sdtrain.files import sha256_of_file, write_json

if TYPE_CHECKING:
    from sdtrain.commands.upscale import Upscaler

LOCK = ".upscale.lock"
SHOWN = 20


@dataclass(frozen=True)
class Job(ShardJob):
    """Samples of the data set, by number."""

    samples: tuple[int, ...]


def run(args: argparse.Namespace, upscaler: Upscaler) -> int:
    """Returns 0, or 2 when a picture was refused. Raises ConfigError, DataError before anything is written."""
    dataset = open_dataset(str(args.inputs[0]), limits=upscaler.limits)
    jobs = plan_jobs(dataset, upscaler, args.out)
    refuse_other(args.out, dataset, jobs[0].plan)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with written_to(args.out):
        manifest = complete(args.out, jobs)
        if not manifest:
            (args.out / MARKERS).mkdir(parents=True, exist_ok=True)
            mine = [job for job in jobs if job.number % world == rank]
            for job in progress([job for job in mine if finished(job) is None], rank):
                enlarge(job, dataset, upscaler)
            manifest = publish(args.out, jobs, dataset, upscaler)
        if manifest:  # a crash in the last moment may have left these
            shutil.rmtree(args.out / MARKERS, ignore_errors=True)
            (args.out / LOCK).unlink(missing_ok=True)
    return told(args.out, manifest, len(jobs))


def plan_jobs(dataset: Dataset, upscaler: Upscaler, out: Path) -> list[Job]:
    """A job for each shard, with the digest of everything that its bytes depend on."""
    names = ("tile", "overlap", "scale", "factor", "seed")
    settings = {name: getattr(upscaler, name) for name in names} | {"megabytes": upscaler.limits.megabytes}
    if (form := form_of(upscaler.runtime, upscaler.precision)) != "eager":  # it rounds in another way
        settings["runtime"] = form
    what = [dataset.hash, sha256_of_file(upscaler.path), settings]
    plan = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    samples: dict[int, list[int]] = {number: [] for number in range(len(dataset.shards))}
    for sample, shard in enumerate(dataset.index.shard.tolist()):
        samples[shard].append(sample)
    return [Job(number, str(out), plan, tuple(found)) for number, found in samples.items()]


def refuse_other(out: Path, dataset: Dataset, plan: str) -> None:
    """Raise ConfigError for a folder that another command has filled, and for that of the input."""
    if any(Path(shard).resolve().parent == out.resolve() for shard in dataset.shards):
        raise ConfigError(f"--out {out} is the folder of the input; choose another")
    if other := other_plan(out, plan):
        raise ConfigError(f"--out {out} holds {other}; choose another folder")


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """A write that fails inside is a ConfigError; what is done stays, and the same command goes on there."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror or error}); mend that, and the same command goes on there"
        ) from None


def progress(jobs: Sequence[Job], rank: int) -> Iterator[Job]:
    from tqdm import tqdm

    total, hidden = sum(len(job.samples) for job in jobs), rank > 0 or not sys.stderr.isatty()
    with tqdm(total=total, unit="img", desc="upscaling", disable=hidden) as bar:
        for job in jobs:
            yield job
            bar.update(len(job.samples))


def enlarge(job: Job, dataset: Dataset, upscaler: Upscaler) -> None:
    """Write one shard, then its marker. A sample that cannot be used is left out, and counted with its reason."""
    writer, labels, shard = ShardWriter(job.path), Counter[int](), os.path.basename(dataset.shards[job.number])
    rejected = [(member, reason) for place, member, reason in dataset.damage if place == shard and member]
    try:
        for sample, found in enlarged(dataset, job.samples, upscaler):
            key, label = dataset.index.key(sample), int(dataset.index.label[sample])
            if isinstance(found, str):
                rejected.append((key, found))
                continue
            writer.add(f"{key}.png", found)
            if label >= 0:
                writer.add(f"{key}.cls", str(label).encode())
            labels[label] += 1
        size, sha256 = writer.close()
    except BaseException:
        writer.abandon()
        raise
    marker = {"plan": job.plan, "name": job.path.name, "size": size, "sha256": sha256, "count": sum(labels.values())}
    marker |= {"converted": {}, "rejected": rejected, "labels": {str(k): n for k, n in labels.items()}}
    write_json(job.marker, marker)


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


def publish(out: Path, jobs: Sequence[Job], dataset: Dataset, upscaler: Upscaler) -> dict[str, Any]:
    """Let the shards take their places, once all are there: one rank does, whichever comes last. {} before that."""
    with open(out / LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system takes it from a process that dies
        if not all(job.marker.is_file() for job in jobs):
            return complete(out, jobs)  # what another rank may have published
        markers = [marker for job in jobs if (marker := finished(job))]
        if len(markers) < len(jobs):
            return {}
        about: dict[str, Any] = {"plan": jobs[0].plan, "source": dataset.hash, "model": upscaler.path.name}
        return finish(out, markers, about | {"resolution": side_of(dataset, upscaler)}, dataset.label_names)


def side_of(dataset: Dataset, upscaler: Upscaler) -> int | None:
    """Of the results, where all inputs are squares of one side."""
    times = upscaler.scale or getattr(upscaler.net, "scale", None)
    return round(dataset.resolution * times) if dataset.resolution and times else None


def told(out: Path, manifest: dict[str, Any], shards: int) -> int:
    """Say what is there; 2 where pictures were refused."""
    if not manifest:
        print(f"{out}: the shards of this rank are done; the rank that does the last one puts all in their places")
        return EXIT_OK
    done, refused = manifest["count"], manifest["rejected"]
    print(f"upscaled {done:,} of {done + len(refused):,} pictures into {shards} shards in {out}")
    if not refused:
        return EXIT_OK
    shown = [f"  {key}: {reason}" for key, reason in refused[:SHOWN]]
    more = [f"  and {len(refused) - SHOWN} more, in manifest.json"] if len(refused) > SHOWN else []
    print(f"refused {len(refused)}:", *shown, *more, sep="\n", file=sys.stderr)
    return EXIT_USER_ERROR
