"""A Slurm cluster on the small hosts: controller and munge on `head`, one slurmd a host, all files in one folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from nodes import HEAD, Host, build, must

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
REPO = Path(__file__).resolve().parents[2]
GONE_SEC = 10  # a host that is silent this long counts as down

CONF = """
ClusterName=box
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SlurmdTimeout={gone}
KillWait=20
JobRequeue=1
SchedulerParameters=sched_interval=5,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName={names} CPUs=8 RealMemory=2000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


def install() -> str:
    """Slurm from the distribution's packages, where it is not there. Returns why that is impossible, or nothing."""
    if not missing():
        return ""
    if shutil.which("apt-get") is None or os.geteuid():
        return f"{', '.join(missing())} not found; root could install {' '.join(PACKAGES)} by apt-get"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *words], env=quiet, capture_output=True, text=True)
    return f"apt-get cannot install {', '.join(missing())}: {done.stderr.strip()[-200:]}" if missing() else ""


class Cluster:
    """Build it, `submit`, `wait_for`."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        self.hosts = {host.name: host for host in build(*names)}
        conf = CONF.format(folder=folder, head=HEAD, names=",".join(names), gone=GONE_SEC)
        (folder / "slurm.conf").write_text(conf.lstrip())
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        self._munge()
        must("slurmctld", "-f", os.environ["SLURM_CONF"])
        for host in self.hosts.values():
            self.boot(host)
        self.until_idle()

    def _munge(self) -> None:
        key, socket = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        more = [f"--{what}={self.folder / name}" for what, name in files.items()]
        must("munged", "--force", f"--key-file={key}", f"--socket={socket}", *more)

    def boot(self, host: Host) -> None:
        host.mend()
        host.must("slurmd", "-f", os.environ["SLURM_CONF"], "-N", host.name)

    def until_idle(self, limit_sec: float = 60.0) -> None:
        idle = ("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D")
        wait(lambda: must(*idle).strip() == str(len(self.hosts)), limit_sec, "all nodes idle")

    def submit(self, *words: str, **env: str) -> str:
        """The id of a new job."""
        told = must("sbatch", "--parsable", *words, env={**os.environ, **env}, cwd=REPO)
        return told.strip().partition(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol says of a job, by name."""
        return dict(re.findall(r"(\w+)=(\S*)", must("scontrol", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def restarts(self, job: str) -> int:
        return int(self.facts(job)["Restarts"])

    def hurry(self, job: str) -> None:
        """A requeued job is held for two minutes; its last attempt has to leave the nodes before it starts."""
        facts = self.facts(job)
        if facts["JobState"] == "PENDING" and facts["Reason"] == "BeginTime":
            time.sleep(4)
            subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], capture_output=True)

    def ended(self, job: str, limit_sec: float) -> str:
        """How it has ended, whatever number of starts that takes: COMPLETED, FAILED, ..."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        deadline = time.monotonic() + limit_sec
        while (state := self.state(job)) not in over:
            self.hurry(job)
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {job} is {state} after {limit_sec:.0f} s")
            time.sleep(0.5)
        return state


def wait(until: object, limit_sec: float, what: str = "") -> float:
    """Seconds until `until()` holds. Raises RuntimeError when it does not in time."""
    began = time.monotonic()
    assert callable(until)
    while not until():
        if time.monotonic() - began > limit_sec:
            raise RuntimeError(f"{what or 'what was waited for'} did not happen within {limit_sec:.0f} s")
        time.sleep(0.2)
    return time.monotonic() - began
