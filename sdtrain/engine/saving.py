"""Saving while training goes on.

At a step boundary each rank copies what it has to write into host memory (staging.py); a thread of its own writes the
files, and that of the main rank gives the folder its marker and name when all have reported theirs. Threads never meet
in collectives, which belong to training. They leave word in the ranks' common store:

    0/begun      the main rank has made the folder of the first save: "", or what went wrong
    0/1          what rank 1 has done: {files: {name: {bytes, sha256}}, meter, problem}
    0/verdict    the folder has its name: "", or what went wrong on whichever rank
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdtrain.contracts import State, Tensors
from sdtrain.engine.checkpoint import STATE, TENSORS, UNFINISHED, begin_folder, commit, digest, tidy
from sdtrain.engine.preempt import StopRequest
from sdtrain.engine.pulse import PULSE
from sdtrain.engine.ranks import is_main, rank, world
from sdtrain.engine.staging import Staged, Staging
from sdtrain.engine.writing import Writing, failed
from sdtrain.files import fault_point, write_json, write_pieces

LOOK_SEC = 0.5
FOREVER = datetime.timedelta(days=365)  # who waits for a rank that is gone is ended by the watch
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a rank has to write of a folder ROOT/img_..."""

    root: Path
    seen_img: int
    files: Mapping[str, Tensors]
    """{file: {name: [...]}}, any shapes and devices; no other rank has a file of the same name."""
    state: State | None = None
    """state.json but for the meters, the same on all ranks; None = a folder without."""
    meter: Mapping[str, list[float]] | None = None
    """What this rank adds to it."""
    keep: int = 0
    """Checkpoints to keep; 0 = all, and no hint at the newest."""

    @property
    def final(self) -> Path:
        return self.root / f"img_{self.seen_img:09d}"

    @property
    def unfinished(self) -> Path:
        return self.root / f"{UNFINISHED}{self.final.name}"


class Saver:
    """One writer at a time, with those of the other ranks. All ranks call its members at the same steps."""

    def __init__(self, writing: Writing, device: torch.device) -> None:
        self.writing, self.staging = writing, Staging(device)
        self.problem = ""  # of the last save, the same on all ranks
        self._number = 0
        self._store: Any = None
        self._thread: threading.Thread | None = None
        self._progress, self._told = 0, False

    def save(self, order: Order, stop: StopRequest) -> None:
        """Copy everything that `order` names, and write it from here on. The save before must have ended."""
        assert not self.busy
        if self._store is None:
            self._store = own_store()
        stop.save_begins()
        staged = self.staging.take(order.files)
        state = copy.deepcopy(order.state)
        self._told = False
        self._thread = threading.Thread(target=self._run, args=(order, staged, state, stop), name="writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, limit_sec: float = float("inf")) -> bool:
        """Until nothing is being written. Whether the last save has succeeded, on all ranks."""
        with PULSE.section("save"):
            seen = None
            while self._thread is not None and self.busy and limit_sec > 0:
                if seen != (seen := (self._progress, self._told)):
                    PULSE.beat(waiting="the writers of other ranks" if self._told else "")
                self._thread.join(min(LOOK_SEC, limit_sec))
                limit_sec -= LOOK_SEC
        return not self.problem

    def _run(self, order: Order, staged: Mapping[str, Staged], state: State | None, stop: StopRequest) -> None:
        try:
            self.problem = self._written(order, staged, state)
        except Exception as error:  # of the store; a thread has nobody above it
            self.problem = f"rank {rank()} lost the others while saving {order.final} ({error})"
        self._number += 1
        self.writing.problem = self.writing.problem or self.problem
        stop.save_ends()

    def _written(self, order: Order, staged: Mapping[str, Staged], state: State | None) -> str:
        """What went wrong on any rank, or ""."""
        needed = sum(file.nbytes for file in staged.values())
        if is_main():
            self._tell("begun", self._tried(lambda: begin_folder(order.unfinished), order, needed))
        if problem := self._heard("begun"):
            return problem
        files: dict[str, Any] = {}
        problem = self._tried(lambda: self._write(order.unfinished, staged, files), order, needed)
        self._tell(str(rank()), json.dumps({"files": files, "meter": order.meter, "problem": problem}))
        self._told = True
        if is_main():
            reports = [json.loads(self._heard(str(number))) for number in range(world())]
            self._tell("verdict", self._judged(order, reports, state, needed))
        problem = self._heard("verdict")
        self._store.delete_key(f"{self._number}/{rank()}")
        return problem

    def _write(self, folder: Path, staged: Mapping[str, Staged], files: dict[str, Any]) -> None:
        """Write this rank's share of `folder`; the size and digest of each file go into `files`."""
        for name, file in staged.items():
            files[f"{name}{TENSORS}"] = write_pieces(folder / f"{name}{TENSORS}", map(self._counted, file.pieces()))
            fault_point("mid-save")

    def _counted(self, piece: bytes | memoryview) -> bytes | memoryview:
        self._progress += 1
        return piece

    def _judged(self, order: Order, reports: list[dict[str, Any]], state: State | None, needed: int) -> str:
        """The main rank finishes or removes the folder. What went wrong on the first rank that has failed, or ""."""
        told = [report["problem"] for report in reports if report["problem"]]
        problem = told[0] if told else self._tried(lambda: _finish(order, reports, state), order, needed)
        if problem:
            shutil.rmtree(order.unfinished, ignore_errors=True)
        return problem

    def _tried(self, action: Callable[[], None], order: Order, needed: int) -> str:
        """What goes wrong in `action`, or ""."""
        try:
            action()
        except OSError as error:
            return failed(order.final, error, needed)
        except Exception as error:  # a rank that says nothing would keep all others waiting
            return f"cannot write {order.final}: {error!r}"
        return ""

    def _tell(self, what: str, text: str) -> None:
        self._store.set(f"{self._number}/{what}", text)

    def _heard(self, what: str) -> str:
        """What a rank has told, when it has."""
        key = f"{self._number}/{what}"
        self._store.wait([key], FOREVER)
        text: bytes = self._store.get(key)
        return text.decode()


def _finish(order: Order, reports: list[dict[str, Any]], state: State | None) -> None:
    files = {name: facts for report in reports for name, facts in report["files"].items()}
    if state is not None:
        meters = {str(number): report["meter"] for number, report in enumerate(reports)}
        write_json(order.unfinished / STATE, {**state, "meters": meters})
        files[STATE] = digest(order.unfinished / STATE)
    commit(order.unfinished, order.final, files)
    tidy(order.final, order.keep)


def deal(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The rank that writes each file: the largest first, each to the rank that has least so far."""
    load, owner = [0] * num_ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def own_store() -> Any:
    """A connection of the writers' own to the ranks' common store: training must not wait for them, nor they for it."""
    if world() == 1:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, None, False, wait_for_workers=False)
    return dist.PrefixStore(f"sdtrain saves {next(_numbers)}", store)
