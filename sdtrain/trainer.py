"""The wiring of a step: method, networks, players, engine and position, without data or a run folder.

A run, `bench`, the memory count of `--plan` and the simulation of the Dirac-GAN all step through this class.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from sdtrain.builder import Builder
from sdtrain.config.keys import Config
from sdtrain.contracts import Chunk, Method, Net, Stage, Tensors, Terms, spans
from sdtrain.data.read.stream import Batch
from sdtrain.engine.compiled import compile_parts, frozen_parts
from sdtrain.engine.ema import beta_of
from sdtrain.engine.make import make_engine
from sdtrain.engine.meter import Meter
from sdtrain.engine.phases import NonFinite
from sdtrain.engine.pulse import PULSE
from sdtrain.engine.ranks import rank, world
from sdtrain.engine.timing import Timer
from sdtrain.errors import ConfigError, RankFailed
from sdtrain.exits import NO_MEMORY
from sdtrain.precision import exact_sums
from sdtrain.rng import Draws

log = logging.getLogger("sdtrain")
MOST_LATE = 64  # steps whose numbers a GPU keeps for the host
MOST_SKIPPED = 10  # steps in a row with a bad phase, after which weights will not recover
TOO_LARGE = re.compile(f"{NO_MEMORY.pattern}|overflow")


class Trainer:
    """Build it, `enter` a stage, `advance` with the `chunks` of a batch."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        resolution: int,
        class_counts: Sequence[int] = (),
        *,
        num_samples: int = 0,
        random_weights: bool = False,
    ) -> None:
        """`resolution`, `class_counts` and `num_samples` are those of the training images."""
        self.config, self.device = config, device
        self.engine = make_engine(config, device)
        epoch = num_samples / config.batch_size
        self.builder = Builder(config, self.engine, resolution, class_counts, epoch, random_weights)
        self.method = built(self.builder)
        self.nets: Mapping[str, Net] = self.method.nets
        self.parts = frozen_parts(self) if config.compile == "frozen" else {}
        compile_parts(self.parts)
        self.stage = self.method.stages[-1]  # until one is entered: a finished run has none left
        self.starts = {stage.name: start for stage, start in spans(self.method.stages)}
        share = config.num_ghosts // world()
        self.ghosts = tuple(range(rank() * share, (rank() + 1) * share))
        self.ghosts_at_once = 1 if exact_sums(config, device) else config.ghosts_at_once or share
        self.step = 0
        self.timer = Timer(device)
        self.waits = device.type == "cpu"  # for numbers, as soon as they could be known; a GPU is not waited for
        self.skipped = self.skipped_in_a_row = 0  # steps of which a phase was left out
        self.uncontrolled: list[tuple[int, Terms]] = []  # steps that `Method.control` has not seen yet

    @property
    def seen_img(self) -> int:
        return self.step * self.config.batch_size

    def enter(self, stage: Stage, best: Mapping[str, Tensors] | None = None) -> None:
        """Make the stage's players, with fresh optimizers.

        `best` ({net: {name: [...]}}) holds the weights that validation chose in the stage before; None = go on inside
        the stage, where every network keeps what it has.
        """
        self.settle()
        self.stage = stage
        if best is not None:
            self.take_starts(stage, best)
        for name in stage.frozen:
            self.nets[name].freeze()
        PULSE.before_first(self.step)
        self.engine.begin(stage, self.starts[stage.name], self.nets, self.method.lazy())

    def take_starts(self, stage: Stage, best: Mapping[str, Tensors]) -> None:
        """Weights that networks begin the stage with; all are looked up before any is replaced.

        `best`: {net: {name: [...]}}. Raises RunError for weights of another network.
        """
        found: dict[str, Tensors] = {}
        for name, start in stage.starts.items():
            if start.best and start.net in best:
                found[name] = best[start.net]
            elif source := start.otherwise if start.best else start.net:
                found[name] = {k: v.clone() for k, v in self.nets[source].state().items()}
        for name, tensors in found.items():
            self.nets[name].load(tensors, f"start of stage {stage.name}, {name}")

    def chunks(self, batch: Batch) -> list[Chunk]:
        """This rank's share of the global batch, cut into pieces of `ghosts_at_once` ghosts, on the device."""
        at_once, size = self.ghosts_at_once, self.ghosts_at_once * self.config.ghost_batch
        # bytes go over as they lie in memory, and become planes there
        lq = None if batch.lq is None else batch.lq.to(self.device, non_blocking=True).contiguous()
        images = batch.images.to(self.device, non_blocking=True).contiguous()
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        made = []
        for i, first in enumerate(range(0, len(self.ghosts), at_once)):
            part = slice(i * size, (i + 1) * size)
            chunk = Chunk(
                step=self.step,
                seen_img=self.seen_img,
                real=self.method.to_range(images[part]),
                labels=None if labels is None else labels[part],
                draws=self.draws(self.ghosts[first : first + at_once]),
                inputs={} if lq is None else {"lq": self.method.to_range(lq[part])},
            )
            made.append(self.method.prepare(chunk, self.stage))
        return made

    def blank(self) -> Chunk:
        """A chunk of the shapes that this rank sees in a step, without images."""
        draws = self.draws(tuple(range(self.ghosts_at_once)))
        num, side, classes = draws.num_samples, self.builder.resolution, len(self.builder.class_counts)
        real = torch.zeros(num, 3, side, side, device=self.device)
        labels = torch.zeros(num, classes, device=self.device) if classes else None
        return self.method.blank(Chunk(step=0, seen_img=0, real=real, labels=labels, draws=draws))

    def draws(self, ghosts: tuple[int, ...]) -> Draws:
        c = self.config
        return Draws(seed=c.seed, step=self.step, ghosts=ghosts, ghost_batch=c.ghost_batch, device=self.device)

    def advance(self, chunks: list[Chunk]) -> None:
        """One step of the clock: every phase of the method, controllers, averages. Raises `NonFinite`."""
        with PULSE.step(self.step):
            self._advance(chunks)
            self.engine.settle(late=True)
        self.step += 1

    def _advance(self, chunks: list[Chunk]) -> None:
        steering: Terms = {}
        skips, left_out = self.config.on_nonfinite == "skip", []
        for number, phase in enumerate(self.method.phases(self.stage, self.step)):
            before = self.method.state() if skips and phase.receive else None
            try:
                with self.timer.section(phase.name):
                    terms = self.engine.run(phase, chunks)
            except NonFinite as problem:
                if not skips:
                    raise
                if before is not None:
                    self.method.load_state(before)
                left_out.append(problem)
                continue
            except RankFailed as failure:
                failure.intact = number == 0 and phase.prepass is None and not self.method.ghost_state()
                raise
            steering |= {n: terms[n] for n in terms if n in self.method.steering}
        self.note(left_out)
        if self.method.steering:
            self.uncontrolled.append((self.step, steering))
        if self.waits or self.method.steers_after(self.step) or len(self.uncontrolled) >= MOST_LATE:
            self.control()
        with self.timer.section("ema"):
            self.average()

    def note(self, left_out: list[NonFinite]) -> None:
        """Count a step without these phases, and say so. Raises `NonFinite` for the last of `MOST_SKIPPED` in a row."""
        if not left_out:
            self.skipped_in_a_row = 0
            return
        if self.skipped_in_a_row + 1 >= MOST_SKIPPED:
            raise NonFinite(f"{MOST_SKIPPED} steps in a row were not finite; {left_out[0]}")
        for problem in left_out:
            log.warning("%s; this phase is left out on every rank and training goes on", problem)
        self.skipped += 1
        self.skipped_in_a_row += 1

    def settle(self) -> None:
        """Bring up to date what a step has left for later. Before anything is written. Raises `NonFinite`."""
        self.engine.settle()
        self.control()

    def control(self) -> None:
        """Hand the method the global means it steers by, and the log what comes of them."""
        steps, self.uncontrolled = self.uncontrolled, []
        meter = Meter()
        for i, (_, terms) in enumerate(steps):
            meter.add({f"{i} {name}": value for name, value in terms.items()})
        meter.count(list(meter.sums))
        means = meter.means()
        for i, (step, terms) in enumerate(steps):
            moved = self.method.control(step, {name: means[f"{i} {name}"] for name in terms})
            self.engine.meter.count(list(moved))
            self.engine.meter.add({n: torch.tensor(v) for n, v in moved.items()})

    def average(self) -> None:
        """Eq. (1) of SD-GAN for every average of the stage."""
        beta = beta_of(self.config.ema, self.seen_img, self.config.batch_size)
        for name, source in self.stage.averages.items():
            self.nets[name].follow(self.nets[source], beta)

    def remaining_stages(self) -> Iterator[Stage]:
        for stage in self.method.stages:
            if self.seen_img < stage.end_img:
                yield stage


def built(builder: Builder) -> Method:
    """The method with its networks. Raises ConfigError when this machine cannot hold them."""
    try:
        return builder.method()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not TOO_LARGE.search(str(error)):
            raise
        reason = str(error)[:100]
    raise ConfigError(f"the networks do not fit into memory; lower the widths of model ({reason})")
