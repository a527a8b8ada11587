"""What `sdtrain verify` looks for: digests, tar structure, forbidden members, pixels that do not decode.

One shard is a task of its own; what several shards, the manifest and the index say of each other is in `agreement.py`.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sdtrain.data.pack.agreement import (
    Finding,
    findings_between,
    index_findings,
    manifest_findings,
    size_findings,
)
from sdtrain.data.pack.packing import start_worker
from sdtrain.data.read import remote
from sdtrain.data.read.budget import LIMITS, PictureLimits
from sdtrain.data.read.dataset import PROBES, common_side, packed_folder, read_at
from sdtrain.data.read.images import ImageRejected, decode_image, refuse_bytes
from sdtrain.data.read.index import Sample, label_of, samples_of
from sdtrain.data.read.manifest import read_manifest
from sdtrain.data.read.patterns import expand
from sdtrain.data.read.tars import Member, scan_tar
from sdtrain.errors import DataError
from sdtrain.files import sha256_of_file


@dataclass(frozen=True)
class Task:
    """One shard to look at; an empty digest and count -1 are not checked."""

    path: str
    sha256: str = ""
    count: int = -1
    num_classes: int = -1
    decode: bool = True
    limits: PictureLimits = LIMITS

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def check_source(
    source: str,
    *,
    resolution: int,
    decode: bool,
    workers: int,
    allow_pipe: bool = False,
    limits: PictureLimits = LIMITS,
) -> tuple[list[Finding], dict[str, Any]]:
    """All findings (shard, member, reason) of a packed folder or a pattern. Raises DataError when nothing matches."""
    folder = packed_folder(source, remote.default_cache())
    if folder:
        manifest = read_manifest(folder)
        tasks, findings = _packed_tasks(source, folder, manifest, decode)
    else:
        tasks, findings = _loose_tasks(source, decode, allow_pipe), []
    results = _run([replace(task, limits=limits) for task in tasks], workers)
    for _, found in results:
        findings.extend(found)
    if folder:
        whole = {task.name: samples for task, (samples, found) in zip(tasks, results, strict=True) if not found}
        findings.extend(manifest_findings(manifest))
        sizes = {task.name: os.path.getsize(task.path) for task in tasks if task.name in whole}
        findings.extend(index_findings(folder, manifest, whole, sizes))
    samples = [(task.name, sample) for task, (found, _) in zip(tasks, results, strict=True) for sample in found]
    if side := resolution or (manifest["resolution"] if folder else _side_of_first(samples)):
        findings.extend(size_findings(samples, side))
    findings.extend(findings_between(samples, bounded=not folder))
    return _worst_first(findings), {"source": source, "num_shards": len(tasks), "num_samples": len(samples)}


def totals(findings: list[Finding]) -> list[tuple[str, int]]:
    """Damaged places a shard, worst first."""
    return sorted(Counter(shard for shard, _, _ in findings).items(), key=lambda item: (-item[1], item[0]))


def _worst_first(findings: list[Finding]) -> list[Finding]:
    rank = {shard: place for place, (shard, _) in enumerate(totals(findings))}
    return sorted(dict.fromkeys(findings), key=lambda finding: rank[finding[0]])


def _packed_tasks(
    source: str, folder: Path, manifest: dict[str, Any], decode: bool
) -> tuple[list[Task], list[Finding]]:
    num_classes, cache = len(manifest["label_names"]), remote.default_cache()
    tasks, findings = [], []
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        try:
            if remote.is_remote_folder(source):
                path = remote.fetch(source + shard["name"], cache, shard["sha256"], most=shard["size"])
        except DataError as error:
            findings.append((shard["name"], "", str(error)))
            continue
        if path.exists():
            tasks.append(Task(str(path), shard["sha256"], shard["count"], num_classes, decode))
        else:
            findings.append((path.name, "", "missing shard"))
    listed = {shard["name"] for shard in manifest["shards"]}
    strangers = sorted(path.name for path in folder.glob("[!.]*.tar") if path.name not in listed)
    findings.extend((name, "", "not in the manifest") for name in strangers)
    return tasks, findings


def _loose_tasks(source: str, decode: bool, allow_pipe: bool) -> list[Task]:
    cache = remote.default_cache()
    shards = expand(source)
    paths = [str(remote.fetch(s, cache, allow_pipe=allow_pipe)) if remote.is_remote(s) else s for s in shards]
    return [Task(path, decode=decode) for path in paths]


def _side_of_first(samples: list[tuple[str, Sample]]) -> int | None:
    """What a run would take for the resolution of loose shards; None where it would find several or none."""
    return common_side(sample.pixels for _, sample in samples[:PROBES] if sample.pixels)


def _run(tasks: list[Task], workers: int) -> list[tuple[list[Sample], list[Finding]]]:
    from tqdm import tqdm

    bar = tqdm(total=len(tasks), unit="shard", desc="verifying", mininterval=0.5)
    if workers <= 1 or len(tasks) <= 1:
        results = []
        for task in tasks:
            results.append(check_shard(task))
            bar.update()
    else:
        pool = ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), initializer=start_worker)
        try:
            futures = [pool.submit(check_shard, task) for task in tasks]
            for future in futures:
                future.add_done_callback(lambda _: bar.update())
            results = [future.result() for future in futures]
        except BrokenProcessPool:
            raise DataError(
                "a process was killed, perhaps for want of memory; take fewer --workers, or --quick to decode nothing"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    bar.close()
    return results


def check_shard(task: Task) -> tuple[list[Sample], list[Finding]]:
    """The usable samples of a shard and its damage."""
    try:
        scan = scan_tar(task.path)
        samples = samples_of(scan.members, scan.damage)
        damage = list(scan.damage)
        if task.sha256 and sha256_of_file(task.path) != task.sha256:
            damage.append(("", "sha256 differs from the manifest"))
        if task.count >= 0 and len(samples) != task.count:
            damage.append(("", f"{len(samples)} samples, the manifest says {task.count}"))
        for sample in samples:
            damage.extend(_sample_damage(task, sample))
    except OSError as error:
        return [], [(task.name, "", f"cannot be read: {error.strerror or error}")]
    return samples, [(task.name, member, reason) for member, reason in damage]


def _sample_damage(task: Task, sample: Sample) -> list[tuple[str, str]]:
    assert sample.image is not None
    damage = [(sample.key, reason) for reason in _label_damage(task, sample)]
    empty = [(m.name, "empty member (0 bytes)") for m in (sample.image, sample.lq) if m and m.size == 0]
    pixels = _pixel_damage(task, sample) if task.decode and not empty else []
    return damage + empty + pixels


def _label_damage(task: Task, sample: Sample) -> list[str]:
    if sample.cls is None:
        return ["missing member: no label"] if task.num_classes > 0 else []
    label = label_of(read_at(task.path, sample.cls.offset, min(sample.cls.size, 32)))
    if label is None:
        return ["label is not a whole number"]
    sample.label = label
    outside = 0 <= task.num_classes <= label
    return [f"label {label} is outside {task.num_classes} classes"] if outside else []


def _pixel_damage(task: Task, sample: Sample) -> list[tuple[str, str]]:
    """What is wrong with the picture and its low-quality partner, whose sides must be one whole part of its own."""
    assert sample.image is not None
    sample.pixels, damage = _size_of(task, sample.image)
    if sample.lq is None:
        return damage
    large, (small, more) = sample.pixels, _size_of(task, sample.lq)
    if large and small and large != tuple(side * (large[0] // small[0]) for side in small):
        more.append((sample.lq.name, f"{small[0]}x{small[1]} is no whole part of the image's {large[0]}x{large[1]}"))
    return damage + more


def _size_of(task: Task, member: Member) -> tuple[tuple[int, int] | None, list[tuple[str, str]]]:
    try:
        refuse_bytes(member.size, task.limits)
        return decode_image(read_at(task.path, member.offset, member.size), task.limits)[0].size, []
    except (ImageRejected, EOFError) as error:
        return None, [(member.name, str(error))]
