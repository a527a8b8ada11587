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

from sdtrain.files import AtomicFile, open_regular
from sdtrain.terminal import printable

BLOCK = 512
KEY_AND_EXT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
# Formats that can run code when loaded. They are named in the report and never opened.
CODE_SUFFIXES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".ckpt", ".joblib", ".dill")
# No picture is larger: an uncompressed 16-bit RGBA of the most pixels that are accepted has half of it.
MAX_MEMBER_BYTES = 1 << 30
MAX_NAME_BYTES = 4096
MAX_PAX_BYTES = 1 << 16
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
    """Walk the headers of a tar. Never raises for damage; raises OSError when it is no file that can be opened."""
    scan = Scan()
    with open(open_regular(path), "rb") as file:
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
        start = position + BLOCK
        name = pax.get("path") or long_name or info.name
        member_size = _size_of(info, pax)
        wrong = _wrong_extent(info, member_size, size - start)
        if wrong:
            scan.damage.append((printable(name), f"{wrong} at byte {position}" if member_size is None else wrong))
            return
        assert member_size is not None
        position = start + -(-member_size // BLOCK) * BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = os.pread(fd, member_size, start).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            found = _pax_records(os.pread(fd, member_size, start))
            if found is None:
                scan.damage.append(("", f"damaged header: its attributes cannot be read at byte {start}"))
                return
            pax = found
        elif info.type != tarfile.XGLTYPE:
            _take(Member(name, start, member_size), info, pax, scan)
            long_name, pax = "", {}


def _size_of(info: tarfile.TarInfo, pax: dict[str, str]) -> int | None:
    """Bytes of a member; None for a number that is none. Only ASCII digits, few enough for any file."""
    if "size" in pax and info.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        return int(pax["size"]) if re.fullmatch("[0-9]{1,18}", pax["size"]) else None
    return info.size if info.size >= 0 else None


def _wrong_extent(info: tarfile.TarInfo, size: int | None, left: int) -> str:
    """Why what follows a header cannot be what it says, or ""."""
    if size is None:
        return "damaged header: its size is not a number of bytes"
    if size > left:
        return f"truncated tar: {size - left} bytes are missing"
    longest = {tarfile.GNUTYPE_LONGNAME: MAX_NAME_BYTES, tarfile.XHDTYPE: MAX_PAX_BYTES}.get(info.type, size)
    return f"damaged header: {size} bytes for a name or its attributes" if size > longest else ""


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


def _pax_records(data: bytes) -> dict[str, str] | None:
    """The attributes in front of a member; None when they are damaged."""
    records: dict[str, str] = {}
    while data:
        match = re.match(rb"([0-9]{1,6}) ", data)
        length = int(match[1]) if match else 0
        if match is None or not len(match[0]) < length <= len(data):
            return None
        name, _, value = data[len(match[0]) : length - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _take(member: Member, info: tarfile.TarInfo, pax: dict[str, str], scan: Scan) -> None:
    if info.isdir():
        return
    reason = refused_member(member, info, pax)
    if reason:
        scan.damage.append((printable(member.name), reason))
    else:
        scan.members.append(member)


def refused_member(member: Member, info: tarfile.TarInfo, pax: dict[str, str]) -> str:
    """Why a member is never read, or ""."""
    name = member.name
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
        return "refused: sparse member, its bytes do not lie in a row"
    if not info.isreg():
        kind = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link"}.get(info.type, "special file")
        return f"refused: {kind} member"
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        return "refused: path leaves the shard"
    if any("\udc80" <= letter <= "\udcff" for letter in name):
        return "refused: name is not UTF-8"
    if name.lower().endswith(CODE_SUFFIXES):
        return "refused: pickle or weights member, could run code, not opened"
    if member.size > MAX_MEMBER_BYTES:
        return f"refused: {member.size} bytes are more than any picture has"
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
