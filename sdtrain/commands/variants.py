"""Variants of one configuration side by side in one process: seconds of every phase, memory, and the cost of L_SD."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.activations import Watch, saved_storages, total_bytes
from sdtrain.config.keys import Config
from sdtrain.contracts import Chunk, Feed, Method, Phase
from sdtrain.data.read.stream import Batch
from sdtrain.engine.compiled import warm_up
from sdtrain.engine.timing import Clock
from sdtrain.methods.sdgan.method import SDGAN
from sdtrain.rng import generator
from sdtrain.trainer import Trainer

BETWEEN = "G without L_SD"
PERIOD = 48  # steps after which lazy regularisation (every 4, every 16) has been through all its combinations


class Variant:
    """One configuration, built, with what was measured of it."""

    def __init__(
        self, name: str, config: Config, device: torch.device, resolution: int, class_counts: Sequence[int] = ()
    ) -> None:
        self.name, self.config, self.device = name, config, device
        self.seconds: dict[str, list[float]] = {}  # phase -> seconds a round
        self.waited: list[float] = []  # share of the wall time of a step spent waiting for data
        self.memory: dict[str, float] = {}  # phase -> bytes at its peak
        before = self._allocated()
        self.trainer = Trainer(config, device, resolution, class_counts, num_samples=config.batch_size)
        self.method = self.trainer.method
        self.sd_every = config.sd.every if config.sd.alpha else 1
        self.stage = self.method.stages[-1]
        self.trainer.enter(self.stage)
        warm_up(self.trainer)
        self.built = self._allocated() - before

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def chunks(self, batch: Batch, step: int) -> list[Chunk]:
        """A whole batch cut as a run on one rank cuts it; made outside of the time of the phases."""
        self.trainer.step = step
        return self.trainer.chunks(batch)

    def step(self, chunks: list[Chunk], clock: Clock) -> dict[str, float]:
        """One step with every phase it can have; seconds by phase."""
        found = {}
        for name, phase, x in self.due(chunks):
            found[name], _ = clock.time(partial(self.trainer.engine.run, phase, x))
        found["ema"], _ = clock.time(self.trainer.average)
        self.trainer.engine.settle(late=True)
        self.trainer.engine.meter.clear()
        return found

    def due(self, chunks: list[Chunk]) -> Iterator[tuple[str, Phase, list[Chunk]]]:
        """Every phase that a step can have; where L_SD is lazy, G's also as it is in the steps between."""
        for phase in self.method.phases(self.stage, chunks[0].step):
            yield phase.name, phase, chunks
            if phase.name == "G" and self.sd_every > 1:
                yield BETWEEN, phase, [replace(chunk, step=chunk.step + 1) for chunk in chunks]

    def shares(self) -> dict[str, float]:
        """How often each phase runs: 1, or 1/16 for a lazy one."""
        names = [phase.name for step in range(PERIOD) for phase in self.method.phases(self.stage, step)]
        found = {"ema": 1.0, **{name: names.count(name) / PERIOD for name in dict.fromkeys(names)}}
        often = 1 / self.sd_every
        return found if often == 1 else {**found, "G": often, BETWEEN: 1 - often}

    def step_seconds(self, found: dict[str, float]) -> float:
        """Seconds of an average step, lazy phases in their proportion."""
        shares = self.shares()
        return sum(seconds * shares[name] for name, seconds in found.items())

    def round(self, number: int) -> dict[str, float]:
        return {name: values[number] for name, values in self.seconds.items()}

    def rounds(self) -> list[float]:
        """Seconds of an average step, by round."""
        return [self.step_seconds(self.round(i)) for i in range(len(self.seconds["ema"]))]

    def measure_memory(self, chunks: list[Chunk]) -> None:
        """Bytes of each phase, as if no other variant was there: what stays, and what the phase needs beside."""
        work = self._allocated_in if self.device.type == "cuda" else self._counted_in
        for name, phase, x in self.due(chunks):
            beside = work(phase, x)
            self.memory[name] = beside + self._optimizer_bytes() + (self.built or self._weights())
        self.trainer.engine.meter.clear()

    def _allocated_in(self, phase: Phase, chunks: list[Chunk]) -> int:
        """CUDA: the peak of the allocator during a phase, less what lay there before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = self._allocated()
        self.trainer.engine.run(phase, chunks)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _counted_in(self, phase: Phase, chunks: list[Chunk]) -> int:
        """CPU: the most that one chunk has alive, gradients and their sums included."""
        with Watch() as seen:
            self.trainer.engine.run(phase, chunks[:1])
        return seen.peak

    def _modules(self) -> list[nn.Module]:
        return self.trainer.engine.modules(self.trainer.nets) + frozen_networks(self.method)

    def _weights(self) -> int:
        return sum(t.numel() * t.element_size() for m in self._modules() for t in (*m.parameters(), *m.buffers()))

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs most."""
        return max(self.memory.values())

    @property
    def average(self) -> float:
        """Bytes of a mean phase, lazy ones in their proportion."""
        shares = self.shares()
        return sum(size * shares[name] for name, size in self.memory.items()) / sum(shares[n] for n in self.memory)

    def _optimizer_bytes(self) -> int:
        players = self.trainer.engine.players.values()
        return sum(t.numel() * t.element_size() for player in players for t in player.state().values())


