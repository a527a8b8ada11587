"""Tensors out of torch files without torch's loader: raw storages, checked views, the zip and the pre-1.6 container."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.interop.budget import Budget, refuse
from sdtrain.interop.pickle_machine import MALFORMED, FindGlobal, Machine, Token

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
MAX_DIMS = 16
# an end record with lies about offsets and lengths ends in any of these
DAMAGED_ZIP = (*MALFORMED, zipfile.BadZipFile, EOFError, OSError)
STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(eq=False)
class Storage:
    """A flat tensor that pickled tensors are views of."""

    data: Tensor


def storage_token(name: str) -> Token | None:
    """'torch.FloatStorage' and its like as inert tokens."""
    module, _, kind = name.rpartition(".")
    return Token(kind) if module == "torch" and kind in STORAGE_DTYPES else None


def view_of(budget: Budget, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """`_rebuild_tensor_v2`: a view [size] of a storage, every index inside it. Raises WeightsError."""
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple or len(size) > MAX_DIMS:
        raise refuse(budget.source, "describes a tensor by something else than a storage and sizes")
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise refuse(budget.source, "describes a tensor by an offset, shape and strides that are no whole numbers")
    numel, held = math.prod(size), storage.data.numel()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if numel and (numel > held or last >= held):
        raise refuse(budget.source, f"describes a tensor of shape {tuple(size)} in a storage of {held} numbers")
    budget.views(numel * storage.data.element_size())
    return storage.data.as_strided(tuple(size), tuple(stride), offset) if numel else storage.data.new_empty(size)


def storage_id(source: str, pid: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, numel) of a persistent id ('storage', type, key, location, numel[, None]). Raises WeightsError."""
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and isinstance(pid[1], Token)):
        raise refuse(source, "refers to something that is not a tensor storage")
    if len(pid) == 6 and pid[5] is not None:
        raise refuse(source, "uses views of storages, a form that torch left behind before 1.0")
    dtype = STORAGE_DTYPES.get(pid[1].name)
    if dtype is None or type(pid[2]) is not str or type(pid[4]) is not int or pid[4] < 0:
        raise refuse(source, "refers to a storage of unknown type or size")
    return dtype, pid[2], pid[4]


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """A flat tensor [len(data) / itemsize] with its own memory."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def begins_legacy(data: bytes) -> bool:
    """True for a pre-1.6 torch.save file: its first pickle is the magic number."""
    return data[:1] == b"\x80" and MAGIC.to_bytes(10, "little") in data[:20]


class LegacyReader:
    """A pre-1.6 torch.save stream: four pickles, the list of storage keys, then each storage's length and numbers."""

    def __init__(self, budget: Budget, data: bytes, find: FindGlobal, inside: str = ""):
        """`inside` says in messages where in the file this stream is."""
        self.budget, self.source, self.find, self.stream = budget, budget.source + inside, find, io.BytesIO(data)
        self.left = len(data)
        self.storages: dict[str, Storage] = {}

    def load(self) -> tuple[Any, set[str]]:
        """(object, globals it named). Raises WeightsError for a file that is damaged or hostile."""
        if self._plain() != MAGIC or self._plain() != PROTOCOL:
            raise refuse(self.source, "is not a torch file of a known version")
        info = self._plain()
        if isinstance(info, dict) and info.get("little_endian") is False:
            raise refuse(self.source, "was written on a big-endian machine")
        machine = Machine(self.budget, self.find, self._storage)
        tree = machine.load(self.stream)
        keys = self._plain()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*self.storages}:
            raise refuse(self.source, "lists other storages than it uses")
        for key in keys:
            self._fill(self.storages[key])
        return tree, machine.globals

    def _plain(self) -> Any:
        return Machine(self.budget, lambda name: None).load(self.stream)

    def _storage(self, pid: Any) -> Storage:
        dtype, key, numel = storage_id(self.source, pid)
        if key not in self.storages:
            self.left -= numel * dtype.itemsize
            if self.left < 0:
                raise refuse(self.source, "is truncated, or declares more data than it holds")
            self.storages[key] = Storage(torch.empty(numel, dtype=dtype))
        return self.storages[key]

    def _fill(self, storage: Storage) -> None:
        head = self.stream.read(8)
        if len(head) < 8 or struct.unpack("<q", head)[0] != storage.data.numel():
            raise refuse(self.source, "is truncated, or a storage has another length than declared")
        raw = self.stream.read(storage.data.numel() * storage.data.element_size())
        if len(raw) < storage.data.numel() * storage.data.element_size():
            raise refuse(self.source, "is truncated inside its tensors")
        storage.data.copy_(from_bytes(raw, storage.data.dtype))


