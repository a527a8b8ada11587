"""Which backend runs a network here: the one named, or the fastest by a short calibration that is kept.

    SDTRAIN_CACHE/runtime/DIGEST.json    seconds a unit of the backends tried, of one network shape on one machine

The reference is eager in float32. Whatever is taken has given the same within `TOLERANCE` in this process, on what is
to be done.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain import __version__
from sdtrain.engine.origin import describe
from sdtrain.engine.threads import cores
from sdtrain.engine.timing import Clock
from sdtrain.errors import ConfigError
from sdtrain.files import cache_root, read_json, write_json
from sdtrain.release.backends import UNABLE, Run
from sdtrain.release.names import BACKENDS
from sdtrain.terminal import clip

# of a range of one: 8-bit values are off by one at most; float32 forms by a tenth of that
TOLERANCE = {"fp32": 1 / 2550, "bf16": 1 / 255}
WORTH_SEC = 5.0  # eager work that is less is done before a calibration would be
PASS_SEC = 0.5  # what one counted pass may take, on the part of the work that allows it
ROUNDS = 3
HOPED = 1.5  # times as fast as eager: what a backend is built for at most
BUILD_SEC = {name: 40.0 if name in ("compiled", "onnx") else 1.0 for name in BACKENDS}  # until it is known
GAIN = 0.95  # of eager's time, above which a backend is not taken
MAX_CACHE = 1 << 16  # bytes


@dataclass(frozen=True)
class Piece:
    """A part of the work: its units (pixels, images) and what a run makes of it, in a range of one."""

    units: int
    draw: Callable[[Run], Tensor]


@dataclass(frozen=True)
class Figure:
    """What a backend takes, in seconds: a unit of work, and once until it has done its first."""

    unit: float
    build: float = 0.0

    def total(self, units: float) -> float:
        return self.build + units * self.unit


@dataclass
class Runtime:
    """The choice for one network: `about` says its shape and that of its work, `forms` make a run each.

    A form is a backend, or a backend and bf16 with a space between; `eager` is among them.
    """

    forms: Mapping[str, Callable[[], Run]]
    about: dict[str, Any]
    device: torch.device
    asked: str = "auto"
    built: dict[str, Run] = field(default_factory=dict)
    offs: dict[str, float] = field(default_factory=dict)  # differences from what is expected of the smallest piece
    expected: Tensor | None = None

    def chosen(self, pieces: Sequence[Piece], units: int) -> Run:
        """The run to do `units` of work with; `pieces` of it, the smallest first, are what is tried.

        Raises ConfigError for a form that was named and cannot be, or gives something else.
        """
        if self.asked == "auto":
            try:
                return self._fastest(pieces, units)
            except torch.OutOfMemoryError:  # who does the work makes smaller pieces of it
                return self.made("eager")
        return self.made("eager") if self.asked == "eager" else self._named(self.asked, pieces[0])

    def _named(self, name: str, piece: Piece) -> Run:
        try:
            worst = self.difference(name, piece)
        except UNABLE as error:
            raise ConfigError(f"--runtime {name} cannot be used here ({reason(error)}); leave it out") from error
        if worst > tolerance(name):
            raise ConfigError(
                f"--runtime {name} differs from the reference by {worst:.1e} of the range, more than "
                f"{tolerance(name):.1e}; leave it out"
            )
        return self.made(name)

    def made(self, name: str) -> Run:
        if name not in self.built:
            self.built[name] = self.forms[name]()
        return self.built[name]

    def difference(self, name: str, piece: Piece) -> float:
        """The largest from the reference, of a range of one; inf where a result is not finite."""
        if self.expected is None:
            self.expected = piece.draw(self.made("eager"))
        if name not in self.offs:
            found = (piece.draw(self.made(name)) - self.expected).abs().max().item()
            self.offs[name] = found if math.isfinite(found) else math.inf
        return self.offs[name]

    def _fastest(self, pieces: Sequence[Piece], units: int) -> Run:
        figures, unable = recall(self.file)
        figures, how = {name: figure for name, figure in figures.items() if name in self.forms}, "as kept"
        eager = figures.get("eager") or self._first_guess(pieces[0])
        hoped = eager.total(units) * (1 - 1 / HOPED)
        untried = [name for name in self.forms if name not in ("eager", *figures, *unable)]
        wanted = [name for name in untried if hoped > BUILD_SEC[name.partition(" ")[0]]]
        if wanted and eager.total(units) > WORTH_SEC:
            began = time.perf_counter()
            figures |= self._calibrate(wanted, pieces, eager, unable)
            how = f"calibrated in {time.perf_counter() - began:.1f} s"
            keep(self.file, self.key, figures, unable)
        return self._best(figures, pieces[0], units, how) if figures else self.made("eager")

    def _first_guess(self, piece: Piece) -> Figure:
        run, clock = self.made("eager"), Clock(self.device)
        piece.draw(run)
        seconds, self.expected = clock.time(partial(piece.draw, run))
        return Figure(seconds / piece.units)

    def _calibrate(
        self, wanted: Sequence[str], pieces: Sequence[Piece], eager: Figure, unable: dict[str, str]
    ) -> dict[str, Figure]:
        """Figures of eager and `wanted`: the fastest of passes in turn, over the largest piece that is affordable.

        What cannot be built joins `unable`; what gives something else has no figure.
        """
        piece = max((p for p in pieces if p.units * eager.unit < PASS_SEC), key=lambda p: p.units, default=pieces[0])

        def warm(name: str) -> None:
            if piece is not pieces[0]:
                piece.draw(self.made(name))

        self.difference("eager", pieces[0])  # what is expected
        build = {"eager": 0.0}
        for name in wanted:
            began = time.perf_counter()
            try:
                off = self.difference(name, pieces[0])
                taken = time.perf_counter() - began - eager.total(pieces[0].units)
                if off <= tolerance(name):
                    warm(name)
                    build[name] = max(taken, 0.0)
            except torch.OutOfMemoryError:  # another picture may leave room for it
                continue
            except UNABLE as error:
                unable[name] = reason(error)
        warm("eager")
        clock, seconds = Clock(self.device), dict.fromkeys(build, math.inf)
        for name in [*build] * (ROUNDS if piece.units * eager.unit < PASS_SEC else 2):
            seconds[name] = min(seconds[name], clock.time(partial(piece.draw, self.made(name)))[0])
        return {name: Figure(taken / piece.units, build[name]) for name, taken in seconds.items()}

    def _best(self, figures: Mapping[str, Figure], piece: Piece, units: int, how: str) -> Run:
        """The least total of what is within the tolerance, said in one line; what is built has cost that already."""
        totals = {name: f.total(units) - f.build * (name in self.built) for name, f in figures.items()}
        for name in set(totals) - {"eager", *self.offs}:
            totals[name] += 2 * figures["eager"].unit * piece.units  # to be compared
        times = {name: figures["eager"].unit / figure.unit for name, figure in figures.items()}
        notes = [f"{name} {ratio:.2f}x" for name, ratio in times.items() if name != "eager"]
        notes += [f"{name} is off by {off:.1e}" for name, off in self.offs.items() if off > tolerance(name)]
        for name in sorted(totals, key=lambda name: totals[name]):
            if totals[name] > GAIN * totals["eager"]:
                break
            try:
                worst = self.difference(name, piece)
            except UNABLE as error:
                notes.append(f"{name} cannot be used: {reason(error)}")
                continue
            if worst <= tolerance(name):
                taken = f"{figures[name].unit:.2e} s a {self.about['unit']}"
                print(f"runtime: {name}, {times[name]:.2f}x as fast as eager, {taken}, off by {worst:.0e}, {how}")
                return self.made(name)
            notes.append(f"{name} is off by {worst:.1e}")
        print(f"runtime: eager, {figures['eager'].unit:.2e} s a {self.about['unit']} ({', '.join(notes)}), {how}")
        return self.made("eager")

    @property
    def key(self) -> dict[str, Any]:
        """Everything that the seconds depend on, except what else the machine does."""
        return {**self.about, **machine(self.device)}

    @property
    def file(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return cache_root() / "runtime" / f"{digest[:32]}.json"


def tolerance(form: str) -> float:
    return TOLERANCE["bf16" if form.endswith(" bf16") else "fp32"]


def reason(error: Exception) -> str:
    return clip(str(error).partition("\n")[0] or type(error).__name__, 160)


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, device, threads and the versions that compute."""
    versions = {name: version_of(name) for name in ("torch", "onnxruntime", "onnx", "onnxscript")}
    here = {"processor": processor(), "cores": cores(), "threads": torch.get_num_threads(), "device": describe(device)}
    return {**here, **versions, "sdtrain": __version__}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Its name as Linux has it, elsewhere as the platform does."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def recall(file: Path) -> tuple[dict[str, Figure], dict[str, str]]:
    """Figures and what cannot be built, as `keep` wrote them; nothing, and a sentence, of a file that is damaged."""
    try:
        said = read_json(file, MAX_CACHE)
        figures = {str(name): Figure(*map(float, values)) for name, values in said["seconds"].items()}
        unable = {str(name): str(why) for name, why in said["unable"].items()}
        if "eager" not in figures or not all(0 < f.unit < 1e9 and 0 <= f.build < 1e9 for f in figures.values()):
            raise ValueError("seconds that cannot be")
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        print(f"sdtrain: the calibration kept in {file} is damaged ({reason(error)}), and not used", file=sys.stderr)
        return {}, {}
    return figures, unable


def keep(file: Path, key: dict[str, Any], figures: Mapping[str, Figure], unable: Mapping[str, str]) -> None:
    """Write for the next command; a folder that cannot be written costs it the calibration, and is said."""
    seconds = {name: (figure.unit, figure.build) for name, figure in figures.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"of": key, "seconds": seconds, "unable": dict(unable)})
    except OSError as error:
        print(f"sdtrain: the calibration cannot be kept in {file.parent} ({error.strerror or error})", file=sys.stderr)
