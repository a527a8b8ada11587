"""`sdtrain suite submit`: every run of a suite as a Slurm job of its own; those that learn start once their teacher has
finished. Jobs carry the names of their runs, and of those with one name Slurm starts one at a time (singleton).
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import EXIT_OK, ConfigError

SCRIPT = Path("slurm", "fine_tune.sh")  # which takes any configuration
TEACHER_ID = "ID-OF-THE-TEACHER"


@dataclass(frozen=True)
class Job:
    """A run to put into the queue."""

    name: str
    words: list[str]
    """What follows the script."""
    teaches: bool = False
    learns: bool = False
    """From the job that teaches, where that is in the list."""


def submit(jobs: Sequence[Job], more: Sequence[str], only_plan: bool) -> int:
    """Hand the jobs to sbatch, with `more` words for it, or print the commands. Raises ConfigError when it refuses."""
    if not SCRIPT.is_file():
        raise ConfigError(f"there is no {SCRIPT} here: submit from the folder that holds sdtrain's job scripts")
    teacher = ""
    for job in jobs:
        command = words_of(job, more, teacher)
        if only_plan:
            print(shlex.join(command))
        else:
            number = queued(command)
            print(f"job {number}: {job.name}{f', after {teacher}' if job.learns and teacher else ''}", flush=True)
        if job.teaches:
            teacher = TEACHER_ID if only_plan else number
    return EXIT_OK


def words_of(job: Job, more: Sequence[str], teacher: str) -> list[str]:
    after = f"afterok:{teacher},singleton" if job.learns and teacher else "singleton"
    own = [f"--job-name={job.name}", f"--dependency={after}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *own, *more, str(SCRIPT), *job.words]


def queued(command: list[str]) -> str:
    """The number of the new job."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"sbatch cannot be started ({error.strerror}); submit where Slurm's commands are") from None
    if done.returncode:
        raise ConfigError(f"{shlex.join(command[:5])} ... was refused: {done.stderr.strip()}; see --sbatch")
    return done.stdout.strip().partition(";")[0]
