"""The runs of a suite in turn, or some at once."""

from __future__ import annotations

import os
import shlex
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sdtrain.commands.relay import Relay
from sdtrain.commands.suite_slots import Slot
from sdtrain.commands.suite_state import best_of, finished
from sdtrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE, EXIT_USER_ERROR, RunError
from sdtrain.exits import tell

if TYPE_CHECKING:
    from sdtrain.config.suite import Member, Suite

T = TypeVar("T")
AFTER = dict.fromkeys((EXIT_REQUEUE, EXIT_INTERRUPTED), "the same command goes on there")
MEND = "its last words say why; the same command goes on there"


def train(suite: Suite, members: Sequence[Member], slots: Sequence[Slot], start: Callable[[Member, Slot], int]) -> int:
    """Train what has not finished, in order, one run a slot, the teacher by itself.

    After a run that fails no other begins. Returns the code of the first run that does not finish, else 0.
    """
    waiting, codes, total = deque(enumerate(members, 1)), list[int](), len(members)

    def work(slot: Slot, turns: int = total) -> None:
        for number, member in islice(taken(waiting), turns):
            if codes:
                return
            done = finished(member)
            print(f"[{number}/{total}] {member.out}{': has finished' if done else ''}", flush=True)
            try:
                code = EXIT_OK if done else start(member, slot)
            except BaseException:
                codes.append(EXIT_USER_ERROR)
                raise
            if code:
                codes.append(code)
                rest = f"{sum(map(finished, members))} of {total} runs have finished"
                tell(f"suite {suite.name}: {member.out.name} ended with code {code}; {rest}; {AFTER.get(code, MEND)}")

    if len(slots) == 1:
        work(slots[0])
        return codes[0] if codes else EXIT_OK
    if members[:1] == [suite.teacher]:
        work(Slot(), 1)
    with ThreadPoolExecutor(len(slots)) as threads:
        for ended in [threads.submit(work, slot) for slot in slots]:
            ended.result()
    return codes[0] if codes else EXIT_OK


def taken(waiting: deque[T]) -> Iterator[T]:
    """One after another, each by one of the threads that ask."""
    with suppress(IndexError):
        while True:
            yield waiting.popleft()


class AtWork:
    """The runs that have been started and have not ended; the file of the lock has their names."""

    def __init__(self, relay: Relay, lock: int):
        self._relay, self._lock = relay, lock
        self._names: list[str] = []
        self._turn = threading.Lock()

    def start(self, command: list[str], member: Member, slot: Slot) -> int:
        """The exit code of a run. Raises RunError when it says 0 and has not finished."""
        with self._named(member.out.name), ExitStack() as files:
            slot.enter()
            log = files.enter_context(open(log_of(member), "ab")) if slot.beside else None
            code = self._relay.run(command, self._lock, slot.environment(), log)
        done = finished(member)
        if code == EXIT_OK and not done:
            raise RunError(f"{member.out}: {shlex.join(command[:3])} ... ended well without training; see --launcher")
        if slot.beside:
            print(f"{member.out}: {f'finished, {best_of(member)}' if done else f'see {log_of(member)}'}", flush=True)
        return code

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        self._note(self._names.append, name)
        try:
            yield
        finally:
            self._note(self._names.remove, name)

    def _note(self, change: Callable[[str], None], name: str) -> None:
        with self._turn:
            change(name)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, ", ".join(self._names).encode(), 0)


def log_of(member: Member) -> Path:
    return member.out.with_name(f"{member.out.name}.log")
