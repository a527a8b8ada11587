"""What the tests of jobs that go on share: starting, killing again and again, comparing all bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import REPO


def digests(out: Path) -> dict[str, str]:
    """Of every file that is there, hidden ones too."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def started(words: list[str], rank: int = 0, world: int = 1) -> subprocess.Popen[bytes]:
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-m", "sdtrain.cli", *words], env=env, **pipes)


def kill(words: list[str], staged: Path, kills: int, ended: Callable[[], bool], within_sec: float = 0.02) -> None:
    """SIGKILL the command so often, each time a random moment after one more marker has appeared in `staged`.

    Where it was whole before that (`ended`), it begins again; what it had made is compared there.
    """
    chance, struck = random.Random(0), 0
    while struck < kills:
        job = started(words)
        done = len(list(staged.glob("*.json")))
        while job.poll() is None and len(list(staged.glob("*.json"))) == done:
            time.sleep(0.002)
        time.sleep(chance.random() * within_sec)
        struck += job.poll() is None
        job.send_signal(signal.SIGKILL)
        job.wait()
        if ended():
            shutil.rmtree(staged.parent, ignore_errors=True)


def same_shards(out: Path, whole: Path) -> bool:
    """Whether `out` is complete; its shards are then compared with those of an undisturbed job."""
    if not (out / "manifest.json").exists():
        return False
    assert digests(out).items() >= {n: d for n, d in digests(whole).items() if n.endswith(".tar")}.items()
    return True
