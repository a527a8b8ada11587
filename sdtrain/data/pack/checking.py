"""What `sdtrain verify` looks for: digests, tar structure, forbidden members, pixels that do not decode."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sdtrain.data.pack.packing import start_worker
from sdtrain.data.read.dataset import MANIFEST_NAME, expand, read_at, read_manifest
from sdtrain.data.read.images import ImageRejected, decode_image
from sdtrain.data.read.index import INDEX_NAME, Index, Sample, load_index, samples_of
from sdtrain.data.read.tars import Member, scan_tar
from sdtrain.errors import DataError
from sdtrain.files import sha256_of_file

Finding = tuple[str, str, str]


@dataclass(frozen=True)
class Task:
    """One shard to look at; an empty digest, a zero resolution and count -1 are not checked."""

    path: str
    sha256: str = ""
    resolution: int = 0
    count: int = -1
    num_classes: int = -1
    decode: bool = True

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def check_source(source: str, *, resolution: int, decode: bool, workers: int) -> tuple[list[Finding], dict[str, Any]]:
    """All findings (shard, member, reason) of a packed folder or a pattern. Raises DataError when nothing matches."""
    folder = Path(source)
    packed = (folder / MANIFEST_NAME).is_file()
    tasks, findings = (
        _packed_tasks(folder, resolution, decode) if packed else (_loose_tasks(source, resolution, decode), [])
    )
    results = _run(tasks, workers)
    for _, found in results:
        findings.extend(found)
    if packed:
        whole = {task.name: samples for task, (samples, found) in zip(tasks, results, strict=True) if not found}
        findings.extend(_index_findings(folder, whole))
    else:
        findings.extend(_keys_in_two_shards(tasks, [samples for samples, _ in results]))
    num_samples = sum(len(samples) for samples, _ in results)
    return _worst_first(findings), {"source": source, "num_shards": len(tasks), "num_samples": num_samples}


def totals(findings: list[Finding]) -> list[tuple[str, int]]:
    """Damaged places a shard, worst first."""
    return sorted(Counter(shard for shard, _, _ in findings).items(), key=lambda item: (-item[1], item[0]))


def _worst_first(findings: list[Finding]) -> list[Finding]:
    rank = {shard: place for place, (shard, _) in enumerate(totals(findings))}
    return sorted(dict.fromkeys(findings), key=lambda finding: rank[finding[0]])


def _packed_tasks(folder: Path, resolution: int, decode: bool) -> tuple[list[Task], list[Finding]]:
    manifest = read_manifest(folder)
    side = resolution or manifest.get("resolution") or 0
    num_classes = len(manifest.get("label_names", ()))
    tasks, findings = [], []
    for shard in manifest["shards"]:
        path = folder / os.path.basename(shard["name"])
        if path.is_file():
            tasks.append(Task(str(path), shard["sha256"], side, shard["count"], num_classes, decode))
        else:
            findings.append((path.name, "", "missing shard"))
    listed = {os.path.basename(shard["name"]) for shard in manifest["shards"]}
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    findings.extend((name, "", "not in the manifest") for name in strangers)
    return tasks, findings


def _loose_tasks(source: str, resolution: int, decode: bool) -> list[Task]:
    return [Task(path, resolution=resolution, decode=decode) for path in expand(source)]


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
    damage = [(sample.key, reason) for reason in _label_damage(task, sample)]
    if task.decode:
        assert sample.image is not None
        damage.extend((sample.image.name, reason) for reason in _image_damage(task, sample.image, task.resolution))
        if sample.lq is not None:
            damage.extend((sample.lq.name, reason) for reason in _image_damage(task, sample.lq, 0))
    return damage


def _label_damage(task: Task, sample: Sample) -> list[str]:
    if sample.cls is None:
        return ["missing member: no label"] if task.num_classes > 0 else []
    text = read_at(task.path, sample.cls.offset, min(sample.cls.size, 32)).strip()
    if not text.isdigit():
        return ["label is not a whole number"]
    outside = 0 <= task.num_classes <= int(text)
    return [f"label {int(text)} is outside {task.num_classes} classes"] if outside else []


def _image_damage(task: Task, member: Member, resolution: int) -> list[str]:
    try:
        image, _ = decode_image(read_at(task.path, member.offset, member.size))
    except (ImageRejected, EOFError) as error:
        return [str(error)]
    if resolution and image.size != (resolution, resolution):
        return [f"wrong resolution: {image.width}x{image.height}, not {resolution}x{resolution}"]
    return []


def _index_findings(folder: Path, shards: dict[str, list[Sample]]) -> list[Finding]:
    """The index must say what undamaged tars say, or training reads the wrong bytes."""
    try:
        index = load_index(folder / INDEX_NAME)
    except DataError as error:
        return [(INDEX_NAME, "", str(error))]
    number = {name: n for n, name in enumerate(index.shards.tolist())}
    return [
        (INDEX_NAME, name, "index differs from the shard; run: sdtrain pack --reindex")
        for name, found in shards.items()
        if name not in number or not _same_rows(index, number[name], found)
    ]


def _same_rows(index: Index, shard: int, samples: list[Sample]) -> bool:
    mine = index.shard == shard
    rows = list(zip(index.offset[mine].tolist(), index.size[mine].tolist(), strict=True))
    return rows == [(s.image.offset, s.image.size) for s in samples if s.image is not None]


def _keys_in_two_shards(tasks: list[Task], samples: list[list[Sample]]) -> list[Finding]:
    owner: dict[str, str] = {}
    findings = []
    for task, found in zip(tasks, samples, strict=True):
        for sample in found:
            first = owner.setdefault(sample.key, task.name)
            if first != task.name:
                findings.append((task.name, sample.key, f"duplicate key: also in {first}"))
    return findings
