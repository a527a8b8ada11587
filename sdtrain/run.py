"""A run: a trainer with a data stream, a folder, a clock that can be resumed, and what is done once in a while."""

from __future__ import annotations

import importlib
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sdtrain.config.keys import Config
from sdtrain.contracts import Net, Stage, State, Task, Tensors
from sdtrain.data.read.dataset import Dataset
from sdtrain.data.read.remote import is_remote
from sdtrain.data.read.stream import Batch, Stream
from sdtrain.engine.agree import failure_of, raise_together
from sdtrain.engine.checkpoint import STATE, Checkpoint, newest, recover
from sdtrain.engine.compiled import warm_up
from sdtrain.engine.fitting import wrong_slots, wrong_state
from sdtrain.engine.meter import Meter
from sdtrain.engine.origin import compare_origin, origin_of
from sdtrain.engine.player import BasePlayer
from sdtrain.engine.preempt import OUT_OF_TIME, STOP_SIGNALS, StopRequest
from sdtrain.engine.pulse import LONG, PULSE
from sdtrain.engine.ranks import gather_objects, rank, sum_up, world
from sdtrain.engine.restart import is_row, refuse_to_start_over
from sdtrain.engine.runfolder import RunFolder
from sdtrain.engine.saving import Order, Saver, deal
from sdtrain.engine.snapshots import cut_back, snapshot_positions
from sdtrain.engine.writing import together
from sdtrain.errors import EXIT_USER_ERROR, Interrupted, RankFailed, RunError
from sdtrain.finetune import Initial, apply_initial
from sdtrain.trainer import Trainer

REASONS = (*STOP_SIGNALS, signal.SIGINT, OUT_OF_TIME)  # to stop


