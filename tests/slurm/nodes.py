"""Small hosts on this machine: each has a name, an address, a view of the file system and processes of its own.

They are Linux namespaces, joined by a bridge. All of it lives inside one process namespace (`isolated`), so that
nothing is left running, mounted or configured when the program ends, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = "10.77.0.254"
INSIDE = "SDTRAIN_TEST_INSIDE"
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
PR_SET_PDEATHSIG = 1
SKIPPED = 77  # what test programs answer when they cannot run here


def isolated(program: Path) -> int | None:
    """Run `program` again inside namespaces of its own and return its exit code; None when this is that run."""
    if os.environ.get(INSIDE):
        return None
    unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    if tried.returncode:
        print(f"skipped: no namespaces on this machine ({tried.stderr.strip()}); it takes root")
        return SKIPPED
    first = ["bash", "-c", '"$@"; exit $?', "first"]  # the first process of a namespace has to bury its orphans
    inner = [*unshare, *first, sys.executable, str(program), *sys.argv[1:]]
    process = subprocess.Popen(inner, env={**os.environ, INSIDE: "1"}, preexec_fn=end_with_parent)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: process.kill())  # unshare itself does not listen
    return process.wait()


def end_with_parent() -> None:
    """However the parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Host:
    """One of the small hosts. A process that only sleeps holds its namespaces."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address = name, f"10.77.0.{number}"
        self._link = f"to-{name}"
        held = ["unshare", "--mount", "--net", "--uts", "sleep", "infinity"]
        self._holder = subprocess.Popen(held, stdout=subprocess.DEVNULL)
        while _namespace(self._holder.pid) in (None, _namespace(os.getpid())):
            pass
        must("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid))
        must("ip", "link", "set", self._link, "master", "bridge", "up")
        self.must("hostname", name)
        for words in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"):
            self.must("ip", *words.split())

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self._holder.pid), "--mount", "--net", "--uts", *command]

    def must(self, *command: str) -> str:
        return must(*self.enter(*command))

    def start(self, folder: Path, command: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        """A process in a working directory, which entering a host's file system forgets."""
        return subprocess.Popen(self.enter("env", f"--chdir={folder}", *command), text=True, **more)

    def cut(self) -> None:
        """Nothing reaches it, nothing leaves it, and nobody is told."""
        must("ip", "link", "set", self._link, "nomaster")

    def mend(self) -> None:
        must("ip", "link", "set", self._link, "master", "bridge")

    def processes(self) -> list[int]:
        """Ids of all but the holder."""
        mine = _namespace(self._holder.pid)
        there = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
        return [pid for pid in there if pid != self._holder.pid and _namespace(pid) == mine]

    def lose_power(self) -> int:
        """Kill everything that runs on it, with its link cut: nobody is told. Returns how many processes that were."""
        self.cut()
        killed: set[int] = set()
        while found := self.processes():
            killed.update(found)
            for pid in found:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return len(killed)


def build(*names: str) -> list[Host]:
    """Hosts that know one another by name, numbered from 1, and the machine that they share as `head`."""
    hosts = Path(os.environ["TMPDIR"]) / "hosts"
    lines = ["127.0.0.1 localhost", f"{HEAD} head", *(f"10.77.0.{i} {name}" for i, name in enumerate(names, 1))]
    hosts.write_text("".join(f"{line}\n" for line in lines))
    must("mount", "--bind", str(hosts), "/etc/hosts")
    must("hostname", "head")
    bridge = ("link add bridge type bridge", f"addr add {HEAD}/24 dev bridge", "link set bridge up")
    for words in ("link set lo up", *bridge):
        must("ip", *words.split())
    return [Host(name, number) for number, name in enumerate(names, 1)]


def must(*command: str, **more: Any) -> str:
    """What a command prints. Raises RuntimeError with its complaint when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None
