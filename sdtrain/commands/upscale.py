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
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands import film_options
from sdtrain.commands.going_on import going_on
from sdtrain.commands.running import DATA_SET, add_runtime, form_of, refuse_runtime, upscaling_run
from sdtrain.commands.upscale_jobs import Job, find_jobs, num_pixels
from sdtrain.data.read.budget import LIMITS, PictureLimits, available_bytes
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, DataError, UserError, WeightsError
from sdtrain.exits import OF_THE_DISK
from sdtrain.files import why_unwritable, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from sdtrain.data.read.picture import Picture

SMALLEST_TILE = 64
FACTORS = (4.0, 64.0)
RESULT_BYTES = 24  # a pixel: whole numbers, and as they are encoded and written
DEEP_BYTES = 60  # where they have 16 bits, or are float32 to be resized


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

        return upscale_film.run(args, Upscaler.of)
    if is_dataset(args.inputs):
        from sdtrain.commands import upscale_shards

        return upscale_shards.run(args, Upscaler.of)
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
    runtime: str = "eager"
    precision: str = "fp32"
    pixels: int = 0  # of the pictures to come, as far as they are known
    run: Any = field(default=None, init=False)  # called in the place of `net`, chosen with the first picture

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
        same |= {"runtime": args.runtime or "eager", "precision": args.precision}
        upscaler = cls(net.to(device), found, device, args.tile, min(overlap, args.tile // 2), **same)
        if upscaler.runtime != "auto":  # what cannot be is no fault of a picture
            upscaler.run = upscaling_run(upscaler)
        return upscaler

    @classmethod
    def of_graph(cls, args: argparse.Namespace) -> Upscaler:
        """An ONNX file, which stays on the CPU; raises WeightsError unless it enlarges photographs."""
        from sdtrain.interop.onnx_graph import PhotoGraph
        from sdtrain.interop.tiled import AUTO_OVERLAP_MAX

        if args.factor is not None or args.device not in ("auto", "cpu"):
            raise ConfigError("--factor and --device are not for an .onnx file, which onnxruntime runs on the CPU here")
        if args.runtime not in (None, "auto") or args.precision != "fp32":
            raise ConfigError("--runtime and --precision are not for an .onnx file, which onnxruntime runs as it is")
        net = PhotoGraph(args.model)
        overlap = AUTO_OVERLAP_MAX if args.overlap == "auto" else int(args.overlap)
        limits = PictureLimits(megabytes=args.max_image_mb)
        more: dict[str, Any] = {"scale": args.scale, "path": args.model, "limits": limits}
        upscaler = cls(net, net, "cpu", args.tile, min(overlap, args.tile // 2), **more)
        upscaler.run = net
        return upscaler

    def __call__(self, picture: Any, progress: Callable[[int], object] = lambda pixels: None) -> Any:
        """Raises DataError for a picture the network cannot take."""
        from dataclasses import replace

        import torch

        image = torch.from_numpy(picture.rgb.copy()).permute(2, 0, 1)
        height, width = image.shape[-2:]
        refuse_result(height, width, self.times, self.result_bytes(picture))
        if self.run is None:
            self.run = upscaling_run(self, image)
        bits = picture.bits if self.scale is None else None  # what is resized is rounded after
        out = self.face(image, self.run) if self.found.kind == "gcfsr" else self._photo(image, bits, progress)
        if self.scale is not None:
            out = resized(out, (max(1, round(height * self.scale)), max(1, round(width * self.scale))))
        alpha = picture.alpha
        if alpha is not None:
            alpha = resized(torch.from_numpy(alpha.copy())[None], tuple(out.shape[-2:]))[0].numpy()
        if out.is_floating_point():
            with torch.inference_mode():  # as it was made
                out.clamp_(0, 1)
        return replace(picture, rgb=out.permute(1, 2, 0).numpy(), alpha=alpha)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, beside the network, what is made of a picture."""
        found = {name: getattr(self, name) for name in ("tile", "overlap", "scale", "factor", "seed")}
        form = form_of(self.runtime, self.precision)
        return found if form == "eager" else {**found, "runtime": form}  # another rounds in another way

    @property
    def enlargement(self) -> float | None:
        """Side of a result / of its picture; None where every result has the side of the network."""
        return self.scale or getattr(self.net, "scale", None)

    @property
    def times(self) -> float:
        """The largest enlargement on the way to a result."""
        return max(self.scale or 0, getattr(self.net, "scale", 1))

    def both_fit(self, last: Picture, this: Picture) -> bool:
        """Whether there is memory for the results of two pictures at once."""
        need = sum(self.result_bytes(one) * one.rgb.shape[0] * one.rgb.shape[1] for one in (last, this))
        return need * self.times**2 <= available_bytes()

    def result_bytes(self, picture: Picture) -> int:
        """What a pixel of the result takes at most, until it is written."""
        return RESULT_BYTES if self.scale is None and picture.bits == 8 else DEEP_BYTES

    @property
    def fold(self) -> int:
        """What the sides of a tile must be a multiple of."""
        return 4 // self.net.scale if self.found.kind == "rrdbnet" else 1

    def _photo(self, image: Tensor, bits: int | None, progress: Callable[[int], object]) -> Tensor:
        import torch

        from sdtrain.interop.tiled import enlarge

        while True:
            try:
                sizes = dict(tile=self.tile, overlap=self.overlap, fold=self.fold, scale=self.net.scale)
                return enlarge(self.run, image, bits=bits, device=self.device, progress=progress, **sizes)
            except torch.OutOfMemoryError:
                if self.tile // 2 < max(SMALLEST_TILE, 2 * self.overlap):
                    raise DataError(f"tiles of {self.tile} px do not fit into memory; use --device cpu") from None
                self.tile //= 2
                print(f"out of memory; going on with tiles of {self.tile} px", file=sys.stderr)

    def face(self, image: Tensor, run: Callable[..., Tensor]) -> Tensor:
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
            out = run(x[None].to(self.device), factor, draws)[0]
        return (out.float().cpu().clamp(-1, 1) + 1) / 2

    def _factor_for(self, side: int, full: int) -> float:
        if self.factor is not None:
            return self.factor
        if FACTORS[0] <= full / side <= FACTORS[1]:
            return full / side
        raise DataError(f"a {side} px face is no reduction by 4 to 64 of {full} px; say --factor, how blurred it is")


def refuse_result(height: int, width: int, scale: float, result_bytes: int) -> None:
    """Raise DataError for a result that would not fit into the memory that is free."""
    need, free = int(result_bytes * height * width * scale**2), available_bytes()
    if need > free:
        raise DataError(
            f"its result of {width * scale:.0f}x{height * scale:.0f} pixels needs {need >> 20} MB of memory, "
            f"{free >> 20} MB are free; cut it into pieces"
        )


def resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """[C, H, W] by bicubic interpolation, antialiased when shrinking, to [C, *size]."""
    from torch.nn import functional as F

    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
