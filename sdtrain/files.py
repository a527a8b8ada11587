"""Files that are either absent or complete: temporary name in the same folder, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any


class AtomicFile:
    """A file that takes its name at `commit`. Its temporary name is drawn and made here, so writers never share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self._file = open(self._temporary, "xb")  # fails on whatever has that name, a link that leads away included

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def abandon(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def open_regular(path: str | Path) -> int:
    """A descriptor to read a file from. Raises OSError, also for a pipe or device, which would block or never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def sha256_of_file(path: str | Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def why_unwritable(folder: Path) -> str:
    """Why no file can be made in `folder`, which need not exist yet, or ""."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"{place} cannot be written ({error.strerror or error})"


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically; on failure nothing of it remains."""
    file = AtomicFile(path)
    try:
        file.write(data)
        file.commit()
    except BaseException:
        file.abandon()
        raise


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode())
