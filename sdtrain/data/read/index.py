"""The list of samples of a data set: which bytes of which shard, and the label. Arrays only, so 100,000 load at once.

index.npz    shards, shard_sizes, keys (one blob and its cuts), shard, offset, size, label, lq_offset, lq_size
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdtrain.data.read.budget import INDEX_BYTES
from sdtrain.data.read.tars import Member, scan_tar
from sdtrain.errors import DataError
from sdtrain.files import open_regular, write_bytes
from sdtrain.terminal import printable

IMAGE_EXTS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm")
INDEX_NAME = "index.npz"
TYPES = {"shard_sizes": "i8", "key_bytes": "u1", "key_ends": "i8", "shard": "i4", "offset": "i8", "size": "i8"}
TYPES |= {"label": "i4", "lq_offset": "i8", "lq_size": "i8"}
FIELDS = ("shards", *TYPES)


@dataclass(frozen=True)
class Index:
    """Row i is sample i. `label` is -1 without one; `lq_size` is 0 without a low-quality partner."""

    shards: np.ndarray
    shard_sizes: np.ndarray
    key_bytes: np.ndarray
    key_ends: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    lq_offset: np.ndarray
    lq_size: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, i: int) -> str:
        start = int(self.key_ends[i - 1]) if i else 0
        return self.key_bytes[start : int(self.key_ends[i])].tobytes().decode("utf-8", "replace")

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in FIELDS})
        write_bytes(path, buffer.getbuffer())


def load_index(path: Path) -> Index:
    """Raises DataError when the file is damaged, of another kind, or points outside the shards it lists."""
    try:
        with open(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
            index = Index(**_arrays(archive))
        wrong = _inconsistency(index)
        if wrong:
            raise ValueError(wrong)
    except Exception as error:  # zipfile and numpy raise many types on hostile bytes; every one means "unusable file"
        raise DataError(
            f"{path} is not a usable index ({printable(str(error))[:200]}); rebuild it with: sdtrain pack --reindex "
            f"{path.parent}"
        ) from None
    return index


def _arrays(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    entries = [archive.getinfo(f"{name}.npy") for name in FIELDS]
    # A small compressed file can unfold to any size; ours are stored as they are.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its arrays are compressed")
    if sum(entry.file_size for entry in entries) > INDEX_BYTES:
        raise ValueError(f"more than {INDEX_BYTES >> 20} MB")
    return {name: _array(archive.read(entry)) for name, entry in zip(FIELDS, entries, strict=True)}


def _array(data: bytes) -> np.ndarray:
    """The array of a .npy file, as a view: its shape and type must be those of the bytes that follow the header."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.kind not in "iuU":
        raise ValueError("an array is of another type")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def _inconsistency(index: Index) -> str:
    """What makes the arrays no index, or ""."""
    rows = ("shard", "offset", "size", "label", "lq_offset", "lq_size")
    index.shards.tolist()  # characters that there are, or ValueError
    kinds = [getattr(index, name).dtype == kind for name, kind in TYPES.items()] + [index.shards.dtype.kind == "U"]
    if not all(kinds) or any(getattr(index, name).ndim != 1 for name in FIELDS):
        return "an array is of another type"
    lengths = {len(getattr(index, name)) for name in (*rows, "key_ends")}
    if len(lengths) > 1 or len(index.shards) != len(index.shard_sizes):
        return "arrays differ in length"
    ends = np.concatenate([[0], index.key_ends, [len(index.key_bytes)]])
    if (ends[1:] < ends[:-1]).any() or (len(index) and ends[-2] != ends[-1]):
        return "the cuts between keys are wrong"
    if len(index) and not (0 <= index.shard.min() and index.shard.max() < len(index.shards)):
        return "a sample lies in a shard that is not listed"
    room = index.shard_sizes[index.shard].astype(np.int64)
    for offset, size in ((index.offset, index.size), (index.lq_offset, index.lq_size)):
        if ((offset < 0) | (size < 0) | (offset > room) | (size > room - offset)).any():
            return "a sample lies outside its shard"
    return "a label is negative" if (index.label < -1).any() else ""


