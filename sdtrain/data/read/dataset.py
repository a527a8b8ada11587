"""Open shards as a data set: number of samples, labels, resolution, hash. Free of torch.

A source is a folder made by `sdtrain pack`, a glob or brace pattern of tars, an address of either (http, s3), a command
where commands are allowed (pipe), or a list of those. Shards without an index are indexed by their
headers; the index is kept beside them or in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdtrain.data.read import remote
from sdtrain.data.read.budget import INDEX_BYTES, LIMITS, PictureLimits
from sdtrain.data.read.images import ImageRejected, decode_image, refuse_bytes
from sdtrain.data.read.index import INDEX_NAME, Index, build_index, load_index
from sdtrain.data.read.manifest import MANIFEST_NAME, read_manifest
from sdtrain.data.read.patterns import expand
from sdtrain.errors import DataError
from sdtrain.files import MAX_JSON, Stamp, open_regular, patiently, stamp_of
from sdtrain.terminal import printable

PROBES = 8


@dataclass(frozen=True)
class Dataset:
    """Samples addressed by number. `damage` lists (shard, member, reason) known from headers and sizes."""

    source: str
    shards: tuple[str, ...]
    index: Index
    resolution: int | None
    label_names: tuple[str, ...]
    hash: str
    cache: Path
    sha256: tuple[str, ...] = ()
    damage: tuple[tuple[str, str, str], ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    allow_pipe: bool = False
    limits: PictureLimits = LIMITS

    @property
    def num_samples(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        return len(self.label_names)

    @property
    def class_counts(self) -> list[int]:
        """Samples of each class; empty without labels."""
        return np.bincount(self.index.label, minlength=self.num_classes).tolist() if self.num_classes else []

    @property
    def paired(self) -> bool:
        """True when every sample has a low-quality partner (`KEY.lq.png`)."""
        return len(self.index) > 0 and bool((self.index.lq_size > 0).all())

    def locate(self, i: int) -> tuple[str, str]:
        """(shard, key) of a sample, as named in reports: on one line each."""
        return printable(os.path.basename(self.shards[self.index.shard[i]])), printable(self.index.key(i))

    def local_path(self, shard: int) -> Path:
        """The shard as a local file, fetched when it is remote."""
        url = self.shards[shard]
        if remote.is_remote(url):
            digest = self.sha256[shard] if self.sha256 else ""
            most = int(self.index.shard_sizes[shard])
            return remote.fetch(url, self.cache, digest, allow_pipe=self.allow_pipe, most=most)
        return Path(url)

    def read(self, i: int, *, lq: bool = False) -> bytes:
        """The stored bytes of sample i's image, or of its partner.

        Raises OSError, EOFError when the shard is too short, ImageRejected when they are too many, DataError.
        """
        offset, size = (self.index.lq_offset, self.index.lq_size) if lq else (self.index.offset, self.index.size)
        refuse_bytes(int(size[i]), self.limits)
        path = self.local_path(int(self.index.shard[i]))
        return patiently(lambda: read_at(path, int(offset[i]), int(size[i])))

    @cached_property
    def stamps(self) -> list[Stamp]:
        """Of each shard its size and time as they are when this is first asked; (-1, 0) of one that is no file here."""
        return [(-1, 0) if remote.is_remote(url) else stamp_of(url) for url in self.shards]

    def describe(self) -> str:
        size = f"{self.resolution} px" if self.resolution else "mixed sizes"
        labels = f", {self.num_classes} classes" if self.num_classes else ""
        hurt = f", {len(self.damage)} damaged places (run: sdtrain verify {self.source})" if self.damage else ""
        shards = f"{len(self.shards)} shards, {self.hash[:12]}"
        return f"{self.source}: {self.num_samples} images, {size}{labels}, {shards}{hurt}"


def read_at(path: str | Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on. Raises OSError, or EOFError when it is too short."""
    fd = open_regular(path)
    try:
        data = os.pread(fd, size, offset)
    finally:
        os.close(fd)
    if len(data) < size:
        raise EOFError(f"shard ends {size - len(data)} bytes too early")
    return data


def open_dataset(
    source: str | Path | Sequence[str],
    cache: str | Path | None = None,
    keep_index: bool = True,
    *,
    allow_pipe: bool = False,
    limits: PictureLimits = LIMITS,
) -> Dataset:
    """Open a source. Raises DataError when nothing matches, nothing is usable, an index is stale or a label too large.

    Nothing is written with `keep_index=False`, except what must be fetched. `allow_pipe` lets `pipe:` run its command.
    `limits` are what one picture may cost, here and wherever the data set is read.
    """
    sources = [str(source)] if isinstance(source, (str, Path)) else [str(s) for s in source]
    cache_dir = Path(cache) if cache else remote.default_cache()
    parts = [_open_one(s, cache_dir, keep_index, allow_pipe, limits) for s in sources]
    if not parts:
        raise DataError("the list of data sources is empty; name a packed folder or a pattern of tars")
    dataset = parts[0] if len(parts) == 1 else _join(parts)
    refuse_empty(dataset)
    return replace(dataset, allow_pipe=allow_pipe, limits=limits)


