"""A run: configuration, process group, data, networks, players and position, put together and kept in step."""

from __future__ import annotations

import datetime
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.contracts import Chunk, Stage
from sdtrain.engine.checkpoint import Checkpoint, newest, save_checkpoint
from sdtrain.engine.ema import beta_of, update_ema
from sdtrain.engine.phases import Engine, Meter
from sdtrain.engine.player import Net, Player
from sdtrain.engine.preempt import StopRequest
from sdtrain.engine.ranks import agree_max, gather_objects, rank, world
from sdtrain.engine.runfolder import RunFolder
from sdtrain.engine.timing import Stopwatch
from sdtrain.errors import RunError
from sdtrain.finetune import Initial, apply_initial
from sdtrain.kit import Kit
from sdtrain.rng import Draws

RANK_TIMEOUT = datetime.timedelta(minutes=30)  # a collective waits this long for the slowest rank before the run fails


def start_ranks() -> torch.device:
    """Join the process group that accelerate or torchrun announced, and return this rank's device."""
    from accelerate import PartialState

    on_gpu = torch.cuda.is_available() and not os.environ.get("SDTRAIN_CPU")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    together = {} if alone else {"timeout": RANK_TIMEOUT, "backend": "nccl" if on_gpu else "gloo"}
    state = PartialState(cpu=not on_gpu, **together)
    if state.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return state.device


