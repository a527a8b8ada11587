"""`sdtrain upscale`: pictures and folders in, larger pictures out; of shards and films see upscale_shards.py, _film.py.

    OUT/
      NAME.png             one a picture, in the sub-folders of its input folder; complete or absent
      NAME_jpg.png         where two inputs would take one name

Depth (8 or 16 bits), transparency and colour profile are kept. A file that cannot be used is named with its reason, the
others are done, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands import film_options
from sdtrain.commands.going_on import going_on
from sdtrain.data.read.budget import LIMITS, PictureLimits, available_bytes
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, DataError, UserError, WeightsError
from sdtrain.files import why_unwritable

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_TILE = 64
FACTORS = (4.0, 64.0)
RESULT_BYTES = 60  # a pixel: float32 as the network gives it, weighed, clipped and rounded, then as it is written


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


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 when a picture was refused; raises ConfigError or WeightsError before anything is written."""
    _check(args)
    if film_options.is_film(args.inputs[0]) and not args.inputs[0].is_dir():
        from sdtrain.commands import upscale_film

        return upscale_film.run(args, Upscaler.of)
    if is_dataset(args.inputs):
        from sdtrain.commands import upscale_shards

        return upscale_shards.run(args, Upscaler.of)
    jobs = find_jobs(args.inputs, args.out)
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
    if reason := why_unwritable(film_options.folder_of(args.out)):
        raise ConfigError(f"--out {args.out}: {reason}; choose another folder")


def is_dataset(inputs: list[Path]) -> bool:
    """Whether the inputs are one data set: a folder that holds tars, or a pattern of tars."""
    source = inputs[0]
    return len(inputs) == 1 and (source.suffix == ".tar" or source.is_dir() and any(source.glob("*.tar")))


@dataclass(frozen=True)
class Job:
    source: Path
    target: Path


def find_jobs(inputs: list[Path], out: Path) -> list[Job]:
    """What to read and where to write it, each target once. ConfigError when there is nothing to do."""
    from sdtrain.data.read.images import is_image_name

    jobs: list[Job] = []
    read: set[Path] = set()
    taken: set[Path] = set()
    for source, folder in _sources(inputs, is_image_name):
        actual = source.resolve()
        # results of an earlier run may lie inside an input folder
        is_result = folder in inputs and out.resolve() in actual.parents
        if actual in read or is_result:
            continue
        read.add(actual)
        target = next(name for name in _names(out / source.relative_to(folder)) if name not in taken)
        taken.add(target)
        jobs.append(Job(source, target))
    if not jobs:
        raise ConfigError(
            f"there are no pictures in {', '.join(map(str, inputs))}; give files, or folders that hold some"
        )
    return jobs


def _names(path: Path) -> Iterator[Path]:
    """a.png, a_jpg.png, a_jpg_2.png, ... for a.jpg."""
    yield path.with_suffix(".png")
    stem = f"{path.stem}_{path.suffix.lstrip('.').lower()}"
    yield path.with_name(f"{stem}.png")
    yield from (path.with_name(f"{stem}_{n}.png") for n in itertools.count(2))


def _sources(inputs: list[Path], is_picture: Callable[[str], bool]) -> Iterator[tuple[Path, Path]]:
    """(file, folder its target's name is relative to); files that were named are tried whatever they are called."""
    for path in inputs:
        if path.is_dir():
            yield from ((file, path) for file in sorted(path.rglob("*")) if file.is_file() and is_picture(file.name))
        else:
            yield path, path.parent