def reading(data: Any) -> dict[str, Any]:
    """How `open_dataset` opens a source of a run: the options under `data` of its configuration."""
    limits = PictureLimits(megabytes=data.max_image_mb)
    return {"cache": data.cache, "allow_pipe": data.allow_pipe, "limits": limits}


def refuse_empty(dataset: Dataset) -> None:
    """Raise DataError for a data set without a usable sample."""
    if dataset.num_samples == 0:
        why = "; ".join(f"{shard}: {reason}" for shard, _, reason in dataset.damage[:3]) or "the shards hold no images"
        raise DataError(f"{dataset.source} has no usable sample ({why}); run: sdtrain verify {dataset.source}")


def _open_one(source: str, cache: Path, keep_index: bool, allow_pipe: bool, limits: PictureLimits) -> Dataset:
    if folder := packed_folder(source, cache):
        return _open_packed(source, folder, cache)
    shards = expand(source)
    index, damage = _loose_index(shards, cache, keep_index, allow_pipe)
    return dataset_of(source, shards, index, damage, cache, allow_pipe, limits)


def packed_folder(source: str, cache: Path) -> Path | None:
    """Where manifest and index of a packed source lie, fetched when it is remote; None for a pattern of tars."""
    if remote.is_remote_folder(source):
        remote.fetch(source + INDEX_NAME, cache, most=INDEX_BYTES)
        return remote.fetch(source + MANIFEST_NAME, cache, most=MAX_JSON).parent
    return Path(source) if (Path(source) / MANIFEST_NAME).is_file() else None


def _open_packed(source: str, folder: Path, cache: Path) -> Dataset:
    """A source whose manifest and index lie in `folder`."""
    manifest = read_manifest(folder)
    if not (folder / INDEX_NAME).exists():
        raise DataError(
            f"{folder} has a manifest but no {INDEX_NAME}; rebuild it with: sdtrain pack --reindex {folder}"
        )
    index = load_index(folder / INDEX_NAME)
    names = [shard["name"] for shard in manifest["shards"]]
    if names != index.shards.tolist():
        raise DataError(
            f"{folder / INDEX_NAME} lists other shards than the manifest; run: sdtrain pack --reindex {folder}"
        )
    shards = [os.path.join(source, name) for name in names]
    dataset = Dataset(
        source=source,
        shards=tuple(shards),
        index=index,
        resolution=manifest["resolution"],
        label_names=tuple(manifest["label_names"]),
        hash=manifest["hash"],
        cache=cache,
        sha256=tuple(shard["sha256"] for shard in manifest["shards"]),
        damage=tuple(size_damage(shards, index)),
        manifest=manifest,
    )
    return _with_labels_below(dataset, len(dataset.label_names), "classes in the manifest")


def _with_labels_below(dataset: Dataset, limit: int, of_what: str) -> Dataset:
    """The data set itself. Raises DataError for a label that no class or table of classes can have."""
    labels = dataset.index.label
    if limit and len(labels) and labels.max() >= limit:
        shard, key = dataset.locate(int(labels.argmax()))
        raise DataError(
            f"sample {key} in {shard} has the label {labels.max()}, with {limit} {of_what}; labels count from 0, "
            f"run: sdtrain verify {dataset.source}"
        )
    return dataset


def size_damage(shards: Sequence[str], index: Index) -> list[tuple[str, str, str]]:
    """Shards whose files are shorter than their index says, or not there. Raises DataError for one that is longer."""
    damage = []
    for path, expected in zip(shards, index.shard_sizes.tolist(), strict=True):
        if remote.is_remote(path):
            continue
        size = os.path.getsize(path) if os.path.isfile(path) else -1 - os.path.exists(path)
        if size > expected:
            raise DataError(
                f"{path} has {size} bytes, its index says {expected}: the index is stale; run: sdtrain pack --reindex"
            )
        if size != expected:
            reason = {-1: "missing shard", -2: "cannot be read: not a regular file"}.get(size)
            damage.append((os.path.basename(path), "", reason or f"truncated tar: {expected - size} bytes are missing"))
    return damage


