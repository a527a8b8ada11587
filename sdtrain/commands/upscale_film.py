"""`sdtrain upscale FILM --out FILM_x4.mkv`: a film in, the same one enlarged out, with its sound.

    FILM_x4.mkv                       complete or absent
    FILM_x4.mkv.parts/frames.json     when each frame is shown, while there is work left
    FILM_x4.mkv.parts/.pack/          finished parts of so many frames, encoded, each with a marker; see shard_jobs.py

Frames keep their times, also where the rate varies. A rank takes parts that follow each other, and decodes the film up
to its last one. On one machine, with one version of ffmpeg, the film is the same to the byte after any kill.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sdtrain.commands import film_options, shard_jobs
from sdtrain.commands.shard_jobs import Job, Manifest, Work, mark
from sdtrain.commands.upscaler import Upscaler
from sdtrain.data.pack.film import MAX_FRAME_BYTES, Encoder, Form, Style, join, num_frames
from sdtrain.data.pack.pack import other_plan
from sdtrain.data.read.budget import PictureLimits
from sdtrain.data.read.film import Film, frame_times, frames, probe, programs, version
from sdtrain.data.read.picture import picture_of_values, values_of
from sdtrain.errors import EXIT_OK, ConfigError, DataError, UserError
from sdtrain.files import AtomicFile, read_json, sha256_of_file, sync_folder, write_json

ANY = PictureLimits(pixels=(1 << 31) - 1, megabytes=1 << 20)


@dataclass(frozen=True)
class Part(Job):
    """Frames of a film, by number."""

    @property
    def path(self) -> Path:
        return self.staged / f"part-{self.number:06d}.nut"


@dataclass
class Task:
    """One film, and what becomes of it."""

    film: Film
    out: Path
    style: Style
    upscaler: Upscaler
    plan: str
    times: list[int] = field(default_factory=list)
    """Of frames, in the film's time base."""

    @property
    def parts(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def form(self) -> Form:
        made_with = f"sdtrain {self.plan[:32]}"
        return Form(self.style.codec, self.out.suffix.lower(), made_with, self.upscaler.limits)

    def seconds(self, first: int, last: int) -> Fraction:
        """From frame `first` until frame `last` is shown; the one after the last is as long as most are."""
        base = self.film.time_base
        end = self.times[last] if last < len(self.times) else self.times[-1] + round(1 / self.film.rate / base)
        return (end - self.times[first]) * base


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError, DataError for the first film that cannot be enlarged."""
    film_options.check(args)
    pairs = film_options.targets(args.inputs, args.out)
    programs()
    upscaler = shard_jobs.on_this_rank(lambda: Upscaler.of(args))
    for source, out in pairs:
        enlarge(task_of(source, out, upscaler, args), args.part)
    return EXIT_OK


def task_of(source: Path, out: Path, upscaler: Upscaler, args: argparse.Namespace) -> Task:
    film = probe(source, upscaler.limits)
    style = style_of(film, upscaler, args)
    written = [args.codec, args.crf, args.part, out.suffix.lower(), version()]
    plan = shard_jobs.digest_of([sha256_of_file(source), sha256_of_file(upscaler.path), upscaler.settings, written])
    return Task(film, out, style, upscaler, plan)


def style_of(film: Film, upscaler: Upscaler, args: argparse.Namespace) -> Style:
    """Raises ConfigError for results that cannot be encoded."""
    times, side = upscaler.enlargement, getattr(upscaler.net, "resolution", None)
    width, height = (round(n * times) if times else int(side or n) for n in (film.width, film.height))
    style = Style(width, height, args.codec, args.crf)
    if not style.even:
        raise ConfigError(
            f"{film.path} would have {width}x{height} pixels, and {args.codec} takes even numbers alone; "
            "choose another --scale, or --codec ffv1"
        )
    if 3 * width * height >= MAX_FRAME_BYTES:
        raise ConfigError(
            f"{film.path} would have {width}x{height} pixels, more than ffmpeg takes in one frame; "
            "choose a smaller --scale"
        )
    return style


def enlarge(task: Task, length: int) -> None:
    """Do this rank's parts of `length` frames each; the rank that comes last joins them."""
    rank, world = shard_jobs.rank_and_world()
    lock = task.out.with_name(f".{task.out.name}.lock")
    manifest = whole(task)
    if not manifest:
        if other_plan(task.parts, task.plan):
            raise ConfigError(f"{task.parts} was begun with other choices; delete it, or choose another --out")
        with shard_jobs.written_to(task.out), tidied(task):
            prepare(task, rank)
        jobs = plan_jobs(task, length)
        mine = jobs[len(jobs) * rank // world : len(jobs) * (rank + 1) // world]
        work = Work(task.out, jobs[0].staged, lock, lambda: whole(task), lambda markers: place(task, jobs))
        reader = Reader(task, mine[-1].samples[-1] + 1 if mine else 0)
        manifest = shard_jobs.fill(work, jobs, mine, lambda job, tick: encode(job, task, reader, tick), "upscaling")
        shard_jobs.told(task.out, manifest, len(mine), len(jobs), "parts")
    if manifest:
        shutil.rmtree(task.parts, ignore_errors=True)
        print(f"upscaled {task.film.path} to {task.style.width}x{task.style.height} pixels in {task.out}")


def plan_jobs(task: Task, length: int) -> list[Part]:
    starts = range(0, len(task.times), length)
    parts = (range(first, min(first + length, len(task.times))) for first in starts)
    return [Part(n, str(task.parts), task.plan, part) for n, part in enumerate(parts)]


def whole(task: Task) -> Manifest:
    """The result of an earlier start, or {}. Raises ConfigError for another file of its name."""
    if not os.path.lexists(task.out):
        return {}
    try:
        if task.form.made_with in probe(task.out, ANY).tags.values():
            return {"plan": task.plan}
    except DataError:
        pass  # whatever it is, it is not ours
    raise ConfigError(
        f"{task.out} is there already, and not what this command makes; delete it, or choose another --out"
    )


def prepare(task: Task, rank: int) -> None:
    """Look through the film for the times of its frames, and try out whether the result can be written."""
    (task.parts / ".pack").mkdir(parents=True, exist_ok=True)
    kept = task.parts / "frames.json"
    try:
        found = read_json(kept)
        task.times = found["times"] if found["plan"] == task.plan else []
    except (OSError, ValueError, LookupError, TypeError):
        task.times = []
    if not task.times:
        task.times, complaints = frame_times(task.film, task.upscaler.limits)
        notes = [*task.film.notes, *([f"its decoder complained {complaints:,} times"] if complaints else [])]
        for note in notes if rank == 0 else ():
            print(f"{task.film.path}: {note}", file=sys.stderr)
        write_json(kept, {"plan": task.plan, "times": task.times})
    rehearse(task, rank)


@contextmanager
def tidied(task: Task) -> Iterator[None]:
    """A failure before the first part leaves nothing."""
    try:
        yield
    except BaseException:
        if not any((task.parts / ".pack").glob("*.json")):
            shutil.rmtree(task.parts, ignore_errors=True)
        raise


def rehearse(task: Task, rank: int) -> None:
    """A film of one black frame: what an encoder or a container refuses is known before the work begins."""
    part, joined = (task.parts / f"rehearsal-{rank}{suffix}" for suffix in (".nut", task.out.suffix))
    try:
        with Encoder(part, task.film, task.style) as encoder:
            encoder.add(Fraction(0), np.zeros((task.style.height, task.style.width, 3), np.uint8))
        join([(part, Fraction(1))], Fraction(0), task.film, joined, replace(task.form, more=("-t", "0.1")))
    finally:
        part.unlink(missing_ok=True)
        joined.unlink(missing_ok=True)


class Reader:
    """Frames of a film by number, decoded once while they are asked for in their order, up to `last` - 1."""

    def __init__(self, task: Task, last: int) -> None:
        self._task, self._last, self._at = task, last, -1
        self._frames: Iterator[Any] = iter(())

    def __call__(self, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        if numbers[0] != self._at:
            self._frames = frames(self._task.film, numbers[0], self._last, self._task.upscaler.limits)
        for self._at in numbers:
            yield self._at, next(self._frames)
        self._at += 1


def encode(job: Part, task: Task, reader: Reader, tick: Callable[[int], object]) -> None:
    """Write one part, then its marker."""
    with AtomicFile(job.path) as file, Encoder(file.temporary, task.film, task.style) as encoder:
        for number, frame in reader(job.samples):
            encoder.add(task.seconds(job.samples[0], number), enlarged(number, frame, task))
            tick(1)
    mark(job, job.path.stat().st_size, sha256_of_file(job.path), count=len(job.samples))


def enlarged(number: int, frame: Any, task: Task) -> Any:
    """uint8 [H, W, 3] of a frame, as `upscale` writes it for a picture. Raises DataError with its number."""
    try:
        return values_of(task.upscaler(picture_of_values(frame)))
    except UserError as error:
        raise DataError(f"{task.film.path}, frame {number}: {error}") from None


def place(task: Task, jobs: Sequence[Part]) -> Manifest:
    """Join all parts under the name of the result."""
    parts = [(job.path, task.seconds(job.samples[0], job.samples[-1] + 1)) for job in jobs]
    joined = jobs[0].staged / f"joined{task.out.suffix}"
    with AtomicFile(joined) as file:
        join(parts, task.times[0] * task.film.time_base, task.film, file.temporary, task.form)
        if (found := num_frames(file.temporary)) != len(task.times):
            raise DataError(
                f"{task.out} would have {found} of {len(task.times)} frames; delete {task.parts}, and begin again"
            )
    os.replace(joined, task.out)
    sync_folder(task.out.parent)
    return {"plan": task.plan}
