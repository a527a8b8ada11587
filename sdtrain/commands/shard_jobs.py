"""What jobs of many shards share: `sdtrain upscale SHARDS`, `sdtrain sample --shards`, and a film in parts.

    OUT/.pack/shard-000000.tar, 000000.json    a shard that is done, and its marker; what has one is not done again
    OUT/shard-000000.tar ..., index.npz, manifest.json    all of them, once the last rank has done its last

Shard N is rank N mod WORLD_SIZE's; ranks never wait for each other, so they may be started and killed at any time. A
shard depends on its input, the network and the settings alone: on machines alike, with as many threads, its bytes are
the same after any number of starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdtrain.data.pack.pack import complete, other_plan
from sdtrain.data.pack.packing import ShardJob, finish, finished
from sdtrain.data.read.tars import ShardWriter
from sdtrain.engine.threads import set_threads
from sdtrain.errors import ConfigError, UserError
from sdtrain.files import write_json

LOCK = ".shards.lock"
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Job(ShardJob):
    """A shard of these samples, by number."""

    samples: Sequence[int]


J = TypeVar("J", bound=Job)
T = TypeVar("T")
Tick = Callable[[int], object]


def rank_and_world() -> tuple[int, int]:
    """As torchrun, accelerate or a job script say; alone without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def on_this_rank(load: Callable[[], T]) -> T:
    """What `load` loads, on this rank's GPU, with its share of the cores and kernels that repeat their bits."""
    import torch

    from sdtrain.engine.ranks import has_gpu
    from sdtrain.precision import set_precision

    set_threads()
    if has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    loaded = load()
    set_precision(tf32=False, deterministic=has_gpu())
    return loaded


def digest_of(what: Any) -> str:
    """Of all that the bytes of shards depend on, as JSON."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def refuse_other(out: Path, plan: str) -> None:
    """Raise ConfigError for a folder that another command has filled."""
    if other := other_plan(out, plan):
        raise ConfigError(f"--out {out} holds {other}; choose another folder")


@dataclass(frozen=True)
class Work:
    """How a rank begins and ends: where the results go, what an earlier start has made of them, what ends the work."""

    out: Path
    staged: Path
    """Folder of finished jobs, gone in the end."""
    lock: Path
    whole: Callable[[], Manifest]
    """What lies in `out` already, or {}."""
    place: Callable[[list[Manifest]], Manifest]
    """Make `out` of the markers of all jobs."""


def shards(out: Path, jobs: Sequence[ShardJob], about: Manifest, label_names: Sequence[str]) -> Work:
    """Work that ends in a data set; `about` says for people how it was made, and its resolution."""
    about = {"plan": jobs[0].plan, **about}
    place = (lambda: complete(out, jobs)), (lambda markers: finish(out, markers, about, label_names))
    return Work(out, jobs[0].staged, out / LOCK, *place)


def fill(work: Work, jobs: Sequence[J], mine: Sequence[J], do: Callable[[J, Tick], None], doing: str) -> Manifest:
    """Do those of `jobs` that are `mine` and not done; the manifest, or {} while other ranks have some to do."""
    with own_words(), written_to(work.out):
        work.staged.mkdir(parents=True, exist_ok=True)
        with locked(work.lock, fcntl.LOCK_SH):  # else another rank could publish what is being looked through
            manifest = work.whole()
            todo = [] if manifest else [job for job in mine if finished(job) is None]
        with progress(todo, doing) as tick:
            for job in todo:
                do(job, tick)
        manifest = manifest or publish(work, jobs)
        if manifest:
            shutil.rmtree(work.staged, ignore_errors=True)
            work.lock.unlink(missing_ok=True)
    return manifest


def publish(work: Work, jobs: Sequence[ShardJob]) -> Manifest:
    """Make the whole of the parts, once all are there: one rank does, whichever comes last. {} before that."""
    with locked(work.lock, fcntl.LOCK_EX):
        manifest = work.whole()
        if not manifest and all(job.marker.is_file() for job in jobs):
            markers = [marker for job in jobs if (marker := finished(job))]
            manifest = work.place(markers) if len(markers) == len(jobs) else {}
        return manifest


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    """The system takes the lock from a process that dies."""
    with open(path, "w") as file:
        fcntl.flock(file, how)
        yield


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """A write that fails inside is a ConfigError; what is done stays, and the same command goes on there."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror or error}); mend that, and the same command goes on there"
        ) from None


@contextmanager
def own_words() -> Iterator[None]:
    """What goes wrong inside may have gone wrong on this rank alone, so it says so itself."""
    try:
        yield
    except UserError as error:
        error.of_one = True
        raise


@contextmanager
def progress(jobs: Sequence[Job], doing: str) -> Iterator[Tick]:
    """A bar on the first rank's terminal, moved by the number of samples."""
    from tqdm import tqdm

    hidden = rank_and_world()[0] > 0 or not sys.stderr.isatty()
    with tqdm(total=sum(len(job.samples) for job in jobs), unit="img", desc=doing, disable=hidden) as bar:
        yield bar.update


class Shard:
    """A shard that is being written, with what its marker will say."""

    def __init__(self, path: Path) -> None:
        self.writer, self.labels = ShardWriter(path), Counter[int]()
        self.rejected: list[tuple[str, str]] = []

    def add(self, key: str, ext: str, data: bytes, label: int) -> None:
        """One sample; `label` -1 is none."""
        self.writer.add(f"{key}.{ext}", data)
        if label >= 0:
            self.writer.add(f"{key}.cls", str(label).encode())
        self.labels[label] += 1


@contextmanager
def shard_of(job: ShardJob) -> Iterator[Shard]:
    """The shard of a job, which appears with its marker when the block ends; an exception leaves nothing."""
    shard = Shard(job.path)
    try:
        yield shard
        size, sha256 = shard.writer.close()
    except BaseException:
        shard.writer.abandon()
        raise
    labels = {str(label): count for label, count in shard.labels.items()}
    mark(job, size, sha256, count=shard.labels.total(), rejected=shard.rejected, labels=labels)


def mark(job: ShardJob, size: int, sha256: str, **more: Any) -> None:
    """Say that a job is done: its file has `size` bytes with this digest."""
    empty = {"count": 0, "converted": {}, "rejected": [], "labels": {}}
    write_json(job.marker, {"plan": job.plan, "name": job.path.name, "size": size, "sha256": sha256} | empty | more)


def told(out: Path, manifest: Manifest, done: int, jobs: int, what: str = "shards") -> None:
    """Say what this rank has done, where there are others, and whether all is there."""
    rank, world = rank_and_world()
    if world > 1:
        print(f"rank {rank} of {world} had {done} of {jobs} {what}")
    if not manifest:
        print(f"{out}: the {what} of this rank are done; the rank that does the last one puts all in their places")
