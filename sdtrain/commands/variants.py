"""Variants of one configuration side by side in one process: seconds of every phase, memory, and the cost of L_SD."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.activations import saved_storages, total_bytes
from sdtrain.contracts import Chunk
from sdtrain.engine.ema import beta_of, update_ema
from sdtrain.engine.phases import Engine
from sdtrain.engine.player import Player
from sdtrain.kit import Kit
from sdtrain.rng import Draws, generator

PERIOD = 48  # steps after which lazy regularisation (every 4, every 16) has been through all its combinations


class Clock:
    """Seconds of work: wall time with the device waited for; processor time where one thread does it all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alone = device.type == "cpu" and torch.get_num_threads() == 1

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.alone else time.perf_counter()

    @property
    def name(self) -> str:
        return "processor time of one thread" if self.alone else "wall time"

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        start = self()
        result = work()
        return self() - start, result


@dataclass
class Variant:
    """One configuration, built, with what was measured of it."""

    name: str
    config: Any
    device: torch.device
    resolution: int
    num_classes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)  # phase -> seconds a round
    waited: list[float] = field(default_factory=list)  # share of the wall time of a step spent waiting for data
    memory: float = 0.0  # bytes

    def __post_init__(self) -> None:
        before = self._allocated()
        kit = Kit(self.config, self.device, self.resolution, self.num_classes)
        self.method = kit.method()
        self.stage = self.method.stages[0].name
        own, options = self.method.players(self.stage), self.config.optimizer
        nets = self.method.nets
        self.players = {n: Player(n, [nets[m] for m in own[n]], getattr(options, n)) for n in own}
        self.engine = Engine(self.players, nets, self.device, self.config.precision)
        self.built = self._allocated() - before

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def chunks(self, images: Tensor, labels: Tensor | None, step: int) -> list[Chunk]:
        """uint8 images of a whole batch on the device -> chunks, as a run on one rank cuts them."""
        c = self.config
        at_once = c.ghosts_at_once or c.num_ghosts
        made = []
        for first in range(0, c.num_ghosts, at_once):
            ghosts = tuple(range(first, min(first + at_once, c.num_ghosts)))
            part = slice(first * c.ghost_batch, (first + len(ghosts)) * c.ghost_batch)
            draws = Draws(seed=c.seed, step=step, ghosts=ghosts, ghost_batch=c.ghost_batch, device=self.device)
            real = self.method.to_range(images[part])
            shown = None if labels is None else labels[part]
            made.append(Chunk(step=step, seen_img=step * c.batch_size, real=real, labels=shown, draws=draws))
        return made

    def step(self, chunks: list[Chunk], clock: Clock) -> dict[str, float]:
        """One step with every phase it can have; seconds by phase."""
        found = {}
        for phase in self.method.phases(self.stage, chunks[0].step):
            found[phase.name], _ = clock.time(partial(self.engine.run, phase, chunks))
        found["ema"], _ = clock.time(self.average)
        self.engine.meter.clear()
        return found

    def average(self) -> None:
        beta = beta_of(self.config.ema, self.config.batch_size, self.config.batch_size)
        for name, source in self.method.averages(self.stage).items():
            update_ema(self.method.nets[name].module, self.method.nets[source].module, beta)

    def shares(self) -> dict[str, float]:
        """How often each phase runs: 1, or 1/16 for a lazy one."""
        names = [phase.name for step in range(PERIOD) for phase in self.method.phases(self.stage, step)]
        return {"ema": 1.0, **{name: names.count(name) / PERIOD for name in dict.fromkeys(names)}}

    def step_seconds(self, found: dict[str, float]) -> float:
        """Seconds of an average step, lazy phases in their proportion."""
        shares = self.shares()
        return sum(seconds * shares[name] for name, seconds in found.items())

    def round(self, number: int) -> dict[str, float]:
        return {name: values[number] for name, values in self.seconds.items()}

    def rounds(self) -> list[float]:
        """Seconds of an average step, by round."""
        return [self.step_seconds(self.round(i)) for i in range(len(self.seconds["G"]))]

    def measure_memory(self, chunks: list[Chunk]) -> None:
        """CUDA: the peak of a step without the other variants. CPU: weights, gradients, Adam, what backward keeps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = self._allocated()
            self.step(chunks, Clock(self.device))
            self.memory = torch.cuda.max_memory_allocated(self.device) - before + self.built + self._optimizer_bytes()
            return
        with saved_storages() as kept:
            self.engine.run(self.method.phases(self.stage, 1)[0], chunks[:1])
        modules = [net.module for net in self.method.nets.values()]
        modules += [m for m in (self.method.distance,) if isinstance(m, torch.nn.Module)]
        state = sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))
        gradients = max(sum(p.numel() * 4 for p in player.params) for player in self.players.values())
        self.memory = total_bytes(kept, beside=modules) + state + gradients + self._optimizer_bytes()

    def _optimizer_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for player in self.players.values() for t in player.state().values())


def synthetic(config: Any, resolution: int, device: torch.device) -> Tensor:
    """uint8 noise of the shape of a batch: timings do not depend on what is in the images."""
    shape = (config.batch_size, 3, resolution, resolution)
    return torch.randint(0, 256, shape, generator=generator("bench"), dtype=torch.uint8).to(device)


def compare(
    variants: list[Variant], batches: Iterator[tuple[Tensor, Tensor | None]], rounds: int, clock: Clock
) -> None:
    """Rounds of A B C A B C ..., so that whatever else the machine does hits all alike; the first round warms up."""
    for number in range(rounds + 1):
        for variant in variants:
            began = time.perf_counter()
            images, labels = next(batches)
            waited = time.perf_counter() - began
            chunks = variant.chunks(images, labels, number * PERIOD)
            found = variant.step(chunks, clock)
            if number == 0:
                variant.measure_memory(chunks)
                continue
            variant.waited.append(waited / (time.perf_counter() - began))
            for name, seconds in found.items():
                variant.seconds.setdefault(name, []).append(seconds)


# What L_SD costs


def cost_of_distillation(
    variant: Variant, images: Tensor, labels: Tensor | None, rounds: int, clock: Clock
) -> dict[str, dict[str, float]]:
    """Seconds, FLOPs and bytes kept a batch of the parts of L_SD: teacher, T, distance, backward to the image."""
    method, chunk = variant.method, variant.chunks(images, labels, 0)[0]
    draws = chunk.draws.sub("G")
    with torch.no_grad(), variant.engine.autocast():
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


def _distil(method: Any, variant: Variant, chunk: Chunk, draws: Any, fake: Tensor, part: Callable[..., Any]) -> None:
    """L_SD of `methods/sdgan.py`, part by part."""
    student = fake.detach().float().requires_grad_(True)
    with variant.engine.autocast():
        with torch.no_grad():
            teacher = part("teacher forward", lambda: method.generate(method.G_ema, chunk, draws, teacher=True))
        x, y = student, teacher
        if method.T is not None:
            x, y = part("T", lambda: method.T(student, teacher, draws.sub("T")))
        loss = part("distance forward", lambda: method.distance(x, y).mean())
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
