"""Remote shards become local files on first need.

An address counts as one only where the user typed it; what a manifest names is a file of its own folder.
`pipe:` runs a command, so it also needs `allow_pipe`.

CACHE/<digest of the folder url>/shard-000000.tar    complete, and of the manifest's sha256 where one is known
CACHE/<digest of the folder url>/.lock-<shard>       held while one process of the machine fetches it
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdtrain.data.read.budget import DOWNLOAD_BYTES
from sdtrain.errors import DataError
from sdtrain.files import AtomicFile, cache_root, sha256_of_file
from sdtrain.terminal import printable

SCHEMES = ("http://", "https://", "s3://", "gs://", "hf://", "pipe:")
CHUNK = 1 << 20
SPARE = 0.9  # of the free space, that a download may fill


def is_remote(source: str) -> bool:
    return source.startswith(SCHEMES)


def is_remote_folder(source: str) -> bool:
    return is_remote(source) and source.endswith("/") and not source.startswith("pipe:")


def check_pipe(source: str, allow_pipe: bool) -> None:
    """Raise DataError for a command where commands are not allowed."""
    if source.startswith("pipe:") and not allow_pipe:
        raise DataError(
            f"{source} would run a command; allow it with --allow-pipe, or for a run with --set data.allow_pipe=true"
        )


def cached_path(url: str, cache: Path) -> Path:
    """Where a remote file lies once fetched; equal names under different addresses do not meet."""
    if url.startswith("pipe:"):
        name = hashlib.sha256(url.encode()).hexdigest()[:16] + ".tar"
        return cache / "pipe" / name
    folder, _, name = url.partition("?")[0].rpartition("/")
    return cache / hashlib.sha256(folder.encode()).hexdigest()[:16] / name


def fetch(url: str, cache: Path, sha256: str = "", *, allow_pipe: bool = False, most: int = DOWNLOAD_BYTES) -> Path:
    """Return the local copy of a remote file, fetching it if absent.

    Raises DataError when that fails, also for more than `most` bytes; nothing is then left in the cache.
    """
    check_pipe(url, allow_pipe)
    path = cached_path(url, cache)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".lock-{path.name}")):
            if not path.exists():
                _download(url, path, sha256, most)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = printable(str(error))[:200]
        raise DataError(
            f"fetching {url} into {cache} failed ({reason}); check the address and the cache folder"
        ) from None
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; a link in its place is refused."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _download(url: str, path: Path, sha256: str, most: int) -> None:
    file = AtomicFile(path)
    digest = hashlib.sha256()
    left = min(most, int(shutil.disk_usage(path.parent).free * SPARE))
    try:
        for chunk in _chunks(url):
            left -= len(chunk)
            if left < 0:
                raise OSError("it has more bytes than it should, or than there is space for")
            file.write(chunk)
            digest.update(chunk)
        if sha256 and digest.hexdigest() != sha256:
            raise DataError(
                f"{url} has sha256 {digest.hexdigest()[:12]}..., its manifest {sha256[:12]}...; pack or upload it again"
            )
        file.commit()
    except BaseException:
        file.abandon()
        raise


def _chunks(url: str) -> Iterator[bytes]:
    """The bytes of an address. Raises OSError when it ends early."""
    if not url.startswith(("http://", "https://")):
        yield from _gopen_chunks(url)
        return
    from sdtrain.data.read.download import http_chunks

    yield from http_chunks(url)


def _gopen_chunks(url: str) -> Iterator[bytes]:
    # Object stores and pipes go through webdataset; http does not, because its import would load torch in every worker.
    from webdataset import gopen

    with gopen(url, "rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def default_cache() -> Path:
    """SDTRAIN_SHARDS, which a job sets to a disk of its node; else beside everything else that is kept."""
    if own := os.environ.get("SDTRAIN_SHARDS"):
        return Path(own)
    return cache_root() / "shards"


def verified(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of_file(path) == sha256
