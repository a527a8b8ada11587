"""Reading the next, computing this one, writing the last one at the same time: one of each, in the order of the items.

Computing stays in the thread of the caller, where signals arrive; the others are threads that end with it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from sdtrain.data.read.budget import strike

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
PATIENCE_SEC = 5.0  # for a library that does not come back to Python


class Stopped(BaseException):
    """Nobody waits for the result any more."""


@dataclass(frozen=True)
class Outcome(Generic[D]):
    """What a call gave, or raised."""

    value: D | None = None
    error: BaseException | None = None

    @classmethod
    def of(cls, work: Callable[[], D]) -> Outcome[D]:
        try:
            return cls(work())
        except Exception as error:  # it is the caller's, who asks for the value
            return cls(error=error)

    def get(self) -> D:
        """The value. Raises what the call has raised."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Aside:
    """A thread that makes one call at a time. Leaving the `with` block ends it, and the call that it is at."""

    def __init__(self, name: str) -> None:
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Outcome[Any]]] | None]
        self._asked = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._busy = False
        self._ending = threading.Lock()  # a call does not end while it is being struck

    def _work(self) -> None:
        try:
            while asked := self._asked.get():
                self._answer(*asked)
                del asked  # what it holds may be a large picture, and the next may be long in coming
        except Stopped:
            return

    def _answer(self, work: Callable[[], Any], answer: queue.SimpleQueue[Outcome[Any]]) -> None:
        self._busy = True
        try:
            answer.put(Outcome.of(work))
        except BaseException as error:  # who waits must not wait for ever
            answer.put(Outcome(error=error))
            raise
        finally:
            with self._ending:
                self._busy = False

    def start(self, work: Callable[[], D]) -> Callable[[], Outcome[D]]:
        """Begin a call; what is returned waits for its outcome."""
        answer: queue.SimpleQueue[Outcome[D]] = queue.SimpleQueue()
        self._asked.put((work, answer))
        return answer.get

    def __enter__(self) -> Aside:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._asked.put(None)
        with self._ending:
            if kind is not None and self._busy:
                strike(self._thread, Stopped)
        self._thread.join(PATIENCE_SEC)


def overlapped(
    items: Iterable[A],
    read: Callable[[A], B],
    compute: Callable[[B], C],
    write: Callable[[C], D],
    beside: Callable[[B, B], bool] = lambda last, this: True,
) -> Generator[tuple[A, Outcome[D]], None, None]:
    """(item, outcome of write(compute(read(item)))) of each, in order; one item is read ahead, one is written behind.

    Where `beside` says that the last one and this one do not fit into memory together, the last is waited for.
    """
    with Aside("reading") as reading, Aside("writing") as writing:
        begun = ((item, reading.start(partial(read, item))) for item in items)
        following = next(begun, None)
        last: tuple[A, Outcome[B], Callable[[], Outcome[D]]] | None = None
        while following:
            item, given = following[0], following[1]()
            following = next(begun, None)
            if last and not (given.error or last[1].error or beside(last[1].get(), given.get())):
                yield last[0], last[2]()
                last = None
            made = Outcome.of(lambda given=given: compute(given.get()))  # type: ignore[misc]
            if last:
                yield last[0], last[2]()
            last = item, given, writing.start(lambda made=made: write(made.get()))  # type: ignore[misc]
            del made
        if last:
            yield last[0], last[2]()
