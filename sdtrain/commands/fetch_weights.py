"""`sdtrain fetch-weights [NAMES]`: the only command that downloads weights of frozen networks.

<folder>/NAME.pth.part   while it is incomplete; a later call continues it
<folder>/NAME.pth        renamed there after its digest was checked
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from sdtrain.errors import WeightsError
from sdtrain.files import why_unwritable
from sdtrain.weights import CACHE_VARIABLE, WEIGHTS, WeightsFile, cache_folder, known, problem_of_package, sha256_of

BLOCK = 1 << 20
TIMEOUT_SEC = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which to fetch: {', '.join(WEIGHTS)}; none lists them"
    )
    parser.add_argument("--all", action="store_true", help="fetch every one that has a published digest")
    parser.add_argument("--to", type=Path, help=f"folder to write into (default ${CACHE_VARIABLE} or ~/.cache/sdtrain)")


def run(args: argparse.Namespace) -> int:
    names = [name for name, entry in WEIGHTS.items() if entry.sha256] if args.all else args.names
    folder = args.to or cache_folder()
    if not names:
        print("\n".join(_row(name, folder) for name in WEIGHTS))
    for name in names:
        known(name)
    for name in names:
        path = fetch(name, folder)
        print(f"{name}: {path} (sha256 {sha256_of(path)})")
    return 0


def _row(name: str, folder: Path) -> str:
    entry = WEIGHTS[name]
    path = entry.place if entry.packaged else folder / entry.file
    state = "present" if path.is_file() else "absent"
    return f"{name:20}{state:9}{entry.file:52}{entry.what}"


def fetch(name: str, folder: Path | None = None) -> Path:
    """Download `name` unless it is there; the path of the checked file. Raises WeightsError when offline or damaged."""
    entry = known(name)
    if entry.packaged:
        if problem := problem_of_package(name):
            raise WeightsError(f"{problem}.")
        return entry.place
    path = (folder or cache_folder()) / entry.file
    if not entry.sha256 and not path.is_file():
        raise WeightsError(f"The {name} weights ({entry.what}) are not fetched: put {path} there {entry.advice(name)}.")
    if path.is_file() and sha256_of(path).startswith(entry.sha256):
        return path
    if reason := why_unwritable(path.parent):
        raise WeightsError(f"{reason}; choose another folder with --to or ${CACHE_VARIABLE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        _download(entry, part)
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{entry.url} could not be fetched ({getattr(error, 'reason', None) or error}); on a machine with a "
            f"network get that file and copy it to {path}, or repeat the command to continue."
        ) from error
    _commit(entry, part, path)
    return path


def _commit(entry: WeightsFile, part: Path, path: Path) -> None:
    digest = sha256_of(part)
    if not digest.startswith(entry.sha256):
        part.unlink()
        raise WeightsError(
            f"The file from {entry.url} has sha256 {digest[:16]}... instead of {entry.sha256}...; it was deleted, "
            "a proxy may have answered in its place; fetch it by hand or try again."
        )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _download(entry: WeightsFile, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(
        entry.url, headers={"User-Agent": "sdtrain", **({"Range": f"bytes={have}-"} if have else {})}
    )
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT_SEC)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: the part is complete
            return
        raise
    with reply:
        resumed = reply.status == 206
        total = int(reply.headers.get("Content-Length") or 0) + (have if resumed else 0)
        with _open_part(part, resumed) as out:
            _copy(reply, out, have if resumed else 0, total, entry.file)


def _open_part(path: Path, resumed: bool) -> BinaryIO:
    """To write on, or from the start; a link in its place is refused."""
    how = os.O_APPEND if resumed else os.O_TRUNC
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | how, 0o666), "wb")


def _copy(reply: BinaryIO, out: BinaryIO, done: int, total: int, label: str) -> None:
    shown = 0.0
    while block := reply.read(BLOCK):
        out.write(block)
        done += len(block)
        if time.monotonic() - shown > 1 or done == total:
            shown = time.monotonic()
            print(f"\r{label}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if total and done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
