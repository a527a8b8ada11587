"""A rank or decoding process that hangs is named, with the stack of every rank that still answers, and the run ends.

A thread a rank writes its `Mark` into the ranks' common store; the first ranks read those of all. Nothing waits for a
device or takes part in a collective. Time in which a process was itself suspended does not count as silence.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from sdtrain.engine.agree import explained
from sdtrain.engine.preempt import StopRequest, name_of
from sdtrain.engine.pulse import LONG, PULSE, Mark
from sdtrain.engine.ranks import RankLost, barrier, rank, world
from sdtrain.errors import EXIT_FAULT, EXIT_REQUEUE, RunError, Together
from sdtrain.exits import code_of
from sdtrain.terminal import show_fault, visible

PERIOD_SEC = 1.0
WATCHERS = 2  # ranks that look after the others; two, so that one may hang
AT_ONCE = 1024  # records a watcher reads a second: 4 ms of Python; 4,096 ranks are read every 4 s
STOP_PATIENCE_SEC = 20.0  # how long a rank may be silent after a stop signal
LONG_STOP_PATIENCE_SEC = 60.0  # inside an evaluation, whose last sums cannot be interrupted
START_PATIENCE_SEC = 60.0  # while libraries are read, Python may stand still
MOMENT_SEC = 2.5  # for other ranks to hear the alarm
GONE_SEC = 3 * PERIOD_SEC  # a rank that has not written for so long, when the connection to one was lost, is that one
TOLD = (Together, RunError, KeyboardInterrupt, SystemExit, GeneratorExit)  # what all ranks know, or have been sent
_numbers = itertools.count()


class Record(NamedTuple):
    """What a rank has written: counted up by its thread, so that a process that is stopped shows."""

    mark: Mark
    written: int
    who: str
    reason: int = 0
    """The stop signal it has received."""
    done: bool = False

    @staticmethod
    def read(text: str | bytes) -> Record:
        mark, *rest = json.loads(text)
        return Record(Mark(*mark), *rest)


@dataclass
class Silence:
    """How long a rank has written nothing, and how long its main thread has not moved."""

    record: Record
    process_sec: float = 0.0
    main_sec: float = 0.0

    def hear(self, record: Record, elapsed_sec: float) -> None:
        """`record` is the present one, `elapsed_sec` after the one before."""
        self.process_sec = 0.0 if record.written != self.record.written else self.process_sec + elapsed_sec
        self.main_sec = 0.0 if record.mark.beats != self.record.mark.beats else self.main_sec + elapsed_sec
        self.record = record


def accused(ranks: Mapping[int, Silence], timeout_sec: float, slow: Collection[str] = LONG) -> list[str]:
    """A sentence for each rank that is silent too long; who waits is not to blame unless all wait for each other.

    The last that a stopped process wrote may be that it waits, in passing: all wait when all still write, and have
    been silent for the shortest of their limits.
    """
    reason = max(silence.record.reason for silence in ranks.values())
    gone, stuck, waiting = [], [], []
    there = {number: found for number, found in ranks.items() if not found.record.done}
    limits = {number: _limit(found.record.mark, timeout_sec, slow, reason) for number, found in there.items()}
    shortest = min(limits.values(), default=0.0)
    all_wait = all(
        found.record.mark.waiting and found.main_sec > shortest and found.process_sec < GONE_SEC
        for found in there.values()
    )
    for number, found in there.items():
        record, mark = found.record, found.record.mark
        limit, where = limits[number], f"rank {number} ({record.who})"
        place = f"step {mark.step}, section {mark.section}"
        if found.process_sec > min(limit, timeout_sec if mark.settled else max(timeout_sec, START_PATIENCE_SEC)):
            gone.append(f"{where} does not answer for {found.process_sec:.0f} s: stopped or gone, last seen in {place}")
        elif found.main_sec > limit and not mark.waiting:
            stuck.append(f"{where} has not moved for {found.main_sec:.0f} s in {place}")
        elif found.main_sec > limit and all_wait:
            waiting.append(f"{where} has waited for the others for {found.main_sec:.0f} s in {place}, {mark.waiting}")
    return gone or stuck or waiting


def _limit(mark: Mark, timeout_sec: float, slow: Collection[str], reason: int) -> float:
    # decoding processes are given up by the rank itself, with their names, which is to come first
    limit = mark.limit_sec(timeout_sec, slow) + (2 * PERIOD_SEC if mark.section == "data" else 0)
    if mark.section == "start":
        limit = max(limit, START_PATIENCE_SEC)
    if not reason or mark.section == "save":
        return limit
    patience = LONG_STOP_PATIENCE_SEC if mark.section == "evaluate" else STOP_PATIENCE_SEC
    return min(limit, max(patience, 2 * mark.slowest_sec))


class Watch:
    """Inside `with`, this rank is watched and watches. All ranks enter together.

    A process that must go on its own ends by `os._exit`, with what a retry needs to know on stderr.
    """

    def __init__(self, timeout_sec: float, stop: StopRequest, slow: Collection[str] = LONG) -> None:
        """`slow`: sections that may be silent for longer (`Mark.limit_sec`)."""
        self.timeout_sec, self.stop, self.slow = timeout_sec, stop, slow
        self._who = f"pid {os.getpid()} on {os.uname().nodename}"
        self._over, self._obeying = threading.Event(), False
        self._store: Any = None
        self._keeper = "the launcher"
        self._written = self._looks = 0
        self._unheard_sec = 0.0  # since the others were last read
        self._ranks: dict[int, Silence] = {}

    def __enter__(self) -> Watch:
        if world() > 1:
            self._store = _store(self.timeout_sec)
            self._write()
            barrier()  # everybody has written
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._keeper = f"rank 0 ({Record.read(self._store.get('0')).who})"
        for target in (self._run, self._guard):
            threading.Thread(target=target, name=f"watch{target.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._store is not None and error is not None and not isinstance(error, TOLD):
            self._tell(error)
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._store is not None and kind is None:
            with contextlib.suppress(RuntimeError):  # who keeps the store may have left already
                self._write(done=True)

    def _tell(self, error: BaseException) -> None:
        """The others may wait in a collective for this rank, which something has befallen."""
        code = code_of(error)
        if code == EXIT_FAULT:
            show_fault(type(error), error, error.__traceback__)
        try:
            lost = self._gone() if isinstance(error, RankLost) else []
            section = error.__dict__.get("section", PULSE.mark.section)
            told = "; ".join(lost) or f"{explained(error)}, in step {PULSE.mark.step}, section {section}"
            self._over.set()  # the thread is not to hear its own alarm
            self._obey(self._raise_alarm(f"{told}; {self.stop.kept()}", code, stacks=False))
        except RuntimeError as gone:  # nobody can be told anything any more
            self._store_is_gone(str(gone).splitlines()[0])

    def _gone(self) -> list[str]:
        """A sentence for each rank whose thread has stopped writing; the others still do. The first ranks look."""
        looks = rank() < WATCHERS
        before = self._records() if looks else {}
        time.sleep(GONE_SEC if looks else 2 * GONE_SEC)
        if self._store.check(["alarm"]):
            self._obey(json.loads(self._store.get("alarm")))
        now = self._records() if looks else {}
        return [
            f"rank {number} ({record.who}) is gone, last seen in step {record.mark.step}, section {record.mark.section}"
            for number, record in now.items()
            if record.written == before[number].written and not record.done
        ]

    def _records(self) -> dict[int, Record]:
        return dict(enumerate(map(Record.read, self._store.multi_get([str(r) for r in range(world())]))))

    def _run(self) -> None:
        before = time.monotonic()
        while not self._over.wait(PERIOD_SEC):
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * PERIOD_SEC), now
            # where a library call never lets Python run, this thread cannot speak: then at least the stacks are there
            faulthandler.dump_traceback_later(PULSE.mark.limit_sec(self.timeout_sec, self.slow) * 2, file=2)
            try:
                self._look(elapsed)
                self._looks += 1
            except RuntimeError as error:
                self._store_is_gone(str(error).splitlines()[0])
        faulthandler.cancel_dump_traceback_later()

    def _guard(self) -> None:
        """The other thread may wait for ever on a store whose process was stopped."""
        looks, silent_sec = 0, 0.0
        while not self._over.wait(PERIOD_SEC):
            silent_sec = silent_sec + PERIOD_SEC if self._looks == looks else 0.0
            looks = self._looks
            if silent_sec > (min(STOP_PATIENCE_SEC, self.timeout_sec) if self.stop.signal else self.timeout_sec):
                self._store_is_gone(f"no answer for {silent_sec:.0f} s")

    def _look(self, elapsed: float) -> None:
        if self._store is None:
            self._written += 1
            records = {0: Record(PULSE.mark, self._written, self._who, self.stop.signal)}
        else:
            self._write()
            if self._store.check(["alarm"]):
                self._obey(json.loads(self._store.get("alarm")))
            self._unheard_sec += elapsed
            if rank() >= WATCHERS or self._written % max(world() // AT_ONCE, 1):
                return
            elapsed, self._unheard_sec = self._unheard_sec, 0.0
            records = self._records()
        for number, record in records.items():
            self._ranks.setdefault(number, Silence(record)).hear(record, elapsed)
        if found := accused(self._ranks, self.timeout_sec, self.slow):
            asked = max(record.reason for record in records.values())
            told = f"{name_of(asked)} cannot be obeyed: " if asked else ""
            self._obey(self._raise_alarm(f"{told}{'; '.join(found)}; {self.stop.kept()}", EXIT_REQUEUE, stacks=True))

    def _write(self, done: bool = False) -> None:
        self._written += 1
        record = Record(PULSE.mark, self._written, self._who, self.stop.signal, done)
        self._store.set(str(rank()), json.dumps(record))

    def _raise_alarm(self, sentence: str, code: int, stacks: bool) -> dict[str, Any]:
        """The alarm that all ranks obey: this one, or one that another rank has just raised."""
        mine = {"sentence": sentence, "code": code, "stacks": stacks, "by": rank()}
        if self._store is None:
            return mine
        try:
            held: dict[str, Any] = json.loads(self._store.compare_set("alarm", "", json.dumps(mine)))
        except RuntimeError:  # it went with the rank that kept it
            return mine
        return held

    def _obey(self, alarm: dict[str, Any]) -> None:
        """Say what has happened (one rank), where this one stands (each), and end the process."""
        if self._obeying:  # the other thread is at it
            time.sleep(2 * MOMENT_SEC)
        self._obeying = True
        said = [f"sdtrain: {visible(alarm['sentence'])}"]
        if alarm["stacks"]:
            said += [f"rank {rank()} ({self._who}), step {PULSE.mark.step}, section {PULSE.mark.section}:", _stack()]
        os.write(2, "".join(f"{line}\n" for line in said).encode())
        if alarm["by"] == rank() or rank() == 0:  # rank 0 may keep the store
            time.sleep(MOMENT_SEC if self._store is not None else 0)
        sys.stdout.flush()
        os._exit(alarm["code"])

    def _store_is_gone(self, why: str) -> None:
        if self._over.wait(MOMENT_SEC):  # the run ends anyway
            return
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        what = f"{self._keeper}, which keeps the ranks' common store, is stopped or gone, or cut off at {where}"
        said = f"sdtrain: rank {rank()} ({self._who}): {what} ({why}); {self.stop.kept()}\n"
        os.write(2, f"{said}{_stack()}\n".encode())
        os._exit(EXIT_REQUEUE)


def _store(timeout_sec: float) -> Any:
    """A connection of our own to the ranks' common store: the one of the process group may be waiting for something."""
    wait = datetime.timedelta(seconds=timeout_sec)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, None, False, wait, wait_for_workers=False)
    return dist.PrefixStore(f"sdtrain watch {next(_numbers)}", store)


def _stack() -> str:
    """Where the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "(no stack)"