# what a TorchScript archive holds beside its tensors
PROGRAM = ("code", "constants", "constants.pkl", "traced_inputs", "traced_inputs.pkl", "extra")


def checked_members(
    source: str, archive: zipfile.ZipFile, total_bytes: int, script: bool = False
) -> dict[str, zipfile.ZipInfo]:
    """Members by name below the archive's one folder. Raises WeightsError for compressed ones: torch makes none.

    Of a TorchScript archive (`script`) the program is left out; without `script` there must be none.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in info.filename
            or ":" in info.filename
            or len(path.parts) < 2
        ):
            raise refuse(source, f"is a zip with the member {info.filename!r}, which points outside")
        name = str(PurePosixPath(*path.parts[1:]))
        if script and path.parts[1] in PROGRAM:
            continue
        if name == "constants.pkl" or path.parts[1] == "code":
            raise refuse(source, f"is a TorchScript archive, a program and not a state dict (member {info.filename!r})")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise refuse(
                source, f"is a zip whose member {info.filename!r} is compressed or encrypted; torch writes neither"
            )
        if name in members:
            raise refuse(source, f"is a zip that has {info.filename!r} twice")
        roots.add(path.parts[0])
        members[name] = info
    if len(roots) != 1 or "data.pkl" not in members:
        raise refuse(source, "is a zip, but not a torch file (no data.pkl in its one folder)")
    if sum(info.file_size for info in members.values()) > total_bytes:
        raise refuse(source, "is a zip whose members are larger than the file itself")
    return members


class ZipReader:
    """A torch.save zip: data.pkl, and one uncompressed member data/KEY per storage."""

    def __init__(self, budget: Budget, data: bytes, find: FindGlobal, script: bool = False):
        """Raises WeightsError for a zip that is damaged, not torch's, or a program unless `script` is set."""
        self.budget, self.source, self.find = budget, budget.source, find
        try:
            self.archive = zipfile.ZipFile(io.BytesIO(data))
            self.members = checked_members(self.source, self.archive, len(data), script)
        except WeightsError:
            raise
        except DAMAGED_ZIP as error:
            raise refuse(self.source, f"is a damaged zip ({error})") from error
        self.storages: dict[str, Storage] = {}

    def load(self) -> tuple[Any, set[str]]:
        """(object, globals it named). Raises WeightsError for a file that is damaged or hostile."""
        if "byteorder" in self.members and self._read("byteorder") != b"little":
            raise refuse(self.source, "was written on a big-endian machine")
        machine = Machine(self.budget, self.find, self._storage)
        return machine.load(io.BytesIO(self._read("data.pkl"))), machine.globals

    def _read(self, name: str) -> bytes:
        try:
            return self.archive.read(self.members[name])
        except DAMAGED_ZIP as error:
            raise refuse(self.source, f"is a damaged or truncated zip (member {name!r})") from error

    def _storage(self, pid: Any) -> Storage:
        dtype, key, numel = storage_id(self.source, pid)
        if key not in self.storages:
            data = self._read(f"data/{key}")
            if len(data) != numel * dtype.itemsize:
                raise refuse(self.source, f"declares {numel} numbers for storage {key!r}, which has {len(data)} bytes")
            self.storages[key] = Storage(from_bytes(data, dtype))
        return self.storages[key]
