"""Packing proper: the source is cut into shards beforehand, each shard is one job, finished jobs leave a marker.

OUT/shard-000000.tar ...   plain webdataset shards; they and the index appear together when all are done
OUT/index.npz              offsets of all members
OUT/manifest.json          what this is; written last, so its presence means complete
OUT/.pack/                 while packing: finished shards, each with a marker 000000.json; removed at the end

A packing that was interrupted or killed leaves OUT/.pack, from which the same command continues; one that was refused
leaves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from sdtrain.data.pack.shaping import Shape, key_of, pieces
from sdtrain.data.pack.sources import SourceFile, SourceReader
from sdtrain.data.read.budget import LIMITS
from sdtrain.data.read.dataset import dataset_of, refuse_empty
from sdtrain.data.read.images import ImageRejected, hush
from sdtrain.data.read.index import INDEX_NAME, build_index
from sdtrain.data.read.manifest import MANIFEST_NAME, hash_of, is_plain_name, read_manifest
from sdtrain.data.read.remote import default_cache, verified
from sdtrain.data.read.tars import ShardWriter
from sdtrain.errors import DataError
from sdtrain.files import read_json, sha256_of_file, write_json

FORMAT = "sdtrain-shards/1"
MARKERS = ".pack"
POLL_SEC = 0.2
MARKER = {"plan", "name", "size", "sha256", "count", "converted", "rejected", "labels"}
STOP = -(1 << 62)  # a counter below zero tells the processes to leave
_counter: Any = None


@dataclass(frozen=True)
class ShardJob:
    """One shard of those that fill `out`; `plan` is a digest of all that its bytes depend on."""

    number: int
    out: str
    plan: str

    @property
    def staged(self) -> Path:
        """The folder of shards and markers until all are done."""
        return Path(self.out) / MARKERS

    @property
    def path(self) -> Path:
        return self.staged / f"shard-{self.number:06d}.tar"

    @property
    def marker(self) -> Path:
        return self.staged / f"{self.number:06d}.json"


@dataclass(frozen=True)
class Job(ShardJob):
    """A shard of files of the source, numbered from `first`."""

    first: int
    files: tuple[SourceFile, ...]
    source: str
    shape: Shape


def plan_jobs(source: Path, out: Path, files: Sequence[SourceFile], shape: Shape, num_shards: int) -> list[Job]:
    """Cut the files into runs of nearly equal length. The cut depends on the source and the choices alone."""
    listing = [(f.name, f.size, f.label) for f in files]
    choices = asdict(shape)
    if shape.max_image_mb == LIMITS.megabytes:
        del choices["max_image_mb"]  # plans of folders that were made before there was a choice stay the same
    plan = hashlib.sha256(json.dumps([listing, choices, num_shards]).encode()).hexdigest()
    cuts = [len(files) * n // num_shards for n in range(num_shards + 1)]
    bounds = list(zip(cuts, cuts[1:], strict=False))
    same: dict[str, Any] = {"out": str(out), "plan": plan, "source": str(source), "shape": shape}
    return [Job(number=n, first=a, files=tuple(files[a:b]), **same) for n, (a, b) in enumerate(bounds)]


def estimated_bytes(files: Sequence[SourceFile], shape: Shape) -> float:
    """About how many bytes the shards will have; decides their number, nothing else."""
    if shape.resolution:
        return len(files) * shape.resolution**2 * (0.6 if shape.format == "jpeg" else 1.9)
    overlap = (shape.tile / shape.stride) ** 2 if shape.tile else 1.0
    return sum(f.size for f in files) * overlap


def run_job(job: Job) -> dict[str, Any]:
    """Write one shard and its marker; returns the marker. Bad images are noted in it and left out."""
    reader, writer = SourceReader(Path(job.source), job.shape.limits), ShardWriter(job.path)
    converted: Counter[str] = Counter()
    rejected: list[tuple[str, str]] = []
    count, labels = 0, Counter[int]()
    try:
        for number, file in enumerate(job.files, job.first):
            try:
                made, notes = pieces(_bytes_of(reader, file, job), job.shape)
                count += _add(writer, key_of(number, file.name), made, file.label, many=bool(job.shape.tile))
                converted.update(notes)
                labels[file.label] += len(made)
            except ImageRejected as error:
                rejected.append((file.name, str(error)))
            _tick()
        size, sha256 = writer.close()
    except BaseException:
        writer.abandon()
        raise
    marker = {"plan": job.plan, "name": job.path.name, "size": size, "sha256": sha256, "count": count}
    marker |= {"converted": dict(converted), "rejected": rejected, "labels": {str(k): n for k, n in labels.items()}}
    write_json(job.marker, marker)
    return marker


def _bytes_of(reader: SourceReader, file: SourceFile, job: Job) -> bytes:
    try:
        return reader.read(file.name)
    except OSError as error:
        raise DataError(
            f"{job.source}/{file.name} cannot be read ({error.strerror or error}); "
            "check its rights, or leave it out with --exclude-list"
        ) from None


def _add(writer: ShardWriter, key: str, made: list[tuple[str, bytes]], label: int, *, many: bool) -> int:
    for piece, (ext, data) in enumerate(made):
        name = f"{key}_{piece:04d}" if many else key
        writer.add(f"{name}.{ext}", data)
        if label >= 0:
            writer.add(f"{name}.cls", str(label).encode())
    return len(made)


def finished(job: ShardJob) -> dict[str, Any] | None:
    """The marker of a job that was completed earlier and whose shard is intact, else None."""
    try:
        marker = read_json(job.marker)
        if marker.keys() != MARKER or marker["plan"] != job.plan:
            return None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    # A crash while the shards took their places leaves some of them there already.
    places = (job.path, Path(job.out) / job.path.name)
    return marker if any(verified(place, marker["sha256"]) for place in places) else None


def run_jobs(jobs: Sequence[Job], num_processes: int, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """Run jobs in processes, telling `advance` how many source images are done. Raises what a job raised."""
    if num_processes <= 1 or len(jobs) <= 1:
        return [_run_here(job, advance) for job in jobs]
    context = get_context("spawn")
    counter = context.Value("q", 0)
    with signals_noted() as signals:
        pool = ProcessPoolExecutor(
            min(num_processes, len(jobs)), context, initializer=start_worker, initargs=(counter,)
        )
        try:
            futures = [pool.submit(run_job, job) for job in jobs]
            _follow(futures, counter, advance, signals)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise DataError(
                "a packing process was killed, perhaps for want of memory; take fewer --workers, finished shards are "
                "kept"
            ) from None
        except BaseException:
            counter.value = STOP
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put down in the list, for a loop that looks there at a moment of its own.

    Python would raise KeyboardInterrupt between any two instructions, and one that has just taken a lock of the pool
    never gives it back: the pool then waits for ever.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(
    futures: list[Future[dict[str, Any]]], counter: Any, advance: Callable[[int], None], signals: list[int]
) -> None:
    waiting, seen = set(futures), 0
    while waiting:
        if signals:
            raise KeyboardInterrupt
        done, waiting = wait(waiting, timeout=POLL_SEC, return_when=FIRST_COMPLETED)
        advance(counter.value - seen)
        seen = counter.value
        for future in done:
            future.result()


def _run_here(job: Job, advance: Callable[[int], None]) -> dict[str, Any]:
    marker = run_job(job)
    advance(len(job.files))
    return marker


def start_worker(counter: Any = None) -> None:
    """Prepare a process: the parent alone answers Ctrl-C, and nobody works on when it was killed."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    hush()


