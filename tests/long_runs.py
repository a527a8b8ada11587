"""Run by test_long_runs.py in a process of its own: many steps of a run, or many dead decoding processes; what grew?

    python tests/long_runs.py loop FOLDER STEPS LOG_STEPS     the loop, with a step that computes nothing
    python tests/long_runs.py steps STEPS                     steps of the engine, on the Dirac-GAN, without ticks
    python tests/long_runs.py workers FOLDER TIMES            a decoding process is killed, the stream begun again

Prints one JSON object a measurement: resident memory [MB], open files, threads, children, and what else counts.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from tiny import make_shards, tiny_config, write_config

STRETCHES = 4


def measured(**more: Any) -> None:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    found = {"rss_mb": int(status["VmRSS"].split()[0]) / 1024, "files": len(os.listdir("/proc/self/fd"))}
    found |= {"threads": threading.active_count(), "children": len(children)}
    print(json.dumps(found | more), flush=True)


def loop(folder: Path, steps: int, log_steps: int) -> None:
    """A run of main.py: stream, clock, ticks, rows, TensorBoard and watchers are real; only the networks rest."""
    import torch

    from sdtrain.main import main
    from sdtrain.run import Run

    tree = tiny_config(make_shards(folder / "shards"), total_img=16 * steps, log_img=16 * log_steps, save_img=0)
    config = write_config(folder / "long.yaml", tree | {"tracker": "tensorboard"})
    every = steps // STRETCHES

    def rest(run: Any, chunks: Any) -> None:
        with run.timer.section("G"), run.timer.section("D"):
            run.engine.meter.add({"G/adv": torch.tensor(1.0), "D/real": torch.tensor(float(run.step))})
            run.engine.meter.count(["G/adv", "D/real"])
        if run.step % every == every - 1:
            run.folder._trackers[0]._writer.flush()
            board = sum(file.stat().st_size for file in (folder / "out" / "tensorboard").iterdir())
            held = {"timer": len(run.timer.seconds) + len(run.timer._events), "meter": len(run.engine.meter.sums)}
            measured(step=run.step, board=board, **held)

    with mock.patch.object(Run, "_advance", rest):
        assert main(["--cfg", str(config), "--out", str(folder / "out")]) == 0


def engine(steps: int) -> None:
    """Nothing is read between steps, as with `log_img: 0`."""
    import torch

    from sdtrain.config.load import load_config
    from sdtrain.data.read.stream import Batch
    from sdtrain.trainer import Trainer

    trainer = Trainer(load_config("dirac", [f"total_img={steps}"]), torch.device("cpu"), resolution=1)
    trainer.enter(trainer.method.stages[0])
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    for step in range(steps):
        trainer.advance(trainer.chunks(Batch(step=step, images=images, labels=None, indices=torch.arange(1))))
        if step % (steps // STRETCHES) == steps // STRETCHES - 1:
            held = {"timer": len(trainer.timer.seconds), "meter": len(trainer.engine.meter.sums)}
            measured(step=step, tensors=sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()), **held)


def workers(folder: Path, times: int) -> None:
    """Every second batch is lost with the process that decodes it; the stream that follows delivers it."""
    from sdtrain.data.read.dataset import open_dataset
    from sdtrain.data.read.stream import Stream, WorkerError

    dataset = open_dataset(make_shards(folder / "shards"), folder / "cache")
    how: dict[str, Any] = {"seed": 1, "batch_size": 4, "ghost_batch": 4, "ghosts": [0]}
    with Stream(dataset, workers=0, **how) as undisturbed:
        expected = [digest(next(undisturbed).images) for _ in range(4 * times)]
    found: list[str] = []
    named = 0
    for time in range(times):
        with Stream(dataset, workers=1, start_step=len(found), **how) as stream:
            found.append(digest(next(stream).images))
            victim = stream._pool.workers[0]
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait()
            try:
                while True:  # what was decoded ahead is delivered still
                    found.append(digest(next(stream).images))
            except WorkerError as error:
                named += f"(pid {victim.pid}) was killed by SIGKILL" in str(error)
        if time % max(times // STRETCHES, 1) == max(times // STRETCHES, 1) - 1:
            measured(killed=time + 1, named=named, equal=found == expected[: len(found)], batches=len(found))


def digest(images: Any) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    what, *rest_of = sys.argv[1:]
    if what == "steps":
        engine(int(rest_of[0]))
    elif what == "loop":
        loop(Path(rest_of[0]), int(rest_of[1]), int(rest_of[2]))
    else:
        workers(Path(rest_of[0]), int(rest_of[1]))
