"""What a class of inputs is, and the loop that reads thousands of them in child processes that may not misbehave.

An input is a function of (seed, class, number). It is read in a forked child whose output is swallowed. It fails by

    an exception other than UserError, or the end of the process
    more than `seconds` of computing, or six times as long on the clock
    memory that grows by more than `memory_mb`
    a file written, changed or removed outside its own folder and the home folder, both of which are temporary
    a shell that is started, or a connection to anywhere but 127.0.0.1

The child stands in an empty folder with the file `../canary` beside it (`../../canary` from the input's folder), so
that `touch canary` or `rm ../canary` in an input are noticed wherever it was made.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from forks import renew_threads

from sdtrain.errors import EXIT_USER_ERROR, RankFailed, UserError

BLOCK = 50  # inputs a child reads, unless one ends it
PATIENCE = 6  # clock seconds a second of computing: other programs want the cores too
ROOM_MB = 8_192  # addresses a process may take beyond its limit: libraries and threads reserve more than they use
LONGEST_SENTENCE = 20_000
LOCAL = ("127.0.0.1", "localhost", "::1", "", None)


class Inputs(NamedTuple):
    """One class of inputs and its reader."""

    make: Callable[[Random, Path], Path]
    """Writes one input into an empty folder and returns the path that is read; a function of the seed alone."""
    use: Callable[[Path], object]
    """Reads it as users do. Right are: any answer, or a UserError; wrong: any other exception, a signal, a limit."""
    seconds: float = 10.0
    """The most that one input may take."""
    memory_mb: int = 512
    """The most that reading one input may add to the memory of the process."""


@dataclass
class Result:
    """What became of the inputs of one class."""

    name: str
    tried: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    """Number -> what went wrong."""
    seconds: float = 0.0
    peak_mb: float = 0.0


def run_class(name: str, inputs: Inputs, numbers: Iterable[int], seed: int, keep: Path | None = None) -> Result:
    """Read the inputs with these numbers. Those that fail are copied into `keep`."""
    result, left, started = Result(name), list(numbers), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sdtrain-fuzz-") as room:
        while left:
            done = _block(name, inputs, left[:BLOCK], seed, Path(room))
            for number, (why, grown_mb) in zip(left, done):
                result.tried += 1
                result.peak_mb = max(result.peak_mb, grown_mb)
                if why:
                    result.failed[number] = why
                if why and keep:
                    _keep(Path(room) / "inputs" / str(number), keep / f"{name.replace(' ', '_')}-{number}")
            left = left[len(done) :]
            _empty(Path(room))
    result.seconds = time.monotonic() - started
    return result


def _keep(folder: Path, place: Path) -> None:
    if folder.is_dir():
        with contextlib.suppress(shutil.Error):  # pipes and dangling links
            shutil.copytree(folder, place, symlinks=True, dirs_exist_ok=True)


def _empty(room: Path) -> None:
    for path in room.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


# The parent


def _block(name: str, inputs: Inputs, numbers: list[int], seed: int, room: Path) -> list[tuple[str, float]]:
    """(what went wrong or "", MB grown) of each input up to the end of the child that reads them."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(name, inputs, numbers, seed, room, send)
    os.close(send)
    try:
        done, problem = _listen(receive, child, inputs, len(numbers))
    finally:
        os.close(receive)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has started goes with it
        status = os.waitpid(child, 0)[1]
    if len(done) < len(numbers) and not (done and done[-1][0]):
        done.append((problem or _ending(status, inputs), 0.0))
    return done


def _listen(pipe: int, child: int, inputs: Inputs, expected: int) -> tuple[list[tuple[str, float]], str]:
    """What the child tells until it ends, and why it was ended, if it was."""
    told, at_start, heard = b"", _status(child, "VmRSS"), time.monotonic()
    problem = ""
    while not problem and told.count(b"\n") < expected:
        if select.select([pipe], [], [], 0.05)[0]:
            data = os.read(pipe, 1 << 16)
            if not data:
                break
            told, heard = told + data, time.monotonic()
        elif time.monotonic() - heard > PATIENCE * inputs.seconds:
            problem = f"no answer within {PATIENCE * inputs.seconds:g} s"
        elif _status(child, "VmRSS") - at_start > 2 * inputs.memory_mb:
            problem = f"memory grows by more than {2 * inputs.memory_mb} MB"
    return [tuple(json.loads(line)) for line in told.splitlines()], problem


