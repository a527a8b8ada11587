"""What the tests of whole runs share: a small data set, a tiny configuration, and a way to run many jobs in one launch.

Started as a program (`python tests/tiny.py JOBS.json`, alone or under torchrun) it runs `main.py` once a job: alone,
each job is a forked process that may be killed; on several ranks they follow one another in one process group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forks import renew_threads
from PIL import Image

SIDE, SAMPLES, SHARDS = 32, 48, 3
SIGNAL_POINTS = {
    "before the first step": ("sdtrain.main", "write_down"),
    "in a step": ("sdtrain.trainer", "Trainer.advance"),
    "while waiting for data": ("sdtrain.data.read.stream", "Stream.__next__"),
    "in a save": ("sdtrain.run", "Run.save"),
}
LONG_POINTS = {
    "while the data is opened": ("sdtrain.plan", "check_data"),
    "in pictures": ("sdtrain.tasks.generation", "GenerationTask.pictures"),
    "in an evaluation": ("sdtrain.metrics.evaluate", "Evaluator._round"),
    "in a collective": ("torch.distributed", "all_reduce"),
    "inside a save": ("sdtrain.engine.saving", "Saver._write"),
    "with a worker": ("sdtrain.data.read.pool", "Pool.wait"),
}
WRITERS = {
    "file": ("sdtrain.files", "AtomicFile.commit"),
    "rows": ("sdtrain.engine.runfolder", "_append"),
    "board": ("tensorboard.summary.writer.record_writer", "RecordWriter.write"),
}
FAILING_POINTS = {
    "in a loss": ("sdtrain.engine.phases", "PhaseEngine.loss"),
    "while chunks are made": ("sdtrain.trainer", "Trainer.chunks"),
    "in a grid": ("sdtrain.tasks.generation", "grid"),
    "in features": ("sdtrain.metrics.features", "Extractor.__call__"),
}
POINTS = SIGNAL_POINTS | LONG_POINTS | FAILING_POINTS


def picture(number: int) -> np.ndarray:
    """A smooth colour gradient with a disc, [SIDE, SIDE, 3] uint8, a function of its number."""
    chance = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2), -1)
    base = grid @ chance.normal(size=(2, 3)) * 60 + chance.uniform(60, 200, 3)
    disc = np.linalg.norm(grid - chance.uniform(-0.5, 0.5, 2), axis=-1) < chance.uniform(0.2, 0.6)
    base[disc] = chance.uniform(0, 255, 3)
    return base.clip(0, 255).astype(np.uint8)


def make_shards(folder: Path, samples: int = SAMPLES, side: int = SIDE) -> Path:
    """Plain webdataset tars of PNGs, each the upper left corner of its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(shard, samples, SHARDS):
                data = io.BytesIO()
                Image.fromarray(picture(number)[:side, :side]).save(data, "PNG")
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(data.getvalue())
                tar.addfile(member, io.BytesIO(data.getvalue()))
    return folder