class Run:
    """Everything a loop moves. Build it, `resume()`, then `enter` stages in order."""

    def __init__(self, config: Any, out: Path, device: torch.device, dataset: Any) -> None:
        self.config, self.device = config, device
        self.folder = RunFolder(out, config.tensorboard)
        self.dataset = dataset
        self.num_ghosts = config.batch_size // config.ghost_batch
        share = self.num_ghosts // world()
        self.exact = config.summation == "exact"
        self.ghosts_at_once = 1 if self.exact else config.ghosts_at_once or share
        self.ghosts = tuple(range(rank() * share, (rank() + 1) * share))
        self.kit = Kit(config, device, config.data.resolution or self.dataset.resolution, self.dataset.num_classes)
        self.kit.steps_per_epoch = self.dataset.num_samples / config.batch_size
        self.method = self.kit.method()
        self.nets: dict[str, Net] = self.method.nets
        self.task = importlib.import_module(f"sdtrain.tasks.{self.method.task}").Task(self)
        self.step = self.skipped = self.last_tick_img = 0
        self.bad_samples: list = []
        self.best: dict[str, float] = {}
        self.stop = StopRequest()
        self.watch = Stopwatch(device)

    @property
    def seen_img(self) -> int:
        return self.step * self.config.batch_size

    def due(self, interval_img: int) -> bool:
        """Whether this step crossed a multiple of `interval_img` images (0 = never)."""
        before = self.seen_img - self.config.batch_size
        return bool(interval_img) and self.seen_img // interval_img > before // interval_img

    def span(self, stage: Stage) -> tuple[int, int]:
        """Where a stage begins and ends."""
        ends = [0, *(s.end_img for s in self.method.stages)]
        return ends[[s.name for s in self.method.stages].index(stage.name)], stage.end_img

    @property
    def at_stage_end(self) -> bool:
        return self.seen_img >= self.stage.end_img

    def remaining_stages(self) -> Iterator[Stage]:
        for stage in self.method.stages:
            if self.seen_img < stage.end_img:
                yield stage

    def enter(self, stage: Stage, checkpoint: Checkpoint | None = None) -> None:
        """Make the stage's players, with fresh optimizers or those of the checkpoint that lies inside the stage."""
        inside = checkpoint is not None and checkpoint.state["stage"] == stage.name
        self.stage = stage
        if hasattr(self.method, "enter"):
            self.method.enter(stage.name, None if inside else self.task.hand_over())
        options = self.config.optimizer
        members = self.method.players(stage.name)
        span = self.span(stage)
        self.players = {
            name: Player(name, [self.nets[net] for net in nets], getattr(options, name), span, not self.exact)
            for name, nets in members.items()
        }
        self.engine = Engine(self.players, self.nets, self.device, self.config.precision, self.exact)
        if inside and checkpoint is not None:
            for name, player in self.players.items():
                player.load_state(checkpoint.tensors(f"{name}.optim"))
            self.engine.meter.load_state(Meter.shared_out(checkpoint.state["meters"], world()), self.device)
        self.watch.restart()

    def batches(self) -> Iterator[Any]:
        """The steps of this stage from the present position, with the time spent waiting for each on the watch."""
        from sdtrain.data.read.stream import Stream

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
            **getattr(self.method, "stream_options", {}),
        )
        with stream:
            while self.seen_img < self.stage.end_img:
                with self.watch.section("data", host=True):
                    batch = next(stream)
                yield batch
                self.bad_samples = stream.bad

    def chunks(self, batch: Any) -> list[Chunk]:
        """This rank's share of the global batch, cut into pieces of `ghosts_at_once` ghosts, on the device."""
        at_once = self.ghosts_at_once
        size = at_once * self.config.ghost_batch
        lq = None if batch.lq is None else batch.lq.to(self.device, non_blocking=True)
        images = batch.images.to(self.device, non_blocking=True)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        made = []
        for i, first in enumerate(range(0, len(self.ghosts), at_once)):
            part = slice(i * size, (i + 1) * size)
            draws = self.draws(self.ghosts[first : first + at_once])
            real = self.method.to_range(images[part])
            chunk_labels = None if labels is None else labels[part]
            inputs = {} if lq is None else {"lq": self.method.to_range(lq[part])}
            chunk = Chunk(
                step=self.step, seen_img=self.seen_img, real=real, labels=chunk_labels, draws=draws, inputs=inputs
            )
            made.append(self.method.prepare(chunk, self.stage.name) if hasattr(self.method, "prepare") else chunk)
        return made

    def draws(self, ghosts: tuple[int, ...]) -> Draws:
        c = self.config
        return Draws(seed=c.seed, step=self.step, ghosts=ghosts, ghost_batch=c.ghost_batch, device=self.device)

    def average(self) -> None:
        """Eq. (1) for every average of the stage."""
        beta = beta_of(self.config.ema, self.seen_img, self.config.batch_size)
        for name, source in self.method.averages(self.stage.name).items():
            update_ema(self.nets[name].module, self.nets[source].module, beta)

    def save(self) -> Path:
        """Write a checkpoint of this position with all ranks."""
        shared = {name: self._kept(name) for name in self.nets if name not in self.method.teachers}
        shared |= {f"{name}.optim": player.state() for name, player in self.players.items()}
        if hasattr(self.task, "tensors"):  # what a later stage will start from
            shared["best"] = self.task.tensors()
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
        ghosts = self.method.ghost_state() if hasattr(self.method, "ghost_state") else {}
        return save_checkpoint(
            self.folder.checkpoints, self.seen_img, shared, state, ghosts, self.config.keep_checkpoints
        )

    def _kept(self, name: str) -> dict[str, Tensor]:
        """State of a network without its frozen feature network, which comes from a weights file."""
        module = self.nets[name].module
        frozen = tuple(getattr(module, "frozen_prefixes", ()))
        return {k: v for k, v in module.state_dict().items() if not (frozen and k.startswith(frozen))}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the position and every tensor of a checkpoint; players follow in `enter`."""
        self.step = checkpoint.state["step"]
        self.best, self.skipped = checkpoint.state["best"], checkpoint.state["skipped"]
        self.last_tick_img = checkpoint.state["last_tick_img"]
        for name in self.nets:
            if name not in self.method.teachers:
                load_strictly(self.nets[name].module, checkpoint.tensors(name), f"{checkpoint.path.name}/{name}")
        self.method.load_state(checkpoint.state["method"])
        if checkpoint.has("best"):
            self.task.load_tensors(checkpoint.tensors("best"))
        if hasattr(self.method, "load_ghost_state"):
            files = {g: f"ghosts_{g:04d}" for g in self.ghosts}
            self.method.load_ghost_state({g: checkpoint.tensors(f) for g, f in files.items() if checkpoint.has(f)})

    def resume(self) -> tuple[Checkpoint | None, list[str]]:
        """Load the newest complete checkpoint, if there is one; also why newer ones were refused."""
        checkpoint, refused = newest(self.folder.checkpoints)
        if checkpoint is not None:
            self.restore(checkpoint)
        return checkpoint, refused

    def start_from(self, initial: Initial) -> None:
        """Fine-tuning: a fresh run takes these weights; everything else starts as in any run."""
        apply_initial(initial, self.nets, self.method)

    def stop_agreed(self) -> int:
        """The stop signal that any rank has received, 0 when none has: the same answer on all ranks."""
        return agree_max(self.stop.signal, self.device)


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load by exact names and shapes, frozen parts excepted. Raises `RunError` naming the first difference."""
    frozen = tuple(getattr(module, "frozen_prefixes", ()))
    wanted = {k: v for k, v in module.state_dict().items() if not (frozen and k.startswith(frozen))}
    wrong = [k for k in wanted if k not in tensors or tensors[k].shape != wanted[k].shape]
    wrong += [k for k in tensors if k not in wanted]
    if wrong:
        what = f"tensor {wrong[0]} and {len(wrong) - 1} more do not fit this network"
        raise RunError(f"{where}: {what}; is it of another configuration?")
    module.load_state_dict(tensors, strict=False)
