"""The job scripts, on a Slurm made of two stubs. Without these a preempted job could end for good, or a broken one
could requeue itself for ever, and it would be noticed days later.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import REPO

SCRIPTS = sorted(path.name for path in (REPO / "slurm").glob("*.sh") if path.name != "common.sh")

SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$STUB/calls"
while [ "${1#-}" != "$1" ]; do shift; done
SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$STUB/calls"
[ "$1" = show ] && printf 'node7\\nnode8\\n'
exit 0
"""
PYTHON = """#!/usr/bin/env bash
echo "python $* RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE AT=$MASTER_ADDR:$MASTER_PORT" >> "$STUB/calls"
if [ "$CODE" = wait ]; then
    trap 'echo "python got USR1" >> "$STUB/calls"; exit 75' USR1
    for i in $(seq 100); do sleep 0.1; done
    exit 1
fi
exit "$CODE"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment as a job of Slurm has it, with stubs that note how they were called."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        stub = tmp_path / name
        stub.write_text(text)
        stub.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STUB": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(REPO),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4",
        "SDTRAIN_ENV": "/no/such/file",
    }


def job(env: dict[str, str], script: str, code: str, *args: str) -> tuple[int, str, str]:
    """Exit code of the job, what it printed, and the calls of its stubs."""
    done = subprocess.run(
        ["bash", f"slurm/{script}", *args], env={**env, "CODE": code}, capture_output=True, text=True, cwd=REPO
    )
    return done.returncode, done.stdout + done.stderr, (Path(env["STUB"]) / "calls").read_text()


def test_every_rank_is_told_who_it_is_and_where_to_meet(slurm):
    code, _, calls = job(slurm, "sdakd.sh", "0")
    assert code == 0
    assert "scontrol show hostnames node[7-8]" in calls
    assert "RANK=3 LOCAL_RANK=1 WORLD_SIZE=8 AT=node7:24711" in calls


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_stopped_on_request_goes_back_into_the_queue(slurm, script):
    code, printed, calls = job(slurm, script, "75", "--cfg", "sdakd_realesrgan")
    assert code == 0, printed
    assert calls.count("scontrol requeue 4711") == 1


@pytest.mark.parametrize("code", ["0", "1", "2", "137"])
def test_no_other_exit_code_requeues(slurm, code):
    ended, printed, calls = job(slurm, "sdgan.sh", code)
    assert ended == int(code), printed
    assert "requeue 4711" not in calls


def test_a_job_is_not_requeued_for_ever(slurm):
    env = {**slurm, "SLURM_RESTART_COUNT": "3", "SDTRAIN_MAX_REQUEUES": "3"}
    code, printed, calls = job(env, "sdakd.sh", "75")
    assert code == 75 and "requeue 4711" not in calls
    assert "requeued 3 times already (SDTRAIN_MAX_REQUEUES=3): not again" in printed


def test_arguments_reach_training_and_replace_the_configuration(slurm):
    _, _, calls = job(slurm, "sdakd.sh", "0", "--cfg", "sdakd_gcfsr", "--set", "student.C=1/4")
    assert "python sdtrain/main.py --cfg sdakd_gcfsr --set student.C=1/4 RANK" in calls


def test_a_signal_to_the_job_script_reaches_python_and_the_job_is_requeued(slurm):
    calls = Path(slurm["STUB"]) / "calls"
    env = {**slurm, "CODE": "wait"}
    running = subprocess.Popen(["bash", "slurm/sdakd.sh"], env=env, cwd=REPO, stdout=subprocess.PIPE, text=True)
    for _ in range(100):
        time.sleep(0.05)
        if calls.exists() and "RANK=3" in calls.read_text():
            break
    time.sleep(0.2)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=20) == 0
    assert "python got USR1" in calls.read_text() and "scontrol requeue 4711" in calls.read_text()


def test_fine_tuning_asks_for_a_configuration(slurm):
    done = subprocess.run(["bash", "slurm/fine_tune.sh"], env=slurm, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2 and "name a configuration" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_job_scripts_ask_slurm_for_what_resuming_needs(script):
    text = (REPO / "slurm" / script).read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=USR1@120"):
        assert f"#SBATCH {line}\n" in text
