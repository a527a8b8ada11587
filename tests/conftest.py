"""Helpers every test file shares: where optional data lies, and how to run real ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What strange names have printed is told between processes of tests in UTF-8, which has no lone surrogates."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


def shared_dir(*parts: str) -> Path:
    """A folder of the optional shared data (`SDTRAIN_SHARED`, else ../shared); skips the test when it is absent."""
    root = Path(os.environ.get("SDTRAIN_SHARED", REPO.parent / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"optional data is absent: {path.name} (set SDTRAIN_SHARED to the folder that holds it)")
    return path


def asked(request: pytest.FixtureRequest, names: Iterable[str]) -> list[str]:
    """Those `names` that tests of this module were collected with, so that one test alone costs one job."""
    found = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    wanted = {item.callspec.params.get("name") for item in found if hasattr(item, "callspec")}
    return [name for name in names if name in wanted]


Done = subprocess.CompletedProcess[str]


def run_python(*args: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    """Run this interpreter on `args` from the repository root, one thread a process, and return what it printed."""
    full_env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=full_env, timeout=timeout)


def run_ranks(num_ranks: int, *args: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    """Run a script on real processes through torchrun; the script must assert the world size it expects."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks))
    return run_python(*launch, *args, env=env, timeout=timeout)
