"""What fails on one rank ends all of them, with one sentence.

A rank on which something has failed goes on to the next place where all ranks meet, and says so there: nobody is left
waiting in a collective, and a state that is whole can still be saved by all.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from sdtrain.engine.ranks import first_said, is_main, rank, shares, world
from sdtrain.errors import EXIT_FAULT, RankFailed, UserError
from sdtrain.exits import code_of
from sdtrain.terminal import printable


def me() -> str:
    """This rank, for people."""
    return f"rank {rank()} (pid {os.getpid()} on {os.uname().nodename})"


def explained(error: BaseException) -> str:
    """A sentence on what has failed here; alone, there is no rank to name."""
    said = str(error)
    if not isinstance(error, UserError):  # whose sentences may have several lines
        said = printable((said.splitlines() or ["no reason given"])[0])
    kind = f"{type(error).__name__}: " if code_of(error) == EXIT_FAULT else ""
    return f"{me()}: {kind}{said}" if world() > 1 else f"{kind}{said}"


def raise_together(failure: BaseException | None, intact: bool = True) -> None:
    """Collective. Raises the same `RankFailed` on all ranks when there is a `failure` on any; a fault is shown."""
    mine = None
    if failure is not None:
        mine = (explained(failure), code_of(failure))
        if mine[1] == EXIT_FAULT:
            traceback.print_exception(failure)
    if found := first_said(mine):
        sentence, code = found
        raise RankFailed(sentence, code, intact) from failure


def failure_of(action: Callable[[], object]) -> Exception | None:
    """Do it; what has failed."""
    try:
        action()
    except Exception as error:
        return error
    return None


def main_alone(action: Callable[[], object]) -> None:
    """The main rank does it, the others wait. Raises `RankFailed` on all ranks."""
    raise_together(failure_of(action) if is_main() else None)


def share_out(count: int, work: Callable[[int], object], before_each: Callable[[], None] = lambda: None) -> None:
    """`work` on this rank's numbers below `count`; see `shares`. Raises `RankFailed` on all ranks."""
    failure: Exception | None = None
    for number in shares(count, before_each):
        if failure is None:  # a rank that has failed still meets the others
            failure = failure_of(lambda number=number: work(number))  # type: ignore[misc]
    raise_together(failure)
