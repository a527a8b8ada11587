"""A disk that is full, read-only or gone ends a run on all ranks, with one sentence and nothing half done.

What the main rank writes in passing is remembered when it fails (`Writing`) and agreed on at the end of the step; what
other ranks wait for is agreed on at once (`on_main`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtrain.engine.agree import main_alone, raise_together
from sdtrain.engine.positions import complete
from sdtrain.engine.ranks import from_main, is_main
from sdtrain.errors import RunError


class Writing:
    """The first write into a run folder that failed."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self.problem = ""

    @contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        """Inside, `path` is written. An OSError is remembered and goes no further."""
        try:
            yield
        except OSError as error:
            self.problem = self.problem or failed(path, error)

    @property
    def failure(self) -> RunError | None:
        """What is to be told to the other ranks; what was kept is said when all have met."""
        vanished = None if self.run_folder.exists() else self.run_folder
        return RunError(f"{self.problem}; {advice(vanished)}") if self.problem else None

    def raise_together(self) -> None:
        """Collective. Raises the same `RankFailed` on all ranks when a write has failed on any."""
        raise_together(self.failure)


def on_main(action: Callable[[], None], path: Path) -> None:
    """The main rank writes `path`, the others wait. Raises the same `RankFailed` on all ranks when it fails."""

    def write() -> None:
        try:
            action()
        except OSError as error:
            raise RunError(cannot_write(path, error)) from error

    main_alone(write)


def together(action: Callable[[], Any], folder: Path, run_folder: Path) -> Any:
    """The main rank runs `action`, which writes `folder`, the others wait; its result, on every rank.

    Raises the same `RankFailed` on all ranks when it fails.
    """
    mine, failure = None, None
    try:
        mine = action() if is_main() else None
    except OSError as error:
        failure = RunError(cannot_write(folder, error, run_folder))
    raise_together(failure)
    return from_main(mine)


def cannot_write(path: Path, error: OSError, run_folder: Path | None = None) -> str:
    """A failure as a sentence: what failed, what is safe, what to do."""
    return f"{failed(path, error)}; {advice(run_folder)}"


def failed(path: Path, error: OSError, needed: int = 0) -> str:
    """What failed, how much it needs (where that is known) and how much is free [bytes]."""
    there = next((folder for folder in path.parents if folder.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    room = f"{f'it needs {needed} bytes, ' if needed else ''}{free} bytes are free in {there}"
    return f"cannot write {path}: {error.strerror or error} ({room})"


def advice(run_folder: Path | None) -> str:
    """What is safe, and what to do."""
    if run_folder is None:
        return "make room, or give the folder back, and start the same command again"
    if not run_folder.exists():
        return f"the run folder {run_folder} has vanished: bring it back and start the same command again"
    kept = complete(run_folder / "checkpoints")
    safe = f"checkpoints up to {kept[-1].name} are safe" if kept else "no checkpoint was written yet"
    then = "goes on from there" if kept else "begins again"
    return f"{safe}; make room, or make it writable, and start the same command again: it {then}"