@dataclass
class Sample:
    """One sample of a scanned shard."""

    key: str
    image: Member | None = None
    lq: Member | None = None
    cls: Member | None = None
    label: int = -1
    pixels: tuple[int, int] | None = None  # width and height of the image, where it was decoded


def samples_of(members: Sequence[Member], damage: list[tuple[str, str]]) -> list[Sample]:
    """Group members by key, in order; duplicate keys and samples without an image go to `damage`."""
    found: dict[str, Sample] = {}
    for member in members:
        sample = found.setdefault(member.key, Sample(member.key))
        role = _role(member.ext)
        if role and getattr(sample, role) is not None:
            damage.append((member.name, f"duplicate key {member.key!r}"))
        elif role:
            setattr(sample, role, member)
    damage.extend((s.key, "missing member: no image") for s in found.values() if s.image is None)
    return [s for s in found.values() if s.image is not None]


def _role(ext: str) -> str:
    if ext == "cls":
        return "cls"
    first, _, last = ext.rpartition(".")
    if last not in IMAGE_EXTS:
        return ""
    return {"": "image", "lq": "lq"}.get(first, "")


def build_index(paths: Sequence[str | Path], names: Sequence[str]) -> tuple[Index, list[tuple[str, str, str]]]:
    """Index shards by their headers alone. Returns it with the damage: (shard, member, reason)."""
    rows: list[tuple[int, ...]] = []
    keys: list[bytes] = []
    damage: list[tuple[str, str, str]] = []
    sizes: list[int] = []
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        try:
            scan = scan_tar(path)
            samples = samples_of(scan.members, scan.damage)
            with open(open_regular(path), "rb") as file:
                made = [_row(number, sample, file.fileno(), scan.damage) for sample in samples]
                sizes.append(os.fstat(file.fileno()).st_size)
        except OSError as error:
            damage.append((name, "", f"cannot be read: {error.strerror or error}"))
            sizes.append(0)
            continue
        rows.extend(made)
        keys.extend(sample.key.encode() for sample in samples)
        damage.extend((name, member, reason) for member, reason in scan.damage)
    return _index_of(names, sizes, keys, rows), damage


def _row(number: int, sample: Sample, fd: int, damage: list[tuple[str, str]]) -> tuple[int, ...]:
    assert sample.image is not None
    lq = (sample.lq.offset, sample.lq.size) if sample.lq else (0, 0)
    return (number, sample.image.offset, sample.image.size, _label(sample, fd, damage), *lq)


def _label(sample: Sample, fd: int, damage: list[tuple[str, str]]) -> int:
    if sample.cls is None:
        return -1
    label = label_of(os.pread(fd, min(sample.cls.size, 32), sample.cls.offset))
    if label is None:
        damage.append((sample.cls.name, "label is not a whole number"))
    return -1 if label is None else label


def label_of(text: bytes) -> int | None:
    """The class that a `.cls` member names: ASCII digits of a number below 2^31; None for anything else."""
    text = text.strip()
    return int(text) if text.isdigit() and int(text) < 1 << 31 else None


def _index_of(names: Sequence[str], sizes: Sequence[int], keys: list[bytes], rows: list[tuple[int, ...]]) -> Index:
    columns = np.array(rows, np.int64).reshape(-1, 6)
    return Index(
        shards=np.array(list(names), dtype=np.str_),
        shard_sizes=np.array(sizes, np.int64),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        shard=columns[:, 0].astype(np.int32),
        offset=columns[:, 1].copy(),
        size=columns[:, 2].copy(),
        label=columns[:, 3].astype(np.int32),
        lq_offset=columns[:, 4].copy(),
        lq_size=columns[:, 5].copy(),
    )
