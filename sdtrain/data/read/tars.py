"""Plain tar shards as lists of members at byte offsets, so that a sample is one `os.pread`.

The scanner reads headers only, distrusts them, and reports damage instead of stopping at it. A shard written here is
readable by the `webdataset` package alone: members of one sample share the name up to the first dot of the base name.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from sdtrain.files import AtomicFile

BLOCK = 512
KEY_AND_EXT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
# Formats that can run code when loaded. They are named in the report and never opened.
CODE_SUFFIXES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".ckpt", ".joblib", ".dill")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard"}


@dataclass(frozen=True)
class Member:
    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        match = KEY_AND_EXT.match(self.name)
        return match[1] if match else self.name

    @property
    def ext(self) -> str:
        match = KEY_AND_EXT.match(self.name)
        return match[2].lower() if match else ""


@dataclass
class Scan:
    """Regular members in order, and what is wrong: (member name or "", reason)."""

    members: list[Member] = field(default_factory=list)
    damage: list[tuple[str, str]] = field(default_factory=list)


def scan_tar(path: str | Path) -> Scan:
    """Walk the headers of a tar. Never raises for damage; raises OSError when the file cannot be opened."""
    scan = Scan()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            scan.damage.append(("", "empty file (0 bytes)"))
            return scan
        _walk(file.fileno(), size, scan)
    if not scan.members and not scan.damage:
        scan.damage.append(("", "tar without members"))
    return scan


def _walk(fd: int, size: int, scan: Scan) -> None:
    position, long_name = 0, ""
    pax: dict[str, str] = {}
    while True:
        block = os.pread(fd, BLOCK, position)
        if block == bytes(BLOCK):
            return
        info = _header(block, position, scan)
        if info is None:
            return
        member_size = int(pax.get("size", info.size))
        start = position + BLOCK
        if start + member_size > size:
            lacking = start + member_size - size
            scan.damage.append(
                (pax.get("path") or long_name or info.name, f"truncated tar: {lacking} bytes are missing")
            )
            return
        position = start + -(-member_size // BLOCK) * BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = os.pread(fd, min(member_size, 4096), start).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            pax = _pax_records(os.pread(fd, min(member_size, 1 << 16), start)) if info.type == tarfile.XHDTYPE else {}
        else:
            _take(Member(pax.get("path") or long_name or info.name, start, member_size), info, scan)
            long_name, pax = "", {}


def _header(block: bytes, position: int, scan: Scan) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        scan.damage.append(("", _header_damage(block, position, error)))
        return None


def _header_damage(block: bytes, position: int, error: Exception) -> str:
    if position == 0:
        kind = COMPRESSED.get(block[:2])
        return f"{kind}-compressed tar: unpack it, offsets need a plain tar" if kind else "not a tar file"
    if len(block) < BLOCK:
        return f"truncated tar: no end mark at byte {position}"
    return f"damaged header at byte {position}: {error}"


def _pax_records(data: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    while data and data[:1].isdigit():
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return {name: value for name, value in records.items() if name != "size" or value.isdigit()}


def _take(member: Member, info: tarfile.TarInfo, scan: Scan) -> None:
    if info.isdir():
        return
    reason = refused_member(member.name, info)
    if reason:
        scan.damage.append((member.name.encode("utf-8", "backslashreplace").decode(), reason))
    else:
        scan.members.append(member)


def refused_member(name: str, info: tarfile.TarInfo) -> str:
    """Why a member is never read, or ""."""
    if not info.isreg():
        kind = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link"}.get(info.type, "special file")
        return f"refused: {kind} member"
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        return "refused: path leaves the shard"
    if any("\udc80" <= letter <= "\udcff" for letter in name):
        return "refused: name is not UTF-8"
    if name.lower().endswith(CODE_SUFFIXES):
        return "refused: pickle or weights member, could run code, not opened"
    return ""


class ShardWriter:
    """Writes a tar whose bytes depend on its members alone (no times, no owners); `close` makes it appear whole."""

    def __init__(self, path: Path) -> None:
        self._file = AtomicFile(path)
        self._digest = hashlib.sha256()
        self.size = 0

    def add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))

    def close(self) -> tuple[int, str]:
        """End and publish the shard; return its size and sha256."""
        self._write(bytes(2 * BLOCK))
        self._file.commit()
        return self.size, self._digest.hexdigest()

    def abandon(self) -> None:
        self._file.abandon()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