def _work(jobs: list[Job], upscaler: Upscaler) -> list[tuple[Path, str]]:
    from tqdm import tqdm

    from sdtrain.data.read.images import ImageRejected

    refused: list[tuple[Path, str]] = []
    sizes = [_num_pixels(job.source) for job in jobs]
    with tqdm(total=sum(sizes), unit="px", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        done = 0
        for job, size in zip(jobs, sizes):
            bar.set_postfix_str(job.source.name, refresh=False)
            try:
                _one(job, upscaler, bar.update)
            except (ImageRejected, UserError, OSError) as error:
                refused.append((job.source, _reason(error)))
            done += size
            bar.update(done - bar.n)
    return refused


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _num_pixels(path: Path) -> int:
    """From the header, for the progress bar; 0 for a file that will be refused."""
    from sdtrain.data.read.images import ImageRejected, size_of_image

    try:
        width, height = size_of_image(path)
        return width * height
    except (ImageRejected, OSError):  # the reader that decides says why; here only the estimate suffers
        return 0


def _one(job: Job, upscaler: Upscaler, progress: Callable[[int], object]) -> None:
    from sdtrain.data.read.picture import read_picture, write_picture

    if job.target.exists() and job.target.samefile(job.source):
        raise DataError("the result would replace its own input; choose another --out")
    picture = read_picture(job.source, upscaler.limits)
    result = upscaler(picture, progress)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    write_picture(job.target, result)


@dataclass
class Upscaler:
    """A network with the settings of one command; Picture -> Picture."""

    net: Any  # a generator of sdtrain.models
    found: Any  # sdtrain.interop.network.Network
    device: Any
    tile: int = 512
    overlap: int = 32
    scale: float | None = None
    factor: float | None = None
    seed: int = 0
    path: Path = field(default_factory=Path)
    limits: PictureLimits = LIMITS

    @classmethod
    def of(cls, args: argparse.Namespace) -> Upscaler:
        """Load the network; WeightsError unless it is a generator known here."""
        from sdtrain.commands.source import file_of
        from sdtrain.engine.ranks import pick_device
        from sdtrain.interop.architectures import require, title
        from sdtrain.interop.loading import load_network
        from sdtrain.interop.tiled import auto_overlap

        if args.model.suffix == ".onnx":
            return cls.of_graph(args)
        device = pick_device(args.device)
        file = file_of(args.model, args.weights)
        found = load_network(file, prefer="params_ema" if args.weights == "ema" else "params")
        require(file, found, player="Generator")
        if args.factor is not None and found.kind != "gcfsr":
            raise ConfigError(f"--factor is GCFSR's condition, but {file} holds a {title(found)}; leave it out")
        net: Any = found.build().requires_grad_(False)
        if hasattr(net, "z_dim"):
            raise ConfigError(f"{file} holds {found.kind}, which draws images from noise; use `sdtrain sample`")
        overlap = auto_overlap(net) if args.overlap == "auto" else int(args.overlap)
        same = dict(scale=args.scale, factor=args.factor, seed=args.seed, path=file)
        same["limits"] = PictureLimits(megabytes=args.max_image_mb)
        return cls(net.to(device), found, device, args.tile, min(overlap, args.tile // 2), **same)

    @classmethod
    def of_graph(cls, args: argparse.Namespace) -> Upscaler:
        """An ONNX file, which stays on the CPU; raises WeightsError unless it enlarges photographs."""
        from sdtrain.interop.onnx_graph import PhotoGraph
        from sdtrain.interop.tiled import AUTO_OVERLAP_MAX

        if args.factor is not None or args.device not in ("auto", "cpu"):
            raise ConfigError("--factor and --device are not for an .onnx file, which onnxruntime runs on the CPU here")
        net = PhotoGraph(args.model)
        overlap = AUTO_OVERLAP_MAX if args.overlap == "auto" else int(args.overlap)
        more: dict[str, Any] = {"scale": args.scale, "path": args.model}
        more["limits"] = PictureLimits(megabytes=args.max_image_mb)
        return cls(net, net, "cpu", args.tile, min(overlap, args.tile // 2), **more)

    def __call__(self, picture: Any, progress: Callable[[int], object] = lambda pixels: None) -> Any:
        """Raises DataError for a picture the network cannot take."""
        from dataclasses import replace

        import torch

        image = torch.from_numpy(picture.rgb.copy()).permute(2, 0, 1)
        height, width = image.shape[-2:]
        refuse_result(height, width, max(self.scale or 0, getattr(self.net, "scale", 1)))
        out = self._face(image) if self.found.kind == "gcfsr" else self._photo(image, progress)
        if self.scale is not None:
            size = (max(1, round(height * self.scale)), max(1, round(width * self.scale)))
            out = resized(out, size)
        alpha = picture.alpha
        if alpha is not None:
            alpha = resized(torch.from_numpy(alpha.copy())[None], tuple(out.shape[-2:]))[0].numpy()
        return replace(picture, rgb=out.clamp(0, 1).permute(1, 2, 0).numpy(), alpha=alpha)

    def _photo(self, image: Tensor, progress: Callable[[int], object]) -> Tensor:
        import torch

        from sdtrain.interop.tiled import enlarge

        scale = self.net.scale
        fold = 4 // scale if self.found.kind == "rrdbnet" else 1
        while True:
            try:
                sizes = dict(tile=self.tile, overlap=self.overlap, device=self.device)
                return enlarge(self.net, image, scale=scale, fold=fold, progress=progress, **sizes)
            except torch.OutOfMemoryError:
                if self.tile // 2 < max(SMALLEST_TILE, 2 * self.overlap):
                    raise DataError(f"tiles of {self.tile} px do not fit into memory; use --device cpu") from None
                self.tile //= 2
                print(f"out of memory; going on with tiles of {self.tile} px", file=sys.stderr)

    def _face(self, image: Tensor) -> Tensor:
        """GCFSR's test procedure: bicubic to full size, 8-bit rounding, the network with the factor, fixed noise."""
        import torch

        from sdtrain.data.degrade.resize_matlab import imresize
        from sdtrain.rng import Draws

        side, full = image.shape[-1], self.net.resolution
        if image.shape[-2] != side or side > full:
            raise DataError(
                f"GCFSR takes square, aligned faces of at most {full} px, not {side} x {image.shape[-2]}; crop the face"
            )
        factor = self._factor_for(side, full)
        draws = Draws(seed=self.seed, step=0, ghosts=(0,), ghost_batch=1, device=self.device)
        with torch.inference_mode():
            large = imresize(image, full / side) if side < full else image
            x = (large.clamp(0, 1) * 255).round() / 127.5 - 1
            out = self.net(x[None].to(self.device), factor, draws)[0]
        return (out.float().cpu().clamp(-1, 1) + 1) / 2

    def _factor_for(self, side: int, full: int) -> float:
        if self.factor is not None:
            return self.factor
        if FACTORS[0] <= full / side <= FACTORS[1]:
            return full / side
        raise DataError(f"a {side} px face is no reduction by 4 to 64 of {full} px; say --factor, how blurred it is")


def refuse_result(height: int, width: int, scale: float) -> None:
    """Raise DataError for a result that would not fit into the memory that is free."""
    need, free = int(RESULT_BYTES * height * width * scale**2), available_bytes()
    if need > free:
        raise DataError(
            f"its result of {width * scale:.0f}x{height * scale:.0f} pixels needs {need >> 20} MB of memory, "
            f"{free >> 20} MB are free; cut it into pieces"
        )


def resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """[C, H, W] by bicubic interpolation, antialiased when shrinking, to [C, *size]."""
    from torch.nn import functional as F

    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
