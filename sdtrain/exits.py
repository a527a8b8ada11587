"""How a process ends: a mistake of the user is one sentence, the ranks part in order, and the exit code arrives.

Exit codes: 0 finished, 2 a mistake of the user (one sentence, no traceback), 75 stopped on request with a checkpoint
saved, or given up because a process died or hangs (the same command goes on), 130 interrupted, anything else a fault.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable

from sdtrain.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    MachineError,
    RankFailed,
    UserError,
)
from sdtrain.terminal import text_only

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ESTALE)
NO_MEMORY = re.compile("allocate memory|out of memory|not enough memory")


def run_command(command: Callable[[], int]) -> int:
    """Call it and return an exit code; a `UserError` becomes one sentence on stderr. Nothing steers the terminal."""
    with text_only():
        return _answered(command)


def _answered(command: Callable[[], int]) -> int:
    try:
        return command()
    except UserError as error:
        tell(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as reason:
        tell(reason if reason.args else "interrupted")
        return EXIT_INTERRUPTED
    except MachineError as error:
        tell(error)
        return EXIT_REQUEUE
    except RankFailed as failure:  # all ranks say the same
        print(f"sdtrain: {failure.sentence}", file=sys.stderr)
        return failure.code
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        where = f" ({error.filename})" if error.filename else ""
        tell(f"a file cannot be written: {error.strerror}{where}; make room, or make it writable, and try again")
        return EXIT_USER_ERROR


def code_of(error: BaseException) -> int:
    """What a process ends with that this has ended: another attempt may help, somebody must mend it, or a fault."""
    no_memory = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    if isinstance(error, MachineError | MemoryError) or no_memory:
        return EXIT_REQUEUE
    mend = isinstance(error, UserError) or isinstance(error, OSError) and error.errno in OF_THE_DISK
    return EXIT_USER_ERROR if mend else EXIT_FAULT


def tell(error: object) -> None:
    """Print the sentence once: until ranks have met all see the same problem, afterwards it may be one rank's own."""
    ranks, rank = sys.modules.get("sdtrain.engine.ranks"), os.environ.get("RANK", "0")
    met = ranks is not None and ranks.world() > 1 and not getattr(error, "of_all", False)
    alone = getattr(error, "of_one", False) and os.environ.get("WORLD_SIZE", "1") != "1"
    if met or alone or rank == "0":
        who = f" (rank {ranks.rank() if met and ranks else rank})" if met or alone else ""
        print(f"sdtrain{who}: {error}", file=sys.stderr)


def part(code: int) -> int:
    """Leave the other ranks and end this process with `code`; alone, just return it."""
    ranks = sys.modules.get("sdtrain.engine.ranks")
    if ranks is None or ranks.world() == 1:
        return code
    if code == EXIT_OK:
        ranks.barrier()  # nobody closes connections while another still sends
        ranks.destroy()  # after a fault it may wait for others that never come
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what threads of the group do in the interpreter's exit may abort a finished process
