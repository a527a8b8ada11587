"""Files that are either absent or complete.

    FOLDER/.<random>.tmp   while it is written: created anew, synced, renamed, then the folder is synced
    FOLDER/NAME            the old content or the new one, never a part

What a killed writer leaves behind is its .tmp, which `sweep` removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import secrets
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
MAX_JSON, MAX_ITEMS = 1 << 26, 4_000_000  # bytes of a file; commas and brackets in it, each of up to 100 bytes
MAX_ROW = 1 << 20  # bytes of a line; what we write is far below
Stamp = tuple[int, int]
T = TypeVar("T")
PAUSES_SEC = (0.1, 0.4, 1.6, 4.0)  # what a network file system may take to come back
CERTAIN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ELOOP)
_passed: dict[str, int] = {}  # how often each boundary has been crossed, counted only in fault tests


def cache_root() -> Path:
    """What can be made again: SDTRAIN_CACHE, or ~/.cache/sdtrain."""
    return Path(os.environ.get("SDTRAIN_CACHE", Path.home() / ".cache" / "sdtrain"))


def in_package(package: str, file: str) -> Path | None:
    """The path of a file of an installed package, which is not imported; None where it is not installed."""
    found = importlib.util.find_spec(package)
    folders = found.submodule_search_locations if found else None
    return Path(folders[0]) / file if folders else None


def fault_point(name: str) -> None:
    """Be killed where SDTRAIN_FAULT asks for it: `NAME`, or `NAME@3` for the third time. Nothing in a normal run."""
    wanted, _, time = os.environ.get("SDTRAIN_FAULT", "").partition("@")
    if wanted == name:
        _passed[name] = _passed.get(name, 0) + 1
        if _passed[name] == int(time or 1):
            os.kill(os.getpid(), signal.SIGKILL)


class AtomicFile:
    """A file that takes its name at `commit`; leaving a `with` block does that, an exception leaves nothing behind.

    The temporary name is drawn at random, so that writers on several nodes never share one, and must not exist yet:
    mode "x" neither overwrites a file nor follows a link. Raises OSError for what cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # as TEMPORARY says
        self._file = open(self.temporary, "xb")

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        fault_point("before-rename-file")
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # it writes what is buffered, which a full disk refuses
            self._file.close()
        self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return self.abandon()
        try:
            self.commit()
        except BaseException:
            self.abandon()
            raise


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder that nobody else writes to; nothing through a link to a folder."""
    for stale in () if folder.is_symlink() else folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(stale.name):
            stale.unlink(missing_ok=True)


def open_regular(path: str | Path) -> int:
    """A descriptor to read a file from. Raises OSError, also for a pipe or device, which would block or never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def patiently(read: Callable[[], T], pauses_sec: Sequence[float] = PAUSES_SEC) -> T:
    """What `read` gives; where the file system fails it is asked again, after a pause that grows. Raises OSError."""
    for pause in pauses_sec:
        try:
            return read()
        except OSError as error:
            if error.errno in CERTAIN:
                raise
            time.sleep(pause)
    return read()


def stamp_of(file: str | Path | int) -> Stamp:
    """Bytes and time of the last change [ns] of a file, or of an open one; (-1, 0) when there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return -1, 0  # a link to nothing
    return found.st_size, found.st_mtime_ns


def require_regular(path: Path) -> None:
    """Raise OSError as `open_regular` does: for readers that open a file by its name, and would wait for a pipe."""
    os.close(open_regular(path))


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_within(path: str | Path, limit: int) -> bytes:
    """A whole file. Raises OSError, also for a pipe or device, and ValueError for more than `limit` bytes."""
    with open(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is longer than {limit} bytes")
    return data


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """The value of a JSON file of at most `limit` bytes and MAX_ITEMS. Raises OSError, ValueError for anything else."""
    data = read_within(path, limit)
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_ITEMS:
        raise ValueError(f"it has more than {MAX_ITEMS} items")
    return parse_json(data)


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a file, one a line; None for a line that holds none or is too long. Raises OSError."""
    with open(open_regular(path), "rb") as file:
        while line := file.readline(MAX_ROW):
            whole = len(line) < MAX_ROW
            while len(line) == MAX_ROW and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW)  # the rest of it
            if line.strip() or not whole:
                yield _row(line) if whole else None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


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
    """Write a whole file. Raises OSError, and then leaves the old content and nothing else."""
    view = memoryview(data)
    with AtomicFile(path) as file:
        file.write(view[: len(view) // 2])
        file.flush()
        fault_point("mid-file")
        file.write(view[len(view) // 2 :])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a whole file piece by piece; its size and digest, taken on the way. Raises as `write_bytes`."""
    size, digest = 0, hashlib.sha256()
    with AtomicFile(path) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            fault_point("mid-file")
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write JSON; `default` says what becomes of values that have none, as in `json.dumps`."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=True, default=default) + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors [...] of any shape as .safetensors, from whatever device they are on."""
    from safetensors.torch import save

    own = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    write_bytes(path, save(own))


def read_whole(path: Path, size: int) -> bytes:
    """A file of `size` bytes, or one more byte of a longer one. Raises OSError, also for a pipe or device."""
    with open(open_regular(path), "rb") as file:
        return file.read(size + 1)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU. Raises OSError or SafetensorError for one that is not whole."""
    from safetensors.torch import load_file

    require_regular(path)
    return load_file(path)