def dataset_of(
    source: str,
    shards: list[str],
    index: Index,
    damage: list[tuple[str, str, str]],
    cache: Path,
    allow_pipe: bool = False,
    limits: PictureLimits = LIMITS,
) -> Dataset:
    """Shards without a manifest: the resolution is that of the first images. Raises DataError for a label too large."""
    dataset = Dataset(
        source=source,
        shards=tuple(shards),
        index=index,
        resolution=None,
        label_names=(),
        hash=_content_hash(index),
        cache=cache,
        damage=tuple(damage),
        allow_pipe=allow_pipe,
        limits=limits,
    )
    _with_labels_below(dataset, len(index), "samples, more classes than samples")
    num_classes = int(index.label.max(initial=-1)) + 1
    names = tuple(str(c) for c in range(num_classes))
    return replace(dataset, resolution=_probed_resolution(dataset), label_names=names)


def _loose_index(
    shards: list[str], cache: Path, keep_index: bool, allow_pipe: bool
) -> tuple[Index, list[tuple[str, str, str]]]:
    paths = [remote.fetch(s, cache, allow_pipe=allow_pipe) if remote.is_remote(s) else Path(s) for s in shards]
    places, names = _index_places(paths, cache), [os.path.basename(s) for s in shards]
    for kept in places:
        with contextlib.suppress(DataError):  # a damaged one is made again
            if kept.is_file() and (index := load_index(kept)).shards.tolist() == names:
                return index, []
    index, damage = build_index(paths, names)
    if keep_index and not damage:
        _keep_index(index, places)
    return index, damage


def _index_places(paths: list[Path], cache: Path) -> list[Path]:
    """Beside the shards, else in the cache. The name changes with any shard, so a stale index is never found."""
    state = [(str(p.resolve()), *stamp_of(p)) for p in paths]
    stamp = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return [paths[0].parent / f".index-{stamp}.npz", cache / f"index-{stamp}.npz"]


def _keep_index(index: Index, places: list[Path]) -> None:
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return index.save(path)
        except OSError:
            continue  # a read-only place; the next one, or scanning again at the next start, serves as well


def _content_hash(index: Index) -> str:
    digest = hashlib.sha256()
    for name in ("key_bytes", "key_ends", "shard", "offset", "size", "label"):
        digest.update(np.ascontiguousarray(getattr(index, name)).tobytes())
    return digest.hexdigest()


def _probed_resolution(dataset: Dataset) -> int | None:
    """The side of the first few images when they are square and agree."""
    sizes = []
    for i in range(min(PROBES, dataset.num_samples)):
        try:
            sizes.append(decode_image(dataset.read(i), dataset.limits)[0].size)
        except (OSError, EOFError, ImageRejected, DataError):
            continue
    return common_side(sizes)


def common_side(sizes: Iterable[tuple[int, int]]) -> int | None:
    """The side of pictures (width, height) that are all square and of one size."""
    found = set(sizes)
    width, height = found.pop() if len(found) == 1 else (0, 1)
    return width if width == height else None


def _join(parts: list[Dataset]) -> Dataset:
    """Several sources behind one another; labels must mean the same."""
    _agree_on_classes(parts)
    resolutions = {part.resolution for part in parts}
    return Dataset(
        source=", ".join(part.source for part in parts),
        shards=tuple(shard for part in parts for shard in part.shards),
        index=_join_indexes([part.index for part in parts]),
        resolution=resolutions.pop() if len(resolutions) == 1 else None,
        label_names=next((part.label_names for part in parts if part.manifest), parts[0].label_names),
        hash=hashlib.sha256("".join(part.hash for part in parts).encode()).hexdigest(),
        cache=parts[0].cache,
        sha256=tuple(s for part in parts for s in (part.sha256 or ("",) * len(part.shards))),
        damage=tuple(d for part in parts for d in part.damage),
    )


def _agree_on_classes(parts: list[Dataset]) -> None:
    counts = [part.num_classes for part in parts]
    if len(set(counts)) > 1:
        raise DataError(f"sources disagree about their classes ({counts} of them); pack them together instead")
    names = {part.label_names for part in parts if part.manifest}
    if len(names) > 1:
        raise DataError(
            f"sources disagree about the names of their classes ({sorted(names)}); pack them together instead"
        )


def _join_indexes(indexes: list[Index]) -> Index:
    shard_starts = np.cumsum([0] + [len(i.shards) for i in indexes])
    byte_starts = np.cumsum([0] + [len(i.key_bytes) for i in indexes])
    joined = {name: np.concatenate([getattr(i, name) for i in indexes]) for name in Index.__dataclass_fields__}
    joined["shard"] = np.concatenate(
        [i.shard + np.int32(start) for i, start in zip(indexes, shard_starts, strict=False)]
    )
    joined["key_ends"] = np.concatenate([i.key_ends + start for i, start in zip(indexes, byte_starts, strict=False)])
    return Index(**joined)
