"""What `sdtrain upscale` of many pictures leaves out when it was interrupted and is started again.

    OUT/.upscale.json    a digest of the network, the settings and the list; there while pictures are made

A picture that is newer than this file and than its source was made by the same command. A command with another digest
begins anew, and so does one after an end that was no interruption.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sdtrain.errors import ConfigError
from sdtrain.files import read_json, sha256_of_file, write_json

NAME = ".upscale.json"


class Job(Protocol):
    @property
    def source(self) -> Path: ...
    @property
    def target(self) -> Path: ...


J = TypeVar("J", bound=Job)


@contextmanager
def going_on(jobs: Sequence[J], upscaler: Any, out: Path) -> Iterator[list[J]]:
    """The jobs that are not done; a single picture is always done again. Raises ConfigError for a full disk."""
    if len(jobs) == 1:
        yield list(jobs)
        return
    note, plan = out / NAME, plan_of(jobs, upscaler)
    left = [job for job in jobs if not done(job, note)] if _noted(note) == plan else list(jobs)
    if len(left) == len(jobs):
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(note, {"plan": plan})
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written ({error.strerror or error}); make room there") from None
    else:
        print(f"{len(jobs) - len(left)} of {len(jobs)} pictures are done already; going on", file=sys.stderr)
    yield left
    note.unlink(missing_ok=True)


def plan_of(jobs: Sequence[Job], upscaler: Any) -> str:
    """Of all that decides what the results are, but for what is in the sources."""
    names = [(str(job.source), str(job.target)) for job in jobs]
    return hashlib.sha256(json.dumps([sha256_of_file(upscaler.path), upscaler.settings, names]).encode()).hexdigest()


def _noted(note: Path) -> Any:
    try:
        return read_json(note)["plan"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def done(job: Job, note: Path) -> bool:
    """Whether the result is newer than the note and than its source, also than one that was put in its place."""
    try:
        made, source = job.target.stat().st_mtime_ns, job.source.stat()
        return made >= max(note.stat().st_mtime_ns, source.st_mtime_ns, source.st_ctime_ns)
    except OSError:
        return False