class Run(Trainer):
    """Everything a loop moves. Build it, `resume()`, then `enter` stages in order."""

    def __init__(self, config: Config, out: Path, device: torch.device, dataset: Dataset) -> None:
        resolution = config.data.resolution or dataset.resolution
        assert resolution is not None  # `check_data` came first
        super().__init__(config, device, resolution, dataset.class_counts, num_samples=dataset.num_samples)
        self.dataset, self.resolution = dataset, resolution
        self.folder = RunFolder(out, config)
        self.timed_from_img = 0  # what the timer has measured began there
        self.first_step = -1  # of this process; -1 = not known yet
        self.eval_seconds = 0.0  # of the last evaluation; 0 = none yet
        self.bad_samples: Sequence[object] = ()
        self.best: dict[str, State] = {}  # by stage: what chose its best weights
        self.stop = StopRequest()
        self.slow = slow_sections(dataset)
        self.saver = Saver(self.folder.writing, device)
        self.saved = (-1, False)  # step of the newest checkpoint read or begun, and whether it owes an evaluation
        self.undone: list[str] = []  # what was due at this position and a stop signal cut short
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
                found = inside.shapes(f"{name}.optim")
                inside.require_fit(f"{name}.optim", slots_of(player, found))
                inside.refuse(wrong_slots(found))
                player.load_state(inside.tensors(f"{name}.optim"))
            with state_of(inside) as state:
                self.engine.meter.load_state(Meter.shared_out(state["meters"], world()), self.device)
        warm_up(self)
        self.restart_timer()

    def restart_timer(self) -> None:
        self.timer.restart()
        self.timed_from_img = self.seen_img

    def batches(self) -> Iterator[Batch]:
        """The steps of this stage from the present position, with the time spent waiting for each on the timer.

        Between two of them, and after the last, all ranks agree to go on. Raises as `agree`.
        """
        c = self.config
        self.first_step = self.step if self.first_step < 0 else self.first_step
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
            enough=self._waited_enough,
            **asdict(self.method.feed),
        )
        with stream:
            while self.seen_img < self.stage.end_img:
                with self.timer.section("data", host=True):
                    batch, failure = fetched(stream)
                self.go_on(failure, stream)
                assert batch is not None
                yield batch
            self.go_on(None, stream)

    def go_on(self, failure: Exception | None, stream: Stream) -> None:
        """The one agreement of a step, at its boundary: on failures, stops and bad samples. Raises as `agree`."""
        new = stream.news()
        if self.agree(failure, len(new)):
            found = [sample for part in gather_objects(new) for sample in part]
            if too_many := failure_of(lambda: stream.learn(found)):
                raise RankFailed(str(too_many), EXIT_USER_ERROR)
        self.bad_samples = stream.bad

    def agree(self, failure: Exception | None = None, news: int = 0) -> int:
        """All ranks together, in one collective: the sum of their `news`.

        Raises `RankFailed` on all of them when a rank has a `failure` or could not write into the run folder, and
        `Interrupted` when a rank was told to stop.
        """
        failure, reason = failure or self.folder.writing.failure, self.stop.reason
        if reason == OUT_OF_TIME and self.step == self.first_step:
            reason = 0  # starts that never get a step further would follow each other for ever
        told = [int(reason == known) for known in REASONS]
        failed, total, *stops = sum_up([int(failure is not None), news, *told], self.device)
        if failed:
            self.saver.wait()  # what is being written may be what is kept
            raise_together(failure)
        if any(stops):
            raise Interrupted(max(known for known, count in zip(REASONS, stops) if count))
        return total

    def _waited_enough(self, waited_sec: float) -> bool:
        """Whether to give decoding processes up. Raises `Interrupted` when a stop need not wait for them."""
        if self.stop.reason:
            raise Interrupted
        return waited_sec > PULSE.mark.limit_sec(self.config.timeout, self.slow)

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint of this position with all ranks, whose copies must be alike; `wait` until it counts.

        Raises `Unlike` for copies that differ, and `RankFailed` as `wait_for_save`, on all ranks.
        """
        self.settle()
        with PULSE.section("save"):
            self.engine.check_copies(self.nets)
            order = {"root": self.folder.checkpoints, "keep": self.config.keep_checkpoints}
            self._write(**order, files=self._files(), state=self._state(), meter=self.engine.meter.state())
        self.saved = (self.step, "evaluate" in self.undone)
        if wait or not self.config.save_async:
            self.wait_for_save()

    @property
    def checkpoint_path(self) -> Path:
        """That of a checkpoint of this position."""
        return self.folder.checkpoints / f"img_{self.seen_img:09d}"

    def save_snapshot(self) -> None:
        """Keep the weights of G and of its average at this position for good, with all ranks."""
        with PULSE.section("save"):
            nets = {name: self.nets[name] for name in ("G", self.stage.evaluated)}
            self._write(root=self.folder.snapshots, files=self._shared({}, nets, {}))
        self.wait_for_save()  # it stays due until it is there

    def _write(self, **order: Any) -> None:
        self.wait_for_save()
        self.saver.save(Order(seen_img=self.seen_img, **order), self.stop)

    def wait_for_save(self) -> None:
        """Until what is being written is complete. Raises the same `RankFailed` on all ranks when it cannot be."""
        if not self.saver.wait():
            self.folder.writing.raise_together()

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of this position is there or on its way, with the evaluation that is owed, if any."""
        return self.saved == (self.step, "evaluate" in self.undone)

    def _files(self) -> dict[str, Tensors]:
        """What this rank writes of the present state, {file: {name: [...]}}. All ranks together."""
        nets = {name: net for name, net in self.nets.items() if name not in self.method.given}
        kept = self.task.tensors()  # what a later stage will start from
        files = self._shared({"best": kept} if kept else {}, nets, self.engine.players)
        return files | {f"ghosts_{ghost:04d}": tensors for ghost, tensors in self.method.ghost_state().items()}

    def _shared(
        self, copied: Mapping[str, Tensors], nets: Mapping[str, Net], players: Mapping[str, BasePlayer]
    ) -> dict[str, Tensors]:
        """This rank's share of the files of networks, their optimizers, and of what every rank has `copied`."""
        holders: dict[str, Net | BasePlayer] = {**nets, **{f"{name}.optim": player for name, player in players.items()}}
        sizes = {name: net.size() for name, net in nets.items()}
        sizes |= {f"{name}.optim": 2 * player.size() for name, player in players.items()}  # Adam has two moments
        sizes |= {name: sum(t.numel() for t in tensors.values()) for name, tensors in copied.items()}
        owner = deal(sizes, world())
        files = {name: holder.state(at=owner[name]) for name, holder in holders.items()} | {**copied}
        return {name: tensors for name, tensors in files.items() if owner[name] == rank()}

    def _state(self) -> State:
        return {
            "step": self.step,
            "seen_img": self.seen_img,
            "stage": self.stage.name,
            "world_size": world(),
            "origin": self.origin,
            "method": self.method.state(),
            "best": self.best,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "undone": self.undone,
            "owed": self.folder.owed,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the position and every tensor of a checkpoint; players follow in `begin`. Raises `RunError`."""
        stages = [stage.name for stage in self.method.stages]
        checkpoint.refuse(wrong_state(checkpoint.state, self.method.state(), stages, self.config.batch_size))
        with state_of(checkpoint) as state:
            self.step, self.skipped = int(state["step"]), int(state["skipped"])
            self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))
            self.best, self.undone = dict(state["best"]), [str(what) for what in state.get("undone", ())]
            self.folder.owed = [row for row in state.get("owed", ()) if is_row(row)]
        self.saved = (self.step, "evaluate" in self.undone)
        own = [name for name in self.nets if name not in self.method.given]
        for name in own:  # all are looked at before any is replaced
            checkpoint.require_fit(name, {key: value.shape for key, value in self.nets[name].state().items()})
        for name in own:
            self.nets[name].load(checkpoint.tensors(name), f"{checkpoint.path.name}/{name}")
        with state_of(checkpoint) as state:
            self.method.load_state(state["method"])
        if checkpoint.has("best"):
            self.task.load_tensors(checkpoint.tensors("best"))
        files = {ghost: f"ghosts_{ghost:04d}" for ghost in self.ghosts}
        mine = {ghost: checkpoint.tensors(file) for ghost, file in files.items() if checkpoint.has(file)}
        self.method.load_ghost_state(mine, self.device)
        self.checkpoint = checkpoint

    @cached_property
    def origin(self) -> State:
        """What decides numbers besides the configuration; first asked for by all ranks together."""
        return origin_of(self.config, self.dataset, self.device)

    def resume(self, allow: Sequence[str] = ()) -> list[str]:
        """Load the newest complete checkpoint, if there is one, and forget later snapshots.

        Returns why newer checkpoints were refused. Raises `RunError` when there is a run without a complete
        checkpoint, and for training data that is not the checkpoint's unless `allow` names its key.
        """
        where = self.folder.checkpoints
        together(lambda: recover(where), where, self.folder.path)
        checkpoint, refused = newest(where, self.wants)
        now = self.origin  # as it is before anything is read
        if checkpoint is None:
            refuse_to_start_over(self.folder.path, refused)
        else:
            with state_of(checkpoint) as state:
                if "origin" in state:  # earlier versions have not written it
                    compare_origin(state["origin"], now, allow, checkpoint.path.name)
            self.restore(checkpoint)
        cut_back(self.folder.snapshots, self.seen_img)
        return refused

    def wants(self, file: str) -> bool:
        """Whether this rank needs a file of a checkpoint: all but what belongs to ghosts of other ranks."""
        ghost = re.fullmatch(r"ghosts_([0-9]{4,9})\.safetensors", file)
        return ghost is None or int(ghost[1]) in self.ghosts

    def start_from(self, initial: Initial) -> None:
        """Fine-tuning: a fresh run takes these weights; everything else starts as in any run."""
        apply_initial(initial, self.nets, self.method)

    def give_way(self) -> None:
        """Between pieces of long work, all ranks together. Raises as `agree`."""
        self.agree()


def slow_sections(dataset: Dataset) -> Sequence[str]:
    """Sections that may be silent for long."""
    return (*LONG, "data") if any(is_remote(shard) for shard in dataset.shards) else LONG


def fetched(stream: Stream) -> tuple[Batch | None, Exception | None]:
    """The next batch, or why there is none; neither where a stop did not wait for it."""
    try:
        return next(stream), None
    except Interrupted:
        return None, None
    except Exception as error:
        return None, error


@contextmanager
def state_of(checkpoint: Checkpoint) -> Iterator[State]:
    """The state of a checkpoint; what it lacks, or holds in another form, is a `RunError`."""
    try:
        yield checkpoint.state
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        found = f"{checkpoint.path / STATE} does not fit this run ({error!r})"
        raise RunError(f"{found}: another version wrote it, or it is damaged") from error


def slots_of(player: BasePlayer, found: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The shapes that a player has for those PARAMETER/SLOT of a file which belong to it; a count of steps has none."""
    whole = {key: list(leaf.shape) for key, leaf in zip(player.named, player.leaves, strict=True)}
    return {key: found[key] and whole[owner] for key in found if (owner := key.rpartition("/")[0]) in whole}
