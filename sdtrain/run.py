"""A run: a trainer with a data stream, a folder, a clock that can be resumed, and what is done once in a while."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sdtrain.config.keys import Config
from sdtrain.contracts import Stage, State, Task
from sdtrain.data.read.dataset import Dataset
from sdtrain.data.read.stream import Batch, Stream
from sdtrain.engine.checkpoint import Checkpoint, newest, save_checkpoint
from sdtrain.engine.meter import Meter
from sdtrain.engine.preempt import StopRequest
from sdtrain.engine.ranks import agree_max, gather_objects, world
from sdtrain.engine.runfolder import RunFolder
from sdtrain.engine.snapshots import cut_back, save_snapshot, snapshot_positions
from sdtrain.finetune import Initial, apply_initial
from sdtrain.trainer import Trainer


class Run(Trainer):
    """Everything a loop moves. Build it, `resume()`, then `enter` stages in order."""

    def __init__(self, config: Config, out: Path, device: torch.device, dataset: Dataset) -> None:
        resolution = config.data.resolution or dataset.resolution
        assert resolution is not None  # `check_data` came first
        super().__init__(config, device, resolution, dataset.class_counts, num_samples=dataset.num_samples)
        self.dataset, self.resolution = dataset, resolution
        self.folder = RunFolder(out, config.tensorboard)
        self.skipped = self.last_tick_img = 0
        self.bad_samples: Sequence[object] = ()
        self.best: dict[str, State] = {}  # by stage: what chose its best weights
        self.stop = StopRequest()
        self.checkpoint: Checkpoint | None = None  # where this process took up the run
        task = importlib.import_module(f"sdtrain.tasks.{self.method.task}").TASK(self)
        assert isinstance(task, Task)
        self.task = task
        end_img = self.method.stages[-1].end_img
        self.snapshot_img = snapshot_positions(self.method.snapshots, end_img, config.batch_size)

    def due(self, interval_img: int) -> bool:
        """Whether this step crossed a multiple of `interval_img` images (0 = never)."""
        before = self.seen_img - self.config.batch_size
        return bool(interval_img) and self.seen_img // interval_img > before // interval_img

    @property
    def at_stage_end(self) -> bool:
        return self.seen_img >= self.stage.end_img

    def begin(self, stage: Stage) -> None:
        """`enter` a stage: with the optimizers of the checkpoint that lies inside it, or fresh ones."""
        inside = self.checkpoint if self.checkpoint and self.checkpoint.state["stage"] == stage.name else None
        self.stage = stage  # what is handed over belongs to the one before it
        self.enter(stage, None if inside else self.task.hand_over())
        if inside is not None:
            for name, player in self.engine.players.items():
                player.load_state(inside.tensors(f"{name}.optim"))
            self.engine.meter.load_state(Meter.shared_out(inside.state["meters"], world()), self.device)
        self.timer.restart()

    def batches(self) -> Iterator[Batch]:
        """The steps of this stage from the present position, with the time spent waiting for each on the timer."""
        c = self.config
        stream = Stream(
            self.dataset,
            seed=c.seed,
            batch_size=c.batch_size,
            ghost_batch=c.ghost_batch,
            ghosts=self.ghosts,
            xflip=c.data.xflip,
            workers=c.data.workers,
            prefetch=c.data.prefetch,
            start_step=self.step,
            max_bad=c.data.max_bad,
            **asdict(self.method.feed),
        )
        with stream:
            while self.seen_img < self.stage.end_img:
                with self.timer.section("data", host=True):
                    batch = next(stream)
                yield batch
                self.bad_samples = stream.bad

    def save(self) -> Path:
        """Write a checkpoint of this position with all ranks, whose copies must be alike. Raises `RuntimeError`."""
        self.engine.check_copies(self.nets)
        shared = {name: self.nets[name].state() for name in self.nets if name not in self.method.given}
        shared |= {f"{name}.optim": player.state() for name, player in self.engine.players.items()}
        if kept := self.task.tensors():  # what a later stage will start from
            shared["best"] = kept
        state = {
            "step": self.step,
            "seen_img": self.seen_img,
            "stage": self.stage.name,
            "world_size": world(),
            "meters": {str(r): m for r, m in enumerate(gather_objects(self.engine.meter.state()))},
            "method": self.method.state(),
            "best": self.best,
            "last_tick_img": self.last_tick_img,
            "skipped": self.skipped,
        }
        where, keep = self.folder.checkpoints, self.config.keep_checkpoints
        return save_checkpoint(where, self.seen_img, shared, state, self.method.ghost_state(), keep)

    def save_snapshot(self) -> None:
        """Keep the weights of G and of its average at this position for good, with all ranks."""
        nets = {name: self.nets[name].state() for name in ("G", self.stage.evaluated)}
        save_snapshot(self.folder.snapshots, self.seen_img, nets)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the position and every tensor of a checkpoint; players follow in `begin`."""
        self.step = checkpoint.state["step"]
        self.best, self.skipped = checkpoint.state["best"], checkpoint.state["skipped"]
        self.last_tick_img = checkpoint.state["last_tick_img"]
        for name in self.nets:
            if name not in self.method.given:
                self.nets[name].load(checkpoint.tensors(name), f"{checkpoint.path.name}/{name}")
        self.method.load_state(checkpoint.state["method"])
        if checkpoint.has("best"):
            self.task.load_tensors(checkpoint.tensors("best"))
        files = {ghost: f"ghosts_{ghost:04d}" for ghost in self.ghosts}
        mine = {ghost: checkpoint.tensors(file) for ghost, file in files.items() if checkpoint.has(file)}
        self.method.load_ghost_state(mine, self.device)
        self.checkpoint = checkpoint

    def resume(self) -> list[str]:
        """Load the newest complete checkpoint, if there is one, and forget later snapshots.

        Returns why newer checkpoints were refused.
        """
        checkpoint, refused = newest(self.folder.checkpoints)
        if checkpoint is not None:
            self.restore(checkpoint)
        cut_back(self.folder.snapshots, self.seen_img)
        return refused

    def start_from(self, initial: Initial) -> None:
        """Fine-tuning: a fresh run takes these weights; everything else starts as in any run."""
        apply_initial(initial, self.nets, self.method)

    def stop_agreed(self) -> int:
        """The stop signal that any rank has received, 0 when none has: the same answer on all ranks."""
        return agree_max(self.stop.signal, self.device)