def frozen_networks(method: Method) -> list[nn.Module]:
    """Distances and the like that a method looks through."""
    return [part for part in vars(method).values() if isinstance(part, nn.Module)]


def synthetic(config: Config, feed: Feed, resolution: int, num_classes: int = 0) -> Batch:
    """A batch of uint8 noise: timings do not depend on what is in the images. Labels all say the first class."""
    count, side = config.batch_size, feed.crop or resolution
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator("bench"), dtype=torch.uint8)
    labels = torch.eye(num_classes)[[0] * count] if num_classes else None
    lq = images[:, :, :: feed.scale, :: feed.scale].contiguous() if feed.paired else None
    return Batch(step=0, images=images, labels=labels, indices=torch.arange(count), lq=lq)


def compare(variants: list[Variant], batches: Iterator[Batch], rounds: int, clock: Clock) -> None:
    """Rounds of A B C A B C ..., so that whatever else the machine does hits all alike; the first round warms up."""
    for number in range(rounds + 1):
        for variant in variants:
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            chunks = variant.chunks(batch, number * PERIOD * variant.sd_every)
            found = variant.step(chunks, clock)
            if number == 0:
                variant.measure_memory(chunks)
                continue
            variant.waited.append(waited / (time.perf_counter() - began))
            for name, seconds in found.items():
                variant.seconds.setdefault(name, []).append(seconds)


# What L_SD costs


def cost_of_distillation(variant: Variant, batch: Batch, rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """Seconds, FLOPs and bytes kept a batch of the parts of L_SD: teacher, T, distance, backward to the image."""
    method, chunk = variant.method, variant.chunks(batch, 0)[0]
    assert isinstance(method, SDGAN)  # `distilling` came first
    draws = chunk.draws.sub("G")
    with torch.no_grad(), variant.trainer.engine.autocast():
        fake = method.generate(method.G, chunk, draws)
    parts: dict[str, dict[str, float]] = {}
    taken: dict[str, list[float]] = {}
    with FlopCounterMode(display=False) as counter:
        _distil(method, variant, chunk, draws, fake, lambda name, work: _count(counter, parts, name, work))
    for _ in range(rounds):
        _distil(method, variant, chunk, draws, fake, lambda name, work: _time(clock, taken, name, work))
    for name, seconds in taken.items():
        parts[name]["seconds"] = statistics.median(seconds)
    return parts


def _distil(method: SDGAN, variant: Variant, chunk: Chunk, draws: Any, fake: Tensor, part: Callable[..., Any]) -> None:
    """L_SD of `methods/sdgan.py`, part by part."""
    student = fake.detach().float().requires_grad_(True)
    with variant.trainer.engine.autocast():
        with torch.no_grad():
            teacher = part("teacher forward", lambda: method.generate(method.G_ema, chunk, draws, teacher=True))
        x, y = student, teacher
        if method.T is not None:
            x, y = part("T", partial(method.T, student, teacher, draws.sub("T")))
        assert method.distance is not None  # `distilling` came first
        loss = part("distance forward", partial(method.distance, x, y)).mean()
    part("backward", lambda: torch.autograd.grad(loss, student))


def _time(clock: Clock, taken: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    seconds, result = clock.time(work)
    taken.setdefault(name, []).append(seconds)
    return result


def _count(counter: FlopCounterMode, parts: dict[str, dict[str, float]], name: str, work: Callable[[], Any]) -> Any:
    before = counter.get_total_flops()
    with saved_storages() as kept:
        result = work()
    parts[name] = {"flops": counter.get_total_flops() - before, "bytes": total_bytes(kept)}
    return result


def machine_rates(device: torch.device, dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s read and written by a copy): what this machine can do at most."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    block = torch.empty((1 << 28) if device.type == "cuda" else (1 << 24), device=device)
    copy = torch.empty_like(block)
    product = min(clock.time(lambda: a @ b)[0] for _ in range(4))
    moved = min(clock.time(lambda: copy.copy_(block))[0] for _ in range(4))
    return 2 * side**3 / product, 2 * block.numel() * 4 / moved
