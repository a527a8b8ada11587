"""Without these, ranks go on without the launcher that would have ended them, or a run dies with a shell that never
launched it.

Outcome: ranks of torchrun end with it; a process that merely has a launcher's variables does not end with its parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

from sdtrain.engine import launcher

RANK = """
import os, sys, time
from pathlib import Path
from sdtrain.main import end_with_launcher
end_with_launcher()
(Path(sys.argv[1]) / f"{os.environ.get('RANK', 0)}.pid").write_text(str(os.getpid()))
time.sleep(100)
"""
EXPORTED = {"ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "x"}


def wait_for(what: object, limit_sec: float = 90.0) -> bool:
    deadline = time.monotonic() + limit_sec
    while not what() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.05)
    return bool(what())  # type: ignore[operator]


def lives(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def orphans(folder: Path, command: list[str], ranks: int) -> list[int]:
    """Ranks below a parent, which is killed once they stand."""
    (folder / "rank.py").write_text(RANK)
    env = {**os.environ, **EXPORTED, "PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([*command, str(folder / "rank.py"), str(folder)], env=env)
    pids = [folder / f"{rank}.pid" for rank in range(ranks)]
    assert wait_for(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    parent.kill()
    parent.wait()
    return [int(pid.read_text()) for pid in pids]


def test_ranks_of_torchrun_end_with_it_however_it_is_killed(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    pids = orphans(tmp_path, [sys.executable, *launch], 2)
    assert wait_for(lambda: not any(map(lives, pids)), 20.0)


def test_a_process_that_has_a_launchers_variables_goes_on_without_its_shell(tmp_path: Path) -> None:
    [pid] = orphans(tmp_path, ["bash", "-c", f'{sys.executable} "$0" "$1"; true'], 1)
    time.sleep(1)
    assert lives(pid)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "it_is"),
    [
        ("/venv/bin/python /venv/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -u -m torch.distributed.run --standalone train.py", True),
        ("python /lib/torch/distributed/launch.py train.py", True),
        ("/venv/bin/python /venv/bin/accelerate launch train.py", True),
        ("python -m accelerate.commands.launch train.py", True),
        ("bash -c torchrun-like train.py", False),
        ("bash accelerate.sh", False),
        ("python tests/kills.py torchrun", False),
        ("sshd", False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, it_is: bool
) -> None:
    (tmp_path / str(os.getppid())).mkdir()
    (tmp_path / str(os.getppid()) / "cmdline").write_text(words.replace(" ", "\0") + "\0")
    monkeypatch.setattr(launcher, "PROC", tmp_path)
    assert launcher.started_by_launcher(EXPORTED) is it_is
    assert not launcher.started_by_launcher({})
