"""Remote shards become local files on first need.

CACHE/<digest of the folder url>/shard-000000.tar    complete, and of the manifest's sha256 where one is known
CACHE/<digest of the folder url>/.lock-<shard>       held while one process of the machine fetches it
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from sdtrain.data.atomic import AtomicFile
from sdtrain.data.tars import sha256_of
from sdtrain.errors import DataError

SCHEMES = ("http://", "https://", "s3://", "gs://", "hf://", "pipe:")
CHUNK = 1 << 20


def is_remote(source: str) -> bool:
    return source.startswith(SCHEMES)


def cached_path(url: str, cache: Path) -> Path:
    """Where a remote file lies once fetched; equal names under different addresses do not meet."""
    if url.startswith("pipe:"):
        name = hashlib.sha256(url.encode()).hexdigest()[:16] + ".tar"
        return cache / "pipe" / name
    folder, _, name = url.partition("?")[0].rpartition("/")
    return cache / hashlib.sha256(folder.encode()).hexdigest()[:16] / name


def fetch(url: str, cache: Path, sha256: str = "") -> Path:
    """Return the local copy of a remote file, fetching it if absent. Raises DataError when that fails."""
    path = cached_path(url, cache)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".lock-{path.name}"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _download(url, path, sha256)
    except OSError as error:
        raise DataError(
            f"fetching {url} into {cache} failed ({error}); check the address and the cache folder"
        ) from None
    return path


def _download(url: str, path: Path, sha256: str) -> None:
    from webdataset import gopen

    file = AtomicFile(path)
    digest = hashlib.sha256()
    try:
        with gopen(url, "rb") as stream:
            while chunk := stream.read(CHUNK):
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


def default_cache() -> Path:
    return Path(os.environ.get("SDTRAIN_CACHE", Path.home() / ".cache" / "sdtrain")) / "shards"


def verified(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256