def _leave_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tick() -> None:
    if _counter is None:
        return
    with _counter.get_lock():
        _counter.value += 1
    if _counter.value < 0:
        raise InterruptedError("packing was stopped")


def finish(
    out: Path, markers: Sequence[dict[str, Any]], about: dict[str, Any], label_names: Sequence[str]
) -> dict[str, Any]:
    """Let the shards take their places, write index and manifest, drop the markers, return the manifest."""
    converted: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    for marker in markers:
        converted.update(marker["converted"])
        labels.update(marker["labels"])
    shards = [{key: marker[key] for key in ("name", "size", "sha256", "count")} for marker in markers]
    manifest = manifest_of(shards, about["resolution"], label_names)
    manifest |= {"label_counts": [labels[str(n)] for n in range(len(label_names))], "pack": about}
    manifest |= {"converted": dict(sorted(converted.items()))}
    manifest |= {"rejected": [pair for marker in markers for pair in marker["rejected"]]}
    _publish(out, [shard["name"] for shard in shards])
    write_json(out / MANIFEST_NAME, manifest)
    shutil.rmtree(out / MARKERS, ignore_errors=True)
    return manifest


def _publish(out: Path, names: Sequence[str]) -> None:
    """Replace what OUT holds by the new shards and their index."""
    staged = out / MARKERS
    places = [staged / name if (staged / name).is_file() else out / name for name in names]
    index, _ = build_index(places, names)
    index.save(staged / INDEX_NAME)
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for old in set(out.glob("*.tar")) - {out / name for name in names}:
        old.unlink()
    for place in [*places, staged / INDEX_NAME]:
        os.replace(place, out / place.name)


def manifest_of(shards: list[dict[str, Any]], resolution: int | None, label_names: Sequence[str]) -> dict[str, Any]:
    """The part of a manifest that shards alone determine."""
    return {
        "format": FORMAT,
        "count": sum(shard["count"] for shard in shards),
        "resolution": resolution or None,
        "channels": 3,
        "label_names": list(label_names),
        "hash": hash_of(shards),
        "shards": shards,
    }


def reindex(folder: Path) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Rebuild index and manifest from the tars alone; keeps what an existing manifest says about their making.

    Returns the manifest and what is damaged. Raises DataError for a folder without tars, or with strange names.
    """
    names = sorted(path.name for path in folder.glob("[!.]*.tar") if path.is_file())
    if not names:
        raise DataError(f"{folder} holds no .tar files; give the folder of the shards")
    if strange := [name for name in names if not is_plain_name(name)]:
        raise DataError(f"{folder} holds {strange[0]!r}; give it a name without colons and control characters")
    try:
        old = read_manifest(folder)
    except DataError:
        old = {}
    paths = [str(folder / name) for name in names]
    index, damage = build_index(paths, names)
    found = dataset_of(str(folder), paths, index, damage, default_cache())
    refuse_empty(found)
    counts = [int((index.shard == number).sum()) for number in range(len(names))]
    shards = [
        {"name": name, "size": os.path.getsize(path), "sha256": sha256_of_file(path), "count": count}
        for name, path, count in zip(names, paths, counts, strict=True)
    ]
    label_names = max(old.get("label_names", ()), found.label_names, key=len)
    resolution = found.resolution or old.get("resolution")
    kept = {key: old[key] for key in ("label_counts", "pack", "converted", "rejected") if key in old}
    manifest = manifest_of(shards, resolution, label_names) | kept
    index.save(folder / INDEX_NAME)
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest, damage