def tiny_config(shards: Path, **changes: Any) -> dict[str, Any]:
    """SD-GAN with ProjectedGAN's networks, 4 ghosts of 4 images, everything on, sized for a core and some seconds.

    `changes` name keys with two underscores for the dot: `sd__loss="l2"`.
    """
    generator = {"kind": "fastgan", "z_dim": 16, "ngf": 2, "num_embeddings": 1}
    discriminator: dict[str, Any] = {"kind": "projected", "num_discs": 2, "interpolate_to": None}
    discriminator |= {"projection_width": 8, "head_width": 8, "num_embeddings": 1}
    config: dict[str, Any] = {
        "method": "sdgan",
        "batch_size": 16,
        "ghost_batch": 4,
        "total_img": 96,
        "log_img": 32,
        "sample_img": 0,
        "eval_img": 0,
        "save_img": 32,
        "snapshots": [],
        "tracker": "none",
        "data": {"train": str(shards), "workers": 0, "xflip": True, "cache": str(shards.parent / "cache")},
        "model": {"generator": generator, "discriminator": discriminator},
        "augment": {"kind": "diffaug"},
        "sd": {"alpha": 1.0, "loss": "l1"},
        "weights": {"lpips": "random", "features": "random", "inception": "random"},
        "optimizer": {"G": {"lr": 2.0e-4}, "D": {"lr": 2.0e-4}},
    }
    for key, value in changes.items():
        inner = config
        *outer, last = key.split("__")
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def run_jobs(folder: Path, jobs: list[dict[str, Any]], ranks: int = 1) -> list[dict[str, Any]]:
    """Run jobs {args, before, env, signal, harm, nan, limit, patch, meanwhile}.

    Returns {code, said} of each, or {ranks: [...]}. A job with its own number of `ranks` is run by that many forked
    processes, of which some may be killed or hang.
    """
    from conftest import run_python, run_ranks

    file = folder / f"jobs_{ranks}_{len(list(folder.glob('jobs_*')))}.json"
    file.write_text(json.dumps(jobs))
    program = str(Path(__file__).resolve())
    run = run_python if ranks == 1 else functools.partial(run_ranks, ranks)
    done = run(program, str(file), timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    if ranks == 1:
        return note_seconds(json.loads(file.with_suffix(".0").read_text()))
    found = [json.loads(file.with_suffix(f".{r}").read_text()) for r in range(ranks)]
    return [{"ranks": list(of_job)} for of_job in zip(*found, strict=True)]


def note_seconds(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to the file that `python tests/faults` names how long jobs lasted after their faults."""
    each = [one for job in done for one in job.get("ranks", [job])]
    if seconds := [one["lasted_sec"] for one in each if "lasted_sec" in one]:
        with open(os.environ.get("FAULT_SECONDS", os.devnull), "a") as file:
            file.write(f"{max(seconds)}\n")
    return done


def rows(out: Path, *kinds: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of the given kinds (default: those without times in them)."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] in (kinds or ("train", "eval"))]


def tensors(out: Path, img: int) -> dict[str, Any]:
    """Every tensor of a checkpoint by FILE:NAME, and its state without what names the world."""
    from safetensors.numpy import load_file

    folder = out / "checkpoints" / f"img_{img:09d}"
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {f"{file.stem}:{name}": value for name, value in load_file(file).items()}
    assert found, folder
    return found


def unequal(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names whose bits differ, or that one side lacks."""
    return [n for n in one.keys() | two.keys() if n not in one or n not in two or not np.array_equal(one[n], two[n])]


def worst(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> tuple[float, str]:
    """The largest relative difference of any logged number of two lists of rows, and its name."""
    assert len(one) == len(two) and one
    found = (0.0, "")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in (n for n in a if isinstance(a[n], float)):
            found = max(found, (abs(a[name] - b[name]) / max(abs(a[name]), 1e-12), f"{name} at {a['seen_img']}"))
    return found


# As a program


def digest_of(players: dict[str, Any]) -> str:
    """All parameters and optimizer states of all players."""
    sha = hashlib.sha256()
    for player in players.values():
        for name, value in [*player.named.items(), *sorted(player.state().items())]:
            sha.update(name.encode() + value.detach().numpy().tobytes())
    return sha.hexdigest()


@contextlib.contextmanager
def wrapped(module: str, path: str, make: Any) -> Iterator[None]:
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def signalled(job: dict[str, Any], rank: int) -> Any:
    """Send this process a signal when it reaches the point of the job for the n-th time."""
    request = job["signal"]
    calls = [0]

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == request.get("time", 1) and rank == request.get("rank", 0):
                struck()
                for _ in range(presses := request.get("presses", 1)):
                    os.kill(os.getpid(), getattr(signal, request["name"]))
                    time.sleep(0.1 * (presses > 1))  # two that come at once are one
                if presses > 1:
                    time.sleep(request.get("wait", 60))  # which is to be cut short
            return original(*args, **kwargs)

        return call

    return wrapped(*POINTS[request["point"]], make)


def harmed(job: dict[str, Any], rank: int) -> Any:
    """At a point, for the n-th time, on one rank: sleep, stop this process, or do something to a decoding process."""
    wish = job["harm"]
    calls = [0]

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == wish.get("time", 1) and rank == wish.get("rank", 0):
                struck()
                if "file" in wish:
                    Path(wish["file"]).touch()
                if wish["how"] == "sleep":
                    time.sleep(wish.get("sec", 600))
                elif wish["how"] == "command":
                    subprocess.run(wish["command"], check=True, shell=True)
                else:
                    pid = args[0].workers[0].pid if wish["point"] == "with a worker" else os.getpid()
                    os.kill(pid, getattr(signal, wish["how"]))
            return original(*args, **kwargs)

        return call

    return wrapped(*POINTS[wish["point"]], make)


def struck() -> None:
    """Note when the fault came, so that the time until the job has ended can be told."""
    if (file := os.environ.get("TINY_STRUCK")) and not Path(file).exists():
        Path(file).write_text(str(time.time()))


def struck_at(log: Path) -> Path:
    """The note of all ranks of a job, whose logs are ....log3_0 and so on."""
    job = re.sub("(log[0-9]+)_[0-9]+$", r"\1", log.name)
    return log.with_name(f"{job}.struck")


def failing(job: dict[str, Any], rank: int) -> Any:
    """At a point, for the n-th time, on one rank: raise."""
    import torch

    from sdtrain.errors import DataError

    wish = job["fail"]
    error = {
        "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "data": DataError("shard 001.tar is nowhere"),
        "fault": ZeroDivisionError("a mistake of ours"),
    }[wish["error"]]
    calls = [0]

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += rank == wish["rank"] and wish.get("phase") in (None, getattr(args[1], "name", None))
            if calls[0] == wish.get("time", 1) and rank == wish["rank"]:
                calls[0] += 1
                struck()
                raise error
            return original(*args, **kwargs)

        return call

    return wrapped(*POINTS[wish["point"]], make)


def plain_features(seed: int, tap: int, calibration: Any, device: Any = "cpu") -> Any:
    """In place of an Inception, which takes seconds: the mean colours of four by four patches, [N, 48]."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from sdtrain.metrics.features import Extractor

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("nothing", torch.zeros(1))

        def forward(self, images: Any) -> Any:
            return F.adaptive_avg_pool2d(images.float(), 4).flatten(1)

    return Extractor(Patches(), 48, {"extractor": "patches"})


def poisoned(job: dict[str, Any], rank: int, notes: dict[str, Any]) -> Any:
    """Make the loss of a phase NaN on one rank, and note whether any player moved in that phase."""
    import torch

    wish = job["nan"]

    def make(run: Any) -> Any:
        def call(self: Any, phase: Any, chunks: Any) -> Any:
            if phase.name != wish["phase"] or chunks[0].step not in wish.get("steps", [wish.get("step")]):
                return run(self, phase, chunks)

            def loss(chunk: Any) -> Any:
                total, terms = phase.loss(chunk)
                if rank != wish["rank"]:
                    return total, terms
                if wish.get("what") == "gradient":  # the loss itself stays what it was
                    total.register_hook(lambda gradient: gradient * torch.inf)
                    return total, terms
                return total * torch.nan, {n: t * torch.nan for n, t in terms.items()}

            before = digest_of(self.players)
            try:
                return run(self, dataclasses.replace(phase, loss=loss), chunks)
            finally:
                notes["moved"] = digest_of(self.players) != before

        return call

    return wrapped("sdtrain.engine.phases", "PhaseEngine.run", make)


def limited(job: dict[str, Any]) -> Any:
    """From the n-th save on, no file may grow beyond `limit` bytes, as on a full disk."""
    calls = [0]

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
            return original(*args, **kwargs)

        return call

    return wrapped("sdtrain.run", "Run.save", make)


def disturbed(job: dict[str, Any], rank: int) -> Any:
    """Run a command in the n-th step, on the first rank, before the others go on."""
    wish, calls = job["meanwhile"], [0]

    def make(original: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == wish["time"] and rank == 0:
                subprocess.run(wish["command"], check=True)
            return original(*args)

        return call

    return wrapped("sdtrain.trainer", "Trainer.advance", make)


def full_disk(job: dict[str, Any]) -> Any:
    """From the n-th on, files whose path holds a word cannot be written."""
    wish = job["full"]
    calls = [0]

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = str(args[0].path) if wish["where"] == "file" else wish["word"]
            calls[0] += wish["word"] in path
            if wish["word"] in path and calls[0] >= wish.get("time", 1):
                struck()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return call

    return wrapped(*WRITERS[wish["where"]], make)


def do(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """One run of main.py in this process."""
    if "before" in job and rank == 0:
        subprocess.run(["sh", "-ec", job["before"]], check=True)
    from sdtrain.main import main

    notes: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if "signal" in job:
            stack.enter_context(signalled(job, rank))
        if "nan" in job:
            stack.enter_context(poisoned(job, rank, notes))
        if "meanwhile" in job:
            stack.enter_context(disturbed(job, rank))
        if "limit" in job:
            stack.enter_context(limited(job))
        if "full" in job:
            stack.enter_context(full_disk(job))
        if "fail" in job:
            stack.enter_context(failing(job, rank))
        if "harm" in job:
            stack.enter_context(harmed(job, rank))
        for name, value in job.get("patch", {}).items():
            module, _, attribute = name.partition(":")
            stack.enter_context(wrapped(module, attribute, lambda _, value=value: value))
        if job.get("plain"):
            stack.enter_context(wrapped("sdtrain.metrics.features", "random_inception", lambda _: plain_features))
        try:
            code: Any = main(job["args"])
        except RuntimeError as error:
            code = f"{type(error).__name__}: {error}"
    return {"code": code, **notes}


def started(job: dict[str, Any], log: Path, rank: int = 0) -> int:
    """One run, or one rank of it, in a child process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    renew_threads()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update({"TINY_STRUCK": str(struck_at(log)), **job.get("env", {})})
    code = 1
    try:
        told = do(job, rank)
        log.with_suffix(".told").write_text(json.dumps(told))
        code = told["code"] if isinstance(told["code"], int) else 1
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(log: Path, status: int) -> dict[str, Any]:
    told_file = log.with_suffix(".told")
    told = json.loads(told_file.read_text()) if told_file.exists() else {}
    raised = told["code"] if isinstance(told.get("code"), str) else ""
    at = struck_at(log)
    lasted = {"lasted_sec": time.time() - float(at.read_text())} if at.exists() else {}
    return {**told, **lasted, "code": os.waitstatus_to_exitcode(status), "said": log.read_text() + raised}


def forked(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """One run in a child process, which may be killed; what it printed and how it ended."""
    if job.get("ranks", 1) > 1:
        return forked_ranks(job, log)
    pid = started(job, log)
    return outcome(log, os.waitpid(pid, 0)[1])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in env.items()}


def forked_ranks(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """One run on several forked ranks, which meet at a port of their own; what each printed and how it ended.

    As a launcher does, it kills what is left once the others have ended.
    """
    port = free_port()
    pids, logs = [], [log.with_name(f"{log.name}_{rank}") for rank in range(job["ranks"])]
    for rank in range(job["ranks"]):
        env = rank_environment(rank, job["ranks"], port) | job.get("env", {})
        pids.append(started({**job, "env": env}, logs[rank], rank))
    ended: dict[int, int] = {}
    marker, deadline = Path(job.get("harm", {}).get("file", "/nowhere")), time.monotonic() + 200
    while len(ended) < len(pids):
        time.sleep(0.05)
        if marker.exists():
            marker.unlink()
            os.kill(pids[job["then"]["rank"]], getattr(signal, job["then"]["name"]))
        for rank, pid in enumerate(pids):
            if rank not in ended and (status := os.waitpid(pid, os.WNOHANG))[0]:
                ended[rank] = status[1]
                deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            for rank in set(range(len(pids))) - set(ended):
                os.kill(pids[rank], signal.SIGKILL)
    return {"ranks": [outcome(logs[rank], ended[rank]) for rank in range(len(pids))]}


def warm_up() -> None:
    """The slow imports, once, so that forked jobs share them; a first optimizer step pulls in a good part of torch."""
    import torch

    modules = ("loop", "run", "plan", "sampling", "data.read.stream", "tasks.generation", "losses.distance")
    modules += ("models.fastgan.networks", "models.projected.networks", "methods.sdgan.method")
    for name in (*modules, "augment.diffaug", "augment.paired"):
        importlib.import_module(f"sdtrain.{name}")
    importlib.import_module("accelerate")
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.Adam([weight]).step()


def program(file: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    warm_up()
    results = []
    for number, job in enumerate(json.loads(file.read_text())):
        results.append(forked(job, file.with_suffix(f".log{number}")) if world == 1 else do(job, rank))
    file.with_suffix(f".{rank}").write_text(json.dumps(results))
    importlib.import_module("sdtrain.exits").part(0)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
