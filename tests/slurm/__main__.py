"""Jobs on a real Slurm of two small hosts, on this machine; what was seen is printed with seconds.

    python tests/slurm                  all of it, some minutes
    python tests/slurm requeue node     some of it

Takes root and Linux; Slurm is installed by apt-get where it is not there. Everything runs inside namespaces of its own
(nodes.py) and is gone when this ends. Exit code 0: all as it should be, 1: not, 77: this machine cannot do it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(REPO)]

import tiny  # noqa: E402
from cluster import Cluster, install, wait  # noqa: E402
from nodes import SKIPPED, isolated, must  # noqa: E402

END = 320
SHAPE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
LIMIT_SEC = 400.0


class Trial:
    """The cluster, a tiny run, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.monotonic()
        tiny.make_shards(folder / "shards")
        config = tiny.tiny_config(folder / "shards", total_img=END, log_img=32, save_img=32, timeout=20)
        tiny.write_config(folder / "tiny.yaml", config)
        self.cluster = Cluster(folder, "n1", "n2")
        self.see("a controller and two slurmd, n1 and n2, each with an address of its own")

    def see(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {what}", flush=True)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def submit(self, name: str, *words: str, script: str = "sdgan", args: tuple[str, ...] = (), **env: str) -> str:
        """A job of an unchanged script, whose run folder and log carry `name`."""
        own = args or ("--cfg", str(self.folder / "tiny.yaml"), "--out", str(self.folder / name))
        shape = [*SHAPE, "--output", str(self.folder / f"{name}.log")]
        job = self.cluster.submit(*shape, *words, f"slurm/{script}.sh", *own, **env)
        self.see(f"{name}: sbatch {' '.join([*SHAPE, *words])} slurm/{script}.sh is job {job}")
        return job

    def saved(self, name: str) -> int:
        found = (self.folder / name / "checkpoints").glob("img_*/complete.json")
        return max((int(path.parent.name[4:]) for path in found), default=0)

    def until_saved(self, name: str, img: int = 32) -> None:
        wait(lambda: self.saved(name) >= img, LIMIT_SEC, f"{name}: a checkpoint at {img} images")
        self.see(f"{name}: {self.saved(name)} images are saved")

    def must_finish(self, name: str, job: str, restarts: int = 1) -> None:
        """Ends well after at least so many restarts, with the bits of the run that nobody touched."""
        state = self.cluster.ended(job, LIMIT_SEC)
        self.see(f"{name}: {state} after {self.cluster.restarts(job)} restart(s)")
        assert state == "COMPLETED" and self.cluster.restarts(job) >= restarts, self.log(name)
        self.must_equal(name)

    def must_equal(self, name: str) -> None:
        apart = tiny.unequal(tiny.tensors(self.folder / "whole", END), tiny.tensors(self.folder / name, END))
        assert not apart, f"{name}: {len(apart)} tensors are not those of the undisturbed run"
        assert tiny.rows(self.folder / "whole") == tiny.rows(self.folder / name)
        self.see(f"{name}: weights, optimizers and rows are those of the undisturbed run, bit for bit")

    def must_fail(self, name: str, job: str, restarts: int, code: int) -> None:
        state, facts = self.cluster.ended(job, LIMIT_SEC), self.cluster.facts(job)
        self.see(f"{name}: {state}, exit code {facts['ExitCode']}, after {facts['Restarts']} restart(s)")
        found = (state, facts["Restarts"], facts["ExitCode"].partition(":")[0])
        assert found == ("FAILED", str(restarts), str(code)), self.log(name)


def whole(trial: Trial) -> None:
    """Two nodes train together; nobody disturbs them."""
    job = trial.submit("whole")
    assert trial.cluster.ended(job, LIMIT_SEC) == "COMPLETED", trial.log("whole")
    said = trial.log("whole")
    trial.see("whole: COMPLETED; " + "; ".join(re.findall(r"(?:ok   ranks +(?=2)|(?=finished))(.*)", said)))
    assert "2 on 2 host(s) met" in said and "n1, n2" in said and "finished at 320 on 2 rank(s)" in said, said


def requeue(trial: Trial) -> None:
    """A stop signal ends an attempt with 75; the job comes back, and what depends on it waits for its end."""
    job = trial.submit("requeue")
    small = ("--metrics", "rfid", "--num", "8", "--seeds", "1", "--tap", "64", "--workers", "0")
    data = ("--real", str(trial.folder / "shards"), "--cache", str(trial.folder / "cache"))
    args = (str(trial.folder / "requeue"), *small, *data)
    after = trial.submit("after", f"--dependency=afterok:{job}", script="evaluate", args=args)
    trial.until_saved("requeue")
    must("scancel", "--signal=USR1", job)
    wait(lambda: trial.cluster.state(job) == "PENDING", 60, "requeue: back in the queue")
    assert "back into the queue" in trial.log("requeue") and trial.cluster.state(after) == "PENDING"
    trial.see("requeue: SIGUSR1 was obeyed with 75, the job is back in the queue, and evaluate.sh still waits for it")
    trial.must_finish("requeue", job)
    state = trial.cluster.ended(after, LIMIT_SEC)
    assert state == "COMPLETED", trial.log("after")
    trial.see("after: evaluate.sh COMPLETED: " + " ".join(re.findall(r"rfid +[\d.]+", trial.log("after"))))


def preempt(trial: Trial) -> None:
    """A job of a better partition takes the nodes; the run comes back."""
    job = trial.submit("preempt")
    trial.until_saved("preempt")
    first = trial.cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    wait(lambda: trial.cluster.state(first) == "RUNNING", 120, "preempt: the other job has the nodes")
    trial.see(f"preempt: job {first} of partition `high` has the nodes; {trial.saved('preempt')} images are saved")
    trial.must_finish("preempt", job)


def cancel(trial: Trial) -> None:
    """scancel ends a job for good."""
    job = trial.submit("cancel")
    trial.until_saved("cancel")
    must("scancel", job)
    state = trial.cluster.ended(job, 60)
    time.sleep(5)
    assert state == trial.cluster.state(job) == "CANCELLED" and trial.cluster.restarts(job) == 0, trial.log("cancel")
    trial.see("cancel: CANCELLED, and it stays so")


def mistake(trial: Trial) -> None:
    """A user's mistake is said once and not repeated."""
    job = trial.submit("mistake", args=("--cfg", "no_such_configuration"))
    trial.must_fail("mistake", job, restarts=0, code=2)
    assert "configuration 'no_such_configuration' does not exist" in trial.log("mistake")


def crash(trial: Trial) -> None:
    """What crashes at the same image again and again is given up; what it has saved stays."""
    job = trial.submit("crash", SDTRAIN_FAULT="before-marker")
    trial.must_fail("crash", job, restarts=2, code=137)
    assert "has ended at 0 images 3 times in a row: not requeued" in trial.log("crash"), trial.log("crash")
    trial.see("crash: a rank was killed in its first save three times; the job has stopped itself")


def node(trial: Trial) -> None:
    """A node loses power; the job comes back and ends as if nothing had happened."""
    job = trial.submit("node")
    trial.until_saved("node")
    host = trial.cluster.hosts["n2"]
    killed = host.lose_power()
    trial.see(f"node: n2 has lost power: {killed} processes killed, slurmd among them")
    wait(lambda: trial.cluster.state(job) != "RUNNING", 120, "node: the job is no longer running")
    trial.see(f"node: the job is {trial.cluster.state(job)}; n2 boots")
    trial.cluster.boot(host)
    trial.must_finish("node", job)


def bad(trial: Trial) -> None:
    """A node that cannot write, or that others cannot reach, is named before anything is trained."""
    run = trial.folder / "bad"
    run.mkdir()
    host = trial.cluster.hosts["n2"]
    host.must("mount", "-t", "tmpfs", "-o", "ro", "none", str(run))
    job = trial.submit("bad", SDTRAIN_MAX_REQUEUES="0")
    trial.must_fail("bad", job, restarts=0, code=75)
    host.must("umount", str(run))
    [told] = set(re.findall(r"sdtrain: (rank 1 on n2: .*)", trial.log("bad")))
    trial.see(f"bad: {told}")
    job = trial.submit("lost", SDTRAIN_MAX_REQUEUES="0", GLOO_SOCKET_IFNAME="lo")
    trial.must_fail("lost", job, restarts=0, code=75)
    [told] = set(re.findall(r"sdtrain.*: (ranks report, but .*)", trial.log("lost")))
    trial.see(f"lost: a network that joins no hosts: {told}")


LAUNCHERS = {
    "accelerate": "accelerate.commands.launch --config_file launch/nodes.yaml --machine_rank {rank} --num_processes 2 "
    "--main_process_ip {first}",
    "torchrun": "torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr {first}",
}


def link(trial: Trial) -> None:
    """Without Slurm: one launcher a host. A cable that is pulled ends both, in time; started again, they go on."""
    for name in LAUNCHERS:
        cut_off(trial, name)
        trial.cluster.hosts["n2"].mend()
        for host, launcher in launched(trial, name).items():
            assert launcher.wait(LIMIT_SEC) == 0, trial.log(f"{name}-{host}")
        trial.must_equal(name)


def cut_off(trial: Trial, name: str) -> None:
    launchers = launched(trial, name)
    wait(lambda: trial.saved(name) or launchers["n1"].poll() is not None, LIMIT_SEC)
    assert launchers["n1"].poll() is None, trial.log(f"{name}-n1")
    trial.cluster.hosts["n2"].cut()
    began = time.monotonic()
    for host, launcher in launchers.items():
        code, said = launcher.wait(120), trial.log(f"{name}-{host}")
        [told] = re.findall(r"^sdtrain[^:]*: (.*)", said, re.MULTILINE)[:1] or [""]
        trial.see(f"{name}: cut off; {time.monotonic() - began:.0f} s later {host} has ended: {told}")
        assert code != 0 and re.search(r"exitcode *: 75", said), said
    assert "on n2) does not answer" in trial.log(f"{name}-n1"), trial.log(f"{name}-n1")
    assert "cut off at 10.77.0.1:" in trial.log(f"{name}-n2"), trial.log(f"{name}-n2")


def launched(trial: Trial, name: str) -> dict[str, subprocess.Popen[str]]:
    """The launcher of this name on both hosts."""
    train = ["sdtrain/main.py", "--cfg", str(trial.folder / "tiny.yaml"), "--out", str(trial.folder / name)]
    started = {}
    for rank, host in enumerate(trial.cluster.hosts.values()):
        words = LAUNCHERS[name].format(rank=rank, first=trial.cluster.hosts["n1"].address).split()
        with open(trial.folder / f"{name}-{host.name}.log", "w") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            started[host.name] = host.start(REPO, [sys.executable, "-m", *words, *train], **streams)
    return started


SCENES: dict[str, Callable[[Trial], None]] = {
    scene.__name__: scene for scene in (whole, requeue, preempt, cancel, mistake, crash, node, bad, link)
}


def play(names: list[str]) -> int:
    """Returns the number of scenes that went wrong. The first one is what the others are compared with."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TMPDIR": folder, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "SDTRAIN_CPU": "1"}
        trial = Trial(Path(folder))
        for name in dict.fromkeys(["whole", *names]):
            try:
                SCENES[name](trial)
            except (AssertionError, RuntimeError, ValueError):
                failed += 1
                traceback.print_exc()
    trial.see(f"{failed} of {len(set(names) | {'whole'})} went wrong" if failed else "all as it should be")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/slurm", description=__doc__)
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=f"of {', '.join(SCENES)} (default: all)")
    names = parser.parse_args().scenes or list(SCENES)
    if unknown := set(names) - set(SCENES):
        parser.error(f"no such scene: {', '.join(unknown)}")
    if why := install():
        print(f"skipped: {why}")
        return SKIPPED
    code = isolated(HERE / "__main__.py")
    return bool(play(names)) if code is None else code


if __name__ == "__main__":
    sys.exit(main())
