"""`sdtrain upscale`: pictures and folders in, larger pictures out; of shards and films see upscale_shards.py, _film.py.

    OUT/
      NAME.png             one a picture, in the sub-folders of its input folder; complete or absent
      NAME_jpg.png         where two inputs would take one name

Depth (8 or 16 bits), transparency and colour profile are kept. A file that cannot be used is named with its reason, the
others are done, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.commands import film_options
from sdtrain.commands.going_on import going_on
from sdtrain.commands.running import DATA_SET, add_runtime, refuse_runtime
from sdtrain.commands.upscale_jobs import Job, find_jobs, num_pixels
from sdtrain.commands.upscaler import FACTORS, SMALLEST_TILE, Upscaler
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, DataError, UserError, WeightsError
from sdtrain.exits import OF_THE_DISK
from sdtrain.files import why_unwritable, write_bytes

if TYPE_CHECKING:
    from sdtrain.data.read.picture import Picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help="pictures and folders (with sub-folders), one data set of shards, or films",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="RUN|FILE",
        help="run folder (its best student), .pth, .safetensors or .onnx; FILE.json beside it may describe it",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results, made if absent; FILE.mkv, .mp4 of a film"
    )
    parser.add_argument("--scale", type=float, help="output size / input size (default: what the network gives)")
    parser.add_argument("--factor", type=float, help="GCFSR: how much smaller the face was than it should be, 4 to 64")
    parser.add_argument(
        "--tile", type=int, default=512, help="side of the pieces of a large picture, input pixels (default: 512)"
    )
    parser.add_argument(
        "--overlap", default="auto", help="input pixels that neighbouring pieces share and blend (default: auto)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="which weights of a run, or of a file that has both"
    )
    parser.add_argument(
        "--max-image-mb", type=int, default=512, metavar="MB", help="memory one picture may cost (default: 512)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="GCFSR: chooses the noise; the same seed gives the same picture"
    )
    film_options.add_arguments(parser)
    add_runtime(parser, "auto; of data sets and films eager, for their bytes must not depend on a timing")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 when a picture was refused; raises ConfigError or WeightsError before anything is written."""
    _check(args)
    if is_film(args.inputs):
        from sdtrain.commands import upscale_film

        return upscale_film.run(args)
    if is_dataset(args.inputs):
        from sdtrain.commands import upscale_shards

        return upscale_shards.run(args)
    jobs, args.runtime = find_jobs(args.inputs, args.out), args.runtime or "auto"
    upscaler = Upscaler.of(args)
    with going_on(jobs, upscaler, args.out) as left:
        refused = _work(left, upscaler)
    print(f"upscaled {len(jobs) - len(refused)} of {len(jobs)} pictures into {args.out}")
    if not refused:
        return EXIT_OK
    print(f"refused {len(refused)}:", *(f"  {path}: {reason}" for path, reason in refused), sep="\n", file=sys.stderr)
    return EXIT_USER_ERROR


def _check(args: argparse.Namespace) -> None:
    if not args.model.exists():
        raise WeightsError(f"--model {args.model} does not exist; give a run folder, .pth, .safetensors or .onnx file")
    if args.scale is not None and not 0 < args.scale <= 32:
        raise ConfigError(
            f"--scale {args.scale:g} is outside (0, 32]; give the output size as a multiple of the input's"
        )
    if args.factor is not None and not FACTORS[0] <= args.factor <= FACTORS[1]:
        raise ConfigError(f"--factor {args.factor:g} is outside [4, 64], the range GCFSR is trained for")
    if args.tile < SMALLEST_TILE:
        raise ConfigError(f"--tile {args.tile} is too small; use at least {SMALLEST_TILE} pixels")
    if args.overlap != "auto" and not args.overlap.isdigit():
        raise ConfigError(f"--overlap {args.overlap} is neither a number of pixels nor auto")
    if args.overlap != "auto" and 2 * int(args.overlap) > args.tile:
        raise ConfigError(f"--overlap {args.overlap} is more than half of --tile {args.tile}; make the tiles larger")
    if args.runtime == "auto" and (is_film(args.inputs) or is_dataset(args.inputs)):
        refuse_runtime(args.runtime, DATA_SET)
    if reason := why_unwritable(film_options.folder_of(args.out)):
        raise ConfigError(f"--out {args.out}: {reason}; choose another folder")


def is_film(inputs: list[Path]) -> bool:
    return film_options.is_film(inputs[0]) and not inputs[0].is_dir()


def is_dataset(inputs: list[Path]) -> bool:
    """Whether the inputs are one data set: a folder that holds tars, or a pattern of tars."""
    source = inputs[0]
    return len(inputs) == 1 and (source.suffix == ".tar" or source.is_dir() and any(source.glob("*.tar")))


def _work(jobs: list[Job], upscaler: Upscaler) -> list[tuple[Path, str]]:
    from tqdm import tqdm

    from sdtrain.commands.overlap import overlapped
    from sdtrain.data.read.images import ImageRejected
    from sdtrain.data.read.picture import png_of

    refused: list[tuple[Path, str]] = []
    sizes = [num_pixels(job.source) for job in jobs]
    upscaler.pixels = sum(sizes)
    with tqdm(total=sum(sizes), unit="px", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        read, enlarge = partial(_read, upscaler), partial(upscaler, progress=bar.update)
        work = overlapped(jobs, read, enlarge, png_of, upscaler.both_fit)
        done = 0
        with closing(work):
            for size, (job, found) in zip(sizes, work):
                bar.set_postfix_str(job.source.name, refresh=False)
                try:
                    _write(job, found.get())
                except (ImageRejected, UserError, OSError) as error:
                    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                        raise  # of no picture alone
                    refused.append((job.source, _reason(error)))
                done += size
                bar.update(max(done - bar.n, 0))
    return refused


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _read(upscaler: Upscaler, job: Job) -> Picture:
    from sdtrain.data.read.picture import read_picture

    if job.target.exists() and job.target.samefile(job.source):
        raise DataError("the result would replace its own input; choose another --out")
    return read_picture(job.source, upscaler.limits)


def _write(job: Job, data: bytes) -> None:
    job.target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(job.target, data)
