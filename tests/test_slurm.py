"""The job scripts, on a Slurm made of stubs. Without these a preempted job could end for good, or a broken one
could requeue itself for ever, and it would be noticed days later. `python tests/slurm` plays jobs on a real Slurm.
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

from sdtrain.data.read.remote import default_cache
from sdtrain.engine.preempt import StopRequest
from sdtrain.engine.watch import Watch

SCRIPTS = sorted(path.name for path in (REPO / "slurm").glob("*.sh") if path.name != "common.sh")
TRAINING = ["fine_tune.sh", "sdakd.sh", "sdgan.sh"]

SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$STUB/calls"
while [ "${1#-}" != "$1" ]; do shift; done
SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$STUB/calls"
[ "$2" = hostnames ] && printf 'node7\\nnode8\\n'
[ "$2" = job ] && echo "JobId=4711 JobState=${STATE:-RUNNING} Reason=None"
exit 0
"""
PYTHON = f"""#!/usr/bin/env bash
echo "python $* RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE AT=$MASTER_ADDR:$MASTER_PORT" >> "$STUB/calls"
echo "shards are kept in $SDTRAIN_SHARDS; srun takes $SRUN_CPUS_PER_TASK CPUs" >> "$STUB/calls"
case "$*" in
    "-m sdtrain.cli doctor "*) exit "${{DOCTOR:-0}}" ;;
    "-m sdtrain.cli requeue "*) exec {sys.executable} "$@" ;;
esac
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
        "SLURM_CPUS_PER_TASK": "8",
        "SDTRAIN_ENV": "/no/such/file",
        "SDTRAIN_SCRATCH": str(tmp_path / "scratch"),
        "PYTHONPATH": str(REPO),
    }


@pytest.fixture
def own(tmp_path: Path) -> tuple[str, ...]:
    """Arguments that keep a run out of the repository."""
    return ("--cfg", "sdakd_realesrgan", "--out", str(tmp_path / "run"))


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
    assert "RANK=3 LOCAL_RANK=1 WORLD_SIZE=8 AT=node7:14711" in calls


def test_ranks_get_the_cores_they_asked_for_and_keep_shards_on_a_disk_of_their_node(slurm, tmp_path):
    _, _, calls = job(slurm, "sdakd.sh", "0")
    [kept] = (tmp_path / "scratch").iterdir()
    assert kept.name.startswith("sdtrain-") and kept.stat().st_mode & 0o777 == 0o700
    assert f"shards are kept in {kept}/shards; srun takes 8 CPUs" in calls


def test_data_without_a_cache_of_its_own_uses_the_disk_of_the_node(monkeypatch, tmp_path):
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "shared"))
    assert default_cache() == tmp_path / "shared" / "shards"
    monkeypatch.setenv("SDTRAIN_SHARDS", str(tmp_path / "scratch"))
    assert default_cache() == tmp_path / "scratch"


def test_a_scratch_folder_of_somebody_else_is_not_used(slurm, tmp_path):
    (tmp_path / "scratch").mkdir()
    name = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "scratch" / f"sdtrain-{name}").symlink_to(tmp_path)
    assert "shards are kept in ;" in job(slurm, "sdakd.sh", "0")[2]


@pytest.mark.parametrize("script", TRAINING)
def test_all_ranks_are_looked_at_before_any_trains(slurm, script, own):
    code, printed, calls = job(slurm, script, "0", *own)
    assert code == 0, printed
    doctor, main = calls.index("-m sdtrain.cli doctor --ranks --within 30 --cfg"), calls.index("sdtrain/main.py --cfg")
    assert doctor < main


def test_a_bad_host_ends_an_attempt_before_training_and_a_bad_configuration_ends_the_job(slurm, own):
    code, _, calls = job({**slurm, "DOCTOR": "75"}, "sdgan.sh", "0", *own)
    assert code == 0 and "sdtrain/main.py" not in calls and calls.count("scontrol requeue 4711") == 1
    code, _, calls = job({**slurm, "DOCTOR": "2"}, "sdgan.sh", "0", *own)
    assert code == 2 and "sdtrain/main.py" not in calls and calls.count("scontrol requeue 4711") == 1


@pytest.mark.parametrize("script", TRAINING)
def test_a_job_that_stopped_on_request_goes_back_into_the_queue(slurm, script, own):
    code, printed, calls = job(slurm, script, "75", *own)
    assert code == 0, printed
    assert calls.count("scontrol requeue 4711") == 1


@pytest.mark.parametrize("code", ["0", "2"])
def test_neither_the_end_of_a_run_nor_a_mistake_of_the_user_requeues(slurm, code, own):
    ended, printed, calls = job(slurm, "sdgan.sh", code, *own)
    assert ended == int(code), printed
    assert "requeue" not in calls


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "NODE_FAIL", "PREEMPTED"])
def test_a_job_that_slurm_is_ending_is_left_to_it(slurm, state, own):
    """A requeue by the script would bring a cancelled job back, and add to the one of Slurm itself."""
    ended, printed, calls = job({**slurm, "STATE": state}, "sdgan.sh", "75", *own)
    assert ended == 75 and f"Slurm ends this job itself ({state})" in printed
    assert "requeue" not in calls


def checkpoint(run: Path, img: int) -> None:
    folder = run / "checkpoints" / f"img_{img:09d}"
    folder.mkdir(parents=True)
    (folder / "complete.json").touch()


@pytest.mark.parametrize("code", ["1", "75", "137"])
def test_the_third_end_at_one_image_stops_the_job(slurm, code, own, tmp_path):
    checkpoint(tmp_path / "run", 1600)
    (tmp_path / "run" / "checkpoints" / "img_000009999").mkdir()  # unfinished
    for _ in range(2):
        assert job(slurm, "sdgan.sh", code, *own)[0] == 0
    ended, printed, calls = job(slurm, "sdgan.sh", code, *own)
    assert ended == int(code) and calls.count("scontrol requeue 4711") == 2
    assert f"{tmp_path}/run has ended at 1,600 images 3 times in a row: not requeued" in printed


def test_a_run_that_crashes_but_moves_goes_on_and_so_does_one_that_is_submitted_again(slurm, own, tmp_path):
    for img in (100, 200, 300, 400):
        checkpoint(tmp_path / "run", img)
        assert job(slurm, "sdgan.sh", "1", *own)[0] == 0
    assert job(slurm, "sdgan.sh", "1", *own)[0] == 0
    assert job({**slurm, "SLURM_JOB_ID": "4712"}, "sdgan.sh", "1", *own)[0] == 0
    assert job({**slurm, "SDTRAIN_MAX_CRASHES": "1"}, "sdgan.sh", "1", *own)[0] == 1


def test_a_damaged_note_of_earlier_ends_is_no_obstacle(slurm, own, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".attempts").write_text("[")
    assert job(slurm, "sdgan.sh", "1", *own)[0] == 0


def test_a_job_is_not_requeued_for_ever(slurm, own):
    env = {**slurm, "SLURM_RESTART_COUNT": "3", "SDTRAIN_MAX_REQUEUES": "3"}
    code, printed, calls = job(env, "sdakd.sh", "75", *own)
    assert code == 75 and "requeue 4711" not in calls
    assert "requeued 3 times already (SDTRAIN_MAX_REQUEUES=3): not again" in printed


def test_arguments_reach_training_and_replace_the_configuration(slurm):
    _, _, calls = job(slurm, "sdakd.sh", "0", "--cfg", "sdakd_gcfsr", "--set", "student.C=1/4")
    assert "python sdtrain/main.py --cfg sdakd_gcfsr --set student.C=1/4 RANK" in calls


def test_a_signal_to_the_job_script_reaches_python_and_the_end_it_asked_for_does_not_count(slurm, own):
    calls = Path(slurm["STUB"]) / "calls"
    env = {**slurm, "CODE": "wait", "SDTRAIN_MAX_CRASHES": "1"}
    running = subprocess.Popen(["bash", "slurm/sdakd.sh", *own], env=env, cwd=REPO, stdout=subprocess.PIPE, text=True)
    for _ in range(100):
        time.sleep(0.05)
        if calls.exists() and "sdtrain/main.py" in calls.read_text():
            break
    time.sleep(0.2)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=20) == 0
    assert "python got USR1" in calls.read_text() and "scontrol requeue 4711" in calls.read_text()


def test_a_rank_says_what_it_saw_when_the_store_has_gone_with_the_first_rank(monkeypatch):
    """Slurm starts no launcher that would keep it."""

    class Gone:
        def compare_set(self, *_: str) -> bytes:
            raise RuntimeError("Connection was likely closed")

    watch = Watch(1.0, StopRequest())
    monkeypatch.setattr(watch, "_store", Gone())
    assert watch._raise_alarm("rank 1 lost the others", 75, stacks=False)["sentence"] == "rank 1 lost the others"


def test_fine_tuning_asks_for_a_configuration(slurm):
    done = subprocess.run(["bash", "slurm/fine_tune.sh"], env=slurm, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2 and "name a configuration" in done.stderr


SUBJECTS = [("evaluate.sh", "what to measure"), ("pack.sh", "what to pack"), ("data_set.sh", "what to do")]


@pytest.mark.parametrize(("script", "what"), SUBJECTS)
def test_jobs_that_run_once_ask_for_their_subject(slurm, script, what):
    done = subprocess.run(["bash", f"slurm/{script}"], env=slurm, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2 and f"sdtrain: say {what}" in done.stderr


@pytest.mark.parametrize("script", ["evaluate", "pack", "data_set"])
@pytest.mark.parametrize("code", ["0", "1", "2"])
def test_these_jobs_run_once_on_all_ranks_and_hand_their_exit_code_on(slurm, script, code):
    command = script if script != "data_set" else "upscale"
    ended, _, calls = job(slurm, f"{script}.sh", code, *([command] * (script == "data_set")), "one", "two words")
    assert ended == int(code) and "requeue" not in calls and "doctor" not in calls
    assert f"python -m sdtrain.cli {command} one two words RANK=3" in calls


@pytest.mark.parametrize("script", SCRIPTS)
def test_job_scripts_ask_slurm_for_what_resuming_needs(script):
    text = (REPO / "slurm" / script).read_text()
    for line in ("--requeue", "--open-mode=append", *(["--signal=USR1@120"] if script in TRAINING else [])):
        assert f"#SBATCH {line}\n" in text


def test_the_settings_at_the_top_of_all_job_scripts_have_one_form():
    for script in SCRIPTS:
        lines = (REPO / "slurm" / script).read_text().splitlines()
        begin = lines.index("# Settings; without the second # they count. What all jobs share is in slurm/common.sh.")
        names = [line.strip("#").removeprefix("SBATCH --").partition("=")[0] for line in lines[begin + 1 :]]
        names = names[: names.index("")]
        gpus = ["gpus-per-node"] * (script != "pack.sh")
        wanted = ["account", "partition", "job-name", "nodes", "ntasks-per-node", *gpus, "cpus-per-task", "time"]
        assert names[: len(wanted)] == wanted
