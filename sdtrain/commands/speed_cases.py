"""Networks in every form that `sdtrain speed` measures, and the passes that take turns."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.activations import Watch
from sdtrain.commands.source import config_of, file_of
from sdtrain.commands.speed_rows import Asked, new_row
from sdtrain.engine.origin import describe
from sdtrain.engine.ranks import pick_device
from sdtrain.engine.timing import Clock
from sdtrain.errors import ConfigError
from sdtrain.interop.loading import load_network
from sdtrain.interop.network import PHOTOS, Network
from sdtrain.release import backends
from sdtrain.release.outward import Outward, in_order
from sdtrain.rng import generator
from sdtrain.terminal import clip


@dataclass(frozen=True)
class Subject:
    """A network under the name that tables give it."""

    name: str
    network: Network


@dataclass
class Case:
    """One network in one form."""

    subject: Subject
    size: str
    precision: str
    backend: str
    threads: int
    run: Callable[[], Tensor]
    clock: Clock
    seconds: list[float] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        found = self.subject.network
        what = {"name": self.subject.name, "kind": found.kind, "options": found.options}
        where = {"size": self.size, "precision": self.precision, "backend": self.backend, "threads": self.threads}
        return {**what, **where, "clock": self.clock.name, **self.about, "seconds": self.seconds}


def subjects_of(sources: Sequence[Path]) -> list[Subject]:
    """The generators of files and runs; the teacher of a run of super-resolution comes before it, once.

    Raises WeightsError for what holds none.
    """
    found: list[Subject] = []
    for path in sources:
        network = load_network(file_of(path, "ema"))
        if network.player != "Generator":
            raise ConfigError(f"{path} holds a discriminator; give the file of a generator")
        teacher = teacher_of(path, network) if path.is_dir() else None
        if teacher and not any(alike(teacher, one.network) for one in found):
            found.append(Subject(f"teacher of {path.name}", teacher))
        found.append(Subject(str(path), network))
    return found


def alike(one: Network, other: Network) -> bool:
    """Whether two networks are of one shape."""
    return all(getattr(one, key) == getattr(other, key) for key in ("kind", "resolution", "typed_options"))


def teacher_of(run: Path, student: Network) -> Network | None:
    """The network that the configuration of a run describes, with any weights; None where the run's own is that one."""
    config = config_of(run)
    if config is None or not hasattr(config, "student"):
        return None
    options = config.model.generator
    module = importlib.import_module(f"sdtrain.models.{student.kind}.networks")
    with torch.random.fork_rng(devices=[]):
        net = module.Generator(options, resolution=student.resolution)
    told = {key: value for key, value in dataclasses.asdict(options).items() if key != "kind"}
    teacher = replace(student, state=net.state_dict(), options=told, source={}, note=None)
    return None if alike(teacher, student) else teacher


def measure(subjects: Sequence[Subject], asked: Asked, notes: list[str]) -> dict[str, Any]:
    """A row of `--json`. Cases that cannot be made are noted; raises ConfigError where none can."""
    device = pick_device(asked.device)
    threads = asked.threads or (torch.get_num_threads(),)
    before = torch.get_num_threads()
    try:
        cases = [case for subject in subjects for case in cases_of(subject, asked, device, threads, notes)]
        if not cases:
            raise ConfigError("; ".join(["nothing can be measured", *notes]))
        for number in range(asked.warmup + asked.passes):
            for case in cases:
                torch.set_num_threads(case.threads)
                with torch.inference_mode():
                    seconds, _ = case.clock.time(case.run)
                if number >= asked.warmup:
                    case.seconds.append(seconds)
    finally:
        torch.set_num_threads(before)
    return new_row(asked, describe(device), torch.__version__, [case.row() for case in cases])


def cases_of(
    subject: Subject, asked: Asked, device: torch.device, threads: Sequence[int], notes: list[str]
) -> list[Case]:
    """Every form of one network; each has done one pass, compared with eager fp32."""
    net = Outward(subject.network).eval().to(device)
    cases = []
    for size in sizes_of(net, asked.sizes):
        inputs = inputs_of(net, size, asked.batch, device)
        torch.set_num_threads(threads[0])
        with torch.no_grad(), Watch() as seen:  # inference mode hides what is inside
            expected = net(*inputs)
        about = {"parameters": sum(p.numel() for p in net.parameters()), "flops": seen.flops}
        for precision, backend, count in itertools.product(asked.precisions, asked.backends, threads):
            torch.set_num_threads(count)
            try:
                run = partial(backends.made(backend, subject.network, net, inputs, precision), *inputs)
                with torch.inference_mode():
                    made = run()
            except torch.OutOfMemoryError:
                notes.append(f"{subject.name} at {text_of(size)} does not fit into the memory of {describe(device)}")
                continue
            except backends.UNABLE as error:
                why = clip(str(error).partition("\n")[0] or type(error).__name__, 160)
                notes.append(f"{subject.name}: {backend} in {precision} is left out: {why}")
                continue
            case = Case(subject, text_of(size), precision, backend, count, run, Clock(device))
            worst = (made.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-12)
            case.about = {**about, "difference": float(worst), "memory": memory_of(case, net, device)}
            cases.append(case)
    return cases


def sizes_of(net: Outward, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The inputs of a network that takes any; else its own. Raises ConfigError for one that it cannot fold."""
    if net.kind not in PHOTOS:
        return [(net.side, net.side)]
    if odd := [size for size in sizes if any(side % net.fold for side in size)]:
        raise ConfigError(f"--size {text_of(odd[0])}: a network of scale {net.scale} takes multiples of {net.fold}")
    return list(sizes)


def text_of(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def inputs_of(net: Outward, size: tuple[int, int], batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Noise of the shapes that the network takes."""
    picture = torch.rand(batch, 3, *size, generator=generator("speed", *size))
    return tuple(x.to(device) for x in in_order(net.names, net.inputs(batch, "speed", picture)))


def memory_of(case: Case, net: nn.Module, device: torch.device) -> int | None:
    """Bytes of the weights and the most that one pass holds beside them; None where nobody can tell."""
    width = 2 if case.precision == "bf16" else 4
    weights = sum(t.numel() for t in (*net.parameters(), *net.buffers())) * width
    if case.backend == "onnx":
        return None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            case.run()
        torch.cuda.synchronize(device)
        return weights + torch.cuda.max_memory_allocated(device) - before
    if case.backend == "compiled":  # its buffers are not seen by the dispatcher
        return None
    with torch.no_grad(), Watch() as seen:
        case.run()
    return weights + seen.peak