def _ending(status: int, inputs: Inputs) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGPROF:
        return f"more than {inputs.seconds:g} s of computing"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"the process was ended with code {code}"


def _status(pid: int | str, key: str) -> float:
    """MB of a line of /proc/PID/status; 0 where there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    return 0.0


# The child


def _child(name: str, inputs: Inputs, numbers: list[int], seed: int, room: Path, send: int) -> None:
    """Read the inputs, tell of each, end."""
    code = 0
    try:
        os.setsid()
        faulthandler.disable()
        renew_threads()
        _seclude(room, inputs)
        for number in numbers:
            why, grown_mb = _one(Random(f"{seed} {name} {number}"), inputs, room, number)
            os.write(send, f"{json.dumps([why, round(grown_mb, 1)])}\n".encode())
            if why:
                break
            shutil.rmtree(room / "inputs" / str(number), ignore_errors=True)
    except BaseException:
        code = 99
    finally:
        os._exit(code)


def _seclude(room: Path, inputs: Inputs) -> None:
    """No output, no network, no core files, an own home, and no more addresses than it can need."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for folder in ("here", "home", "inputs"):
        (room / folder).mkdir(exist_ok=True)
    (room / "canary").write_text("alive")
    os.chdir(room / "here")
    os.environ.update(HOME=str(room / "home"), XDG_CACHE_HOME=str(room / "home"))
    most = int(_status("self", "VmSize") + inputs.memory_mb + ROOM_MB) << 20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_guard)


FORBIDDEN: list[str] = []  # what the input now being read has reached for


def _guard(event: str, args: tuple[Any, ...]) -> None:
    """Raises OSError for connections that leave this machine and for shells."""
    what = ""
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in LOCAL:
        what = f"a connection to {args[1][0]}"
    elif event == "socket.getaddrinfo" and args[0] not in LOCAL:
        what = f"the address of {args[0]}"
    elif event == "os.system" or event == "subprocess.Popen" and Path(str(args[0])).name in ("sh", "bash"):
        what = f"a shell: {args[0] if event == 'os.system' else args[1]}"
    if what:
        FORBIDDEN.append(what)
        raise OSError(errno.ENETUNREACH, "forbidden here")


def _one(chance: Random, inputs: Inputs, room: Path, number: int) -> tuple[str, float]:
    folder = room / "inputs" / str(number)
    folder.mkdir()
    try:
        path = inputs.make(chance, folder)
    except BaseException as error:
        return f"the input cannot be made: {told(error)}", 0.0
    before = _status("self", "VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    peak = _status("self", "VmHWM")
    FORBIDDEN.clear()
    signal.setitimer(signal.ITIMER_PROF, inputs.seconds)
    why = attempt(inputs.use, path)
    signal.setitimer(signal.ITIMER_PROF, 0)
    now = _status("self", "VmHWM")
    grown_mb = now - before if now > peak else 0.0
    if grown_mb > inputs.memory_mb:
        why = why or f"memory grew by {grown_mb:.0f} MB"
    if FORBIDDEN:
        why = f"reached for {FORBIDDEN[0]}"
    return why or strayed(room, folder), grown_mb


def attempt(use: Callable[[Path], object], path: Path) -> str:
    """What went wrong, or ""."""
    try:
        use(path)
    except (UserError, RankFailed) as error:
        if isinstance(error, RankFailed) and error.code != EXIT_USER_ERROR:
            return told(error)
        sentence = str(error)
        if not sentence.strip():
            return "a UserError without a sentence"
        return "" if len(sentence) < LONGEST_SENTENCE else f"a UserError of {len(sentence)} characters"
    except SystemExit as error:
        return "" if error.code in (0, 2, None) else f"exit {error.code}"
    except BaseException as error:
        return told(error)
    return ""


def told(error: BaseException) -> str:
    """The last line of a traceback, and the last place of it that is ours."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200].encode("ascii", "replace").decode()
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "sdtrain" in frame.filename.split(os.sep)] or frames
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name})" if ours else ""
    return said + place


def strayed(room: Path, folder: Path) -> str:
    """What was written where nothing may be written, or ""."""
    try:
        if (room / "canary").read_text() != "alive":
            return "the canary was changed"
    except OSError:
        return "the canary was removed"
    free = {"here", "home", "inputs", "canary"}
    new = [path for path in room.iterdir() if path.name not in free]
    new += [*(room / "here").iterdir(), *(path for path in (room / "inputs").iterdir() if path != folder)]
    return f"wrote {new[0].relative_to(room)} outside its folder" if new else ""
