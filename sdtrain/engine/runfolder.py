"""What a run leaves behind.

    runs/NAME/
      config.yaml        resolved configuration, every default written out
      plan.json          what --plan prints, as data
      environment.json   versions, command line, world size, hashes of weights, whether it ended; one entry a start
      metrics.jsonl      one JSON object a row, append only, cut back to the resumed position on resume
      tensorboard/       the same scalars, image grids, figures; also wandb/, see trackers.py
      samples/           fixed-latent grids
      checkpoints/       see checkpoint.py
      snapshots/         see snapshots.py
      best/              best-by-validation weights and the metrics that chose them
      before-DATE-TIME/  an earlier run, see restart.py
      .lock              see lock.py
      .attempts          of a Slurm job, see commands/requeue.py

Only the main rank writes.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.engine import starts
from sdtrain.engine.agree import main_alone
from sdtrain.engine.launcher import said
from sdtrain.engine.ranks import from_main, is_main, world
from sdtrain.engine.restart import is_row, lines_of, position
from sdtrain.engine.threads import cores
from sdtrain.engine.trackers import Tracker, open_tracker, told
from sdtrain.engine.writing import Writing
from sdtrain.errors import RunError
from sdtrain.files import sweep, write_bytes, write_json
from sdtrain.precision import described

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sdtrain.config.keys import Config

log = logging.getLogger("sdtrain")

OWN = ("checkpoints", "snapshots", "samples", "best", "inputs", "tensorboard", "wandb", ".wandb", "metrics.jsonl")


class RunFolder:
    """Paths and writers of one run."""

    def __init__(self, path: Path, config: Config | None = None) -> None:
        """`config`: whose trackers are told too; None = none are."""
        self.path, self._config = path, config
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"
        self.metrics = path / "metrics.jsonl"
        self._trackers: list[Tracker] = []
        self._rows: FileIO | None = None
        self.owed: list[dict[str, Any]] = []  # rows that could not be written, for the run that goes on
        self.writing = Writing(path)
        self._measured: set[tuple[float, str]] = set()  # positions and splits that already have an eval row

    def create(self) -> None:
        """Make the folders. Raises `RunError` on every rank when they cannot be written."""
        problem = from_main(self._try_to_write() if is_main() else None)
        if problem:
            raise RunError(f"{self.path}: the run folder cannot be written ({problem}); choose another with --out")

    def _try_to_write(self) -> str | None:
        if link := next((name for name in OWN if (self.path / name).is_symlink()), None):
            return f"{link} is a link, and a run writes and deletes in its own folder alone: link the whole folder"
        try:
            for sub in ("checkpoints", "samples", "best"):
                (self.path / sub).mkdir(parents=True, exist_ok=True)
                sweep(self.path / sub)
            sweep(self.path)
            write_bytes(self.path / ".writable", b"")
            (self.path / ".writable").unlink()
        except OSError as error:
            return error.strerror
        return None

    def open_log(self, resumed_img: int, redo_evaluation: bool = False) -> None:
        """Cut `metrics.jsonl` back to rows at or before `resumed_img`, open the writers. All ranks together.

        `redo_evaluation`: that of `resumed_img` was cut short and is done again, so its row, if any, goes too.
        Raises `RankFailed` on all ranks for a tracker that does not start.
        """

        def open_writers() -> None:
            with self.writing(self.metrics):
                self._open_log(resumed_img, redo_evaluation)

        main_alone(open_writers)

    def _open_log(self, resumed_img: int, redo_evaluation: bool) -> None:
        kept: list[str] = []
        if self.metrics.exists():
            kept = [line for line in lines_of(self.metrics) if position(line, redo_evaluation) <= resumed_img]
            write_bytes(self.metrics, "".join(f"{line}\n" for line in kept).encode())
        rows = [row for row in map(json.loads, kept) if is_row(row)]
        self._measured = {(float(row["seen_img"]), row.get("split")) for row in rows if row["kind"] == "eval"}
        self._rows = FileIO(self.metrics, "ab")
        if self._config:
            self._open_trackers(self._config, resumed_img, rows)
        owed, self.owed = self.owed, []
        for row in owed:
            if position(json.dumps(row), redo_evaluation) <= resumed_img:
                self.row(row.pop("kind"), row.pop("seen_img"), row, row.pop("split", ""))

    def _open_trackers(self, config: Config, resumed_img: int, rows: list[dict[str, Any]]) -> None:
        for kind in config.trackers:
            with self.writing(self.path / kind):
                self._trackers.append(open_tracker(kind, self.path, resumed_img, config))
                self._trackers[-1].catch_up(told(row) for row in rows if float(row["seen_img"]) >= 0)

    def row(self, kind: str, seen_img: int, values: Mapping[str, object], split: str = "") -> None:
        """Append one row; trackers get its numbers under the same names."""
        if self._rows is None:  # only the main rank has opened them
            return
        where = {"kind": kind, "seen_img": seen_img, **({"split": split} if split else {})}
        row = where | {k: _plain(v) for k, v in values.items()}
        with self.writing(self.metrics):
            if not self.writing.problem:  # not after a row that is torn
                _append(self._rows, self.metrics, (json.dumps(row) + "\n").encode())  # kept by a run that is killed
        if self.writing.problem:
            self.owed.append(row)
            return
        for tracker in self._trackers:
            with self.writing(tracker.folder):
                tracker.scalars(*told(row))

    def measured(self, seen_img: int, split: str) -> bool:
        """Whether this position had been evaluated before the run was started again; the same answer on all ranks."""
        return from_main((seen_img, split) in self._measured)

    def image(self, tag: str, picture: NDArray[np.uint8], seen_img: int) -> None:
        """Store a uint8 HWC picture as PNG under samples/ and in the trackers."""
        if not is_main():
            return
        from PIL import Image

        path = self.path / "samples" / f"{tag.replace('/', '_')}_{seen_img:09d}.png"
        data = io.BytesIO()
        Image.fromarray(picture).save(data, format="PNG")
        with self.writing(path):
            write_bytes(path, data.getbuffer())
        for tracker in self._trackers:
            with self.writing(tracker.folder):
                tracker.image(tag, seen_img, picture)

    def histogram(self, tag: str, values: Tensor, seen_img: int) -> None:
        for tracker in self._trackers:  # of the main rank
            with self.writing(tracker.folder):
                tracker.histogram(tag, seen_img, values)

    def write_json(self, name: str, value: object) -> None:
        if is_main():
            with self.writing(self.path / name):
                write_json(self.path / name, value, default=str)

    def note_environment(self, weights: dict[str, Any], ranks: dict[str, Any], engine: dict[str, Any]) -> None:
        """Add this start to environment.json; earlier starts are kept."""
        used = {**environment(weights, ranks), "engine": engine, "launcher": said()}
        self.write_json(starts.FILE, {"starts": [*self._starts(), used]})

    def note_finished(self) -> None:
        """Add to this start that it came to the end of the run."""
        *earlier, this = self._starts() or [{}]
        self.write_json(starts.FILE, {"starts": [*earlier, {**this, "finished": now()}]})

    def _starts(self) -> list[dict[str, Any]]:
        """Earlier entries; a damaged file is kept beside the new one."""
        try:
            return starts.starts_of(self.path) if is_main() else []
        except (OSError, ValueError) as error:
            path, aside = self.path / starts.FILE, self.path / f"{starts.FILE}.damaged"
            os.replace(path, aside)
            log.warning("%s is damaged (%s); it is now %s, and a new one begins", path, error, aside.name)
            return []

    def close(self) -> None:
        if self._rows is not None:
            with self.writing(self.metrics):
                self._rows.close()
        for tracker in self._trackers:
            with self.writing(tracker.folder):
                tracker.close()
        self._rows, self._trackers = None, []


def environment(weights: dict[str, Any], ranks: dict[str, Any]) -> dict[str, Any]:
    """What this start runs on; `ranks`: the devices of all of them, and the threads of each."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    packages = "sdtrain torch torchvision accelerate deepspeed webdataset lpips numpy".split()
    return {
        "time": now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "host": platform.node(),
        "world_size": world(),
        "cores": cores(),
        **ranks,
        "packages": {name: installed(name) for name in packages},
        "git_commit": git_commit(),
        "float32": described(),
        "weights": weights,
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@functools.cache
def git_commit() -> str | None:
    """The commit of the code in use, None outside a git checkout."""
    import subprocess

    here = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _append(file: FileIO, path: Path, data: bytes) -> None:
    """Raises OSError also for a file that was removed or replaced while it is open: what goes into it is lost."""
    if not (path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno()))):
        raise OSError(errno.ENOENT, "it was removed or replaced during the run")
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
