"""What shards, manifest and index of one data set say of each other, where a run believes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtrain.data.read.index import INDEX_NAME, Index, Sample, load_index
from sdtrain.data.read.manifest import MANIFEST_NAME, hash_of
from sdtrain.errors import DataError

Finding = tuple[str, str, str]  # shard or file, member or "", reason
REINDEX = "run: sdtrain pack --reindex"


def manifest_findings(manifest: dict[str, Any]) -> list[Finding]:
    """Where a manifest contradicts itself."""
    shards = manifest["shards"]
    names = [shard["name"] for shard in shards]
    total = sum(shard["count"] for shard in shards)
    found = [f"{name} is listed twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if hash_of(shards) != manifest["hash"]:
        found.append("its hash is not that of the digests it lists")
    if manifest.get("count") != total:
        found.append(f"it counts {manifest.get('count')} images, its shards {total}")
    return [(MANIFEST_NAME, "", f"{reason}; {REINDEX}") for reason in found]


def index_findings(
    folder: Path, manifest: dict[str, Any], shards: dict[str, list[Sample]], sizes: dict[str, int]
) -> list[Finding]:
    """The index must say what undamaged tars say, or training reads the wrong bytes."""
    try:
        index = load_index(folder / INDEX_NAME)
    except DataError as error:
        return [(INDEX_NAME, "", str(error))]
    listed = [shard["name"] for shard in manifest["shards"]]
    number = {name: n for n, name in enumerate(index.shards.tolist())}
    strangers = number.keys() - set(listed)
    findings = [(INDEX_NAME, name, f"shard is listed, but not in the manifest; {REINDEX}") for name in strangers]
    if not findings and listed != index.shards.tolist():
        findings.append((INDEX_NAME, "", f"it lists other shards than the manifest, or in another order; {REINDEX}"))
    wrong_sizes = [
        (INDEX_NAME, name, f"it says that the shard has {size} bytes, the shard has {actual}; {REINDEX}")
        for name, size in zip(index.shards.tolist(), index.shard_sizes.tolist(), strict=True)
        if size != (actual := sizes.get(name, size))
    ]
    told = {name for _, name, _ in wrong_sizes}
    return [*findings, *wrong_sizes] + [
        (INDEX_NAME, name, f"index differs from the shard; {REINDEX}")
        for name, found in shards.items()
        if name not in number or name not in told and not _same_rows(index, number[name], found)
    ]


def _same_rows(index: Index, shard: int, samples: list[Sample]) -> bool:
    mine = (index.shard == shard).nonzero()[0]
    columns = (index.offset, index.size, index.label, index.lq_offset, index.lq_size)
    rows = list(zip(*(column[mine].tolist() for column in columns), strict=True))
    keys = [index.key(int(i)) for i in mine]
    return keys == [sample.key for sample in samples] and rows == [_row(sample) for sample in samples]


def _row(sample: Sample) -> tuple[int, ...]:
    assert sample.image is not None
    lq = (sample.lq.offset, sample.lq.size) if sample.lq else (0, 0)
    return (sample.image.offset, sample.image.size, sample.label, *lq)


def size_findings(samples: Sequence[tuple[str, Sample]], side: int) -> list[Finding]:
    """Decoded images that are no squares of `side`."""
    return [
        (shard, sample.image.name, f"wrong resolution: {sample.pixels[0]}x{sample.pixels[1]}, not {side}x{side}")
        for shard, sample in samples
        if sample.image and sample.pixels and sample.pixels != (side, side)
    ]


def findings_between(samples: Sequence[tuple[str, Sample]], *, bounded: bool) -> list[Finding]:
    """Samples that do not go together: (shard, sample) each. `bounded`: no table of classes says what labels may be."""
    owner: dict[str, str] = {}
    findings = []
    labelled = any(sample.label >= 0 for _, sample in samples)
    paired = any(sample.lq for _, sample in samples)
    for shard, sample in samples:
        first = owner.setdefault(sample.key, shard)
        if first != shard:
            findings.append((shard, sample.key, f"duplicate key: also in {first}"))
        if paired and sample.lq is None:
            findings.append((shard, sample.key, "missing member: no low-quality partner, unlike others"))
        if bounded and labelled and sample.cls is None:
            findings.append((shard, sample.key, "missing member: no label, unlike others"))
        if bounded and sample.label >= len(samples):
            findings.append((shard, sample.key, f"label {sample.label} means more classes than samples"))
    return findings
