"""`sdtrain sample RUN|CHECKPOINT|FILE --out DIR`: images of a generator, each a function of (seed, index) alone.

    DIR/
      000007.png           the image of index 7; or, with --grid,
      shard-000000.tar ... with --shards, a data set as `sdtrain pack` makes (see sample_shards.py); or
      grid.png             all of them on one sheet
      mixing.png           --mixing-grid: layers of one style in another (StyleGAN2)
      interpolation/       --interpolate: 0000.png, 0001.png, ... from each image to the next and back to the first
      interpolation.gif    with --gif
      interpolation.mp4    with --mp4

Every file is complete or absent.
"""

from __future__ import annotations

import argparse
import math
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands.running import DATA_SET, MODULES, add_runtime, of_modules, refuse_runtime
from sdtrain.commands.source import ROLE, Source
from sdtrain.errors import EXIT_OK, ConfigError
from sdtrain.files import why_unwritable

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_NUM = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", type=Path, metavar="RUN|CHECKPOINT|FILE", help="run folder (its best weights), checkpoint or file")
    add("--out", type=Path, required=True, help="folder for the images, made if absent")
    which = parser.add_mutually_exclusive_group()
    many = f"this many images, indices 0, 1, ... (default: {DEFAULT_NUM}); torchrun takes --num for one of its own"
    which.add_argument("--num", "--num-images", type=int, metavar="N", help=many)
    which.add_argument("--indices", metavar="LIST", help="these images, such as 0-63 or 3,5,8-11")
    add("--seed", type=int, help="seed of the latents (default: that of the run, or 0)")
    add("--weights", choices=tuple(ROLE), default="ema", help="the average of the generator, or the generator itself")
    one = "one class, by number or by its name in the training set (default: the proportions of the training set)"
    add("--class", dest="label", metavar="K|NAME", help=one)
    cut = "a data set of N tar shards, as sdtrain pack makes, instead of single images; on any number of ranks"
    add("--shards", type=int, metavar="N", help=cut)
    add("--jpeg", type=int, metavar="QUALITY", help="JPEGs of this quality, 1 to 100, in the shards (default: PNG)")
    add("--grid", action="store_true", help="one sheet instead of single images")
    add(
        "--truncation",
        type=float,
        metavar="PSI",
        help="pull styles to their mean: 1 = not, 0 = all the way (StyleGAN2)",
    )
    add("--truncation-cutoff", type=int, metavar="LAYERS", help="only in this many first layers")
    add("--mixing-grid", action="store_true", help="first half of the images as rows, the rest as columns (StyleGAN2)")
    layers = "layers that take the column's style (default: the coarse ones, 0-6 of the 18 at 1024 px)"
    add("--mixing-layers", metavar="LIST", help=layers)
    add("--interpolate", type=int, metavar="FRAMES", help="frames from each image to the next, and back to the first")
    add("--gif", action="store_true", help="the interpolation also as GIF")
    add("--mp4", action="store_true", help="the interpolation also as MP4 (needs the program ffmpeg)")
    add("--fps", type=int, default=30, help="frames a second of GIF and MP4 (default: 30)")
    add("--batch", type=int, default=16, help="images at once; changes no image but by rounding (default: 16)")
    add("--data", metavar="DATA", help="training set of the run, for its classes (default: as its config.yaml says)")
    add("--data-free", action="store_true", help="open no training set: classes all alike, their numbers for names")
    add("--allow-pipe", action="store_true", help="run the command of --data pipe:COMMAND")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add_runtime(parser, "eager, so that a seed says the same image on machines alike", MODULES)


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError or WeightsError before anything is written."""
    indices = check(args)
    from sdtrain.engine.ranks import pick_device

    more = {"truncation": args.truncation, "truncation_cutoff": args.truncation_cutoff, "batch_size": args.batch}
    more |= {"label": args.label, "data": args.data, "allow_pipe": args.allow_pipe, "data_free": args.data_free}

    def load() -> Source:
        source = Source(args.path, pick_device(args.device), seed=args.seed, weights=args.weights, **more)
        if args.runtime not in (None, "eager"):
            run_faster(source, indices, args)
        return source

    if args.shards:
        from sdtrain.commands import sample_shards

        return sample_shards.run(args, indices, load)
    source = load()
    if args.mixing_grid:
        made = mixing_grid(source, indices, args)
    elif args.interpolate:
        made = interpolation(source, indices, args)
    else:
        made = images(source, indices, args)
    print(f"{made} of {source.role} from {source.file}, seed {source.seed}, in {args.out}")
    return EXIT_OK


def check(args: argparse.Namespace) -> list[int]:
    """The indices asked for. Everything else that can be wrong is found too, before torch is imported.

    Raises ConfigError for the first argument that cannot be.
    """
    if not args.path.exists():
        raise ConfigError(f"there is nothing at {args.path}; give a run folder, a checkpoint folder or a weights file")
    if args.num is not None and args.num < 1 or args.batch < 1 or args.fps < 1:
        raise ConfigError("--num, --batch and --fps must be at least 1")
    if args.interpolate is not None and args.interpolate < 1:
        raise ConfigError(f"--interpolate {args.interpolate}: take at least 1 frame from an image to the next")
    if (args.gif or args.mp4) and not args.interpolate:
        raise ConfigError(f"{'--gif' if args.gif else '--mp4'} is for a moving picture; add --interpolate FRAMES")
    sheets = sum((bool(args.interpolate), args.mixing_grid, args.grid))
    if sheets > 1:
        raise ConfigError("--grid, --mixing-grid and --interpolate are three pictures; ask for one at a time")
    check_shards(args, bool(sheets))
    if args.truncation_cutoff is not None and args.truncation is None:
        raise ConfigError("--truncation-cutoff says in which layers --truncation works; add --truncation PSI")
    if args.mp4:
        ffmpeg()
    if reason := why_unwritable(args.out):
        raise ConfigError(f"--out {args.out}: {reason}; choose another folder")
    indices = parse_list(args.indices, "--indices") if args.indices else list(range(args.num or default_num(args)))
    if len(indices) < 2 and (args.interpolate or args.mixing_grid):
        raise ConfigError("a mixing grid or an interpolation needs at least two images; raise --num or widen --indices")
    return indices


def check_shards(args: argparse.Namespace, sheet: bool) -> None:
    """Raise ConfigError for choices that do not go with shards, or only with them."""
    if args.shards is not None and (sheet or args.shards < 1):
        raise ConfigError(f"--shards {args.shards}: take at least 1, of single images (no sheet, no interpolation)")
    if args.jpeg is not None and not (args.shards and 1 <= args.jpeg <= 100):
        raise ConfigError(f"--jpeg {args.jpeg} is a quality from 1 to 100 of images in shards; add --shards N")
    if args.data_free and args.data:
        raise ConfigError("--data names a training set and --data-free opens none; leave one of them out")
    if args.shards and args.runtime == "auto":
        refuse_runtime(args.runtime, DATA_SET)


def run_faster(source: Source, indices: list[int], args: argparse.Namespace) -> None:
    """Let the network be run as --runtime says, judged by images of it. Raises ConfigError where that cannot be."""
    import torch

    from sdtrain.release.runtime import Piece
    from sdtrain.sampling import generate

    def draw(count: int, net: Any) -> torch.Tensor:
        """Images [count, 3, R, R] in a range of one."""
        style = {"seed": source.seed, "class_counts": source.class_counts, "device": source.device, **source.style}
        return generate(net, indices[:count], **style).float().cpu() / 2

    most, frames = min(args.batch, len(indices)), args.interpolate or 1
    counts = sorted({1, *(most >> n for n in range(most.bit_length()))})
    runtime = of_modules(source.network, source.net, source.device, asked=args.runtime, unit="image", work=[args.batch])
    source.net = runtime.chosen([Piece(count, partial(draw, count)) for count in counts], len(indices) * frames)


def default_num(args: argparse.Namespace) -> int:
    return 8 if args.interpolate or args.mixing_grid else DEFAULT_NUM


def parse_list(text: str, option: str) -> list[int]:
    """'0-3,8' -> [0, 1, 2, 3, 8]. ConfigError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or match[2] is not None and int(match[2]) < int(match[1]):
            raise ConfigError(f"{option} {text}: '{part.strip()}' is neither a number nor a range such as 0-63")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


# Pictures


def images(source: Source, indices: list[int], args: argparse.Namespace) -> str:
    """Single files, or one sheet."""
    from sdtrain.sampling import grid

    if args.grid:
        save(args.out / "grid.png", grid(source(indices), math.ceil(len(indices) ** 0.5)))
        return f"a sheet of {len(indices)} images"
    for first in range(0, len(indices), args.batch):
        part = indices[first : first + args.batch]
        for index, image in zip(part, source(part)):
            save(args.out / f"{index:06d}.png", image.permute(1, 2, 0).numpy())
    return f"{len(indices)} images"


def mixing_grid(source: Source, indices: list[int], args: argparse.Namespace) -> str:
    """Row styles with `--mixing-layers` of the column's style; the first row and column show the styles themselves.

    Raises ConfigError for a generator without styles, or without the layers asked for.
    """
    import torch

    from sdtrain.sampling import grid

    if not source.has_styles:
        raise ConfigError(f"--mixing-grid is for generators with a style space; {source.kind} has none")
    coarse = f"0-{max(source.net.num_ws * 7 // 18, 1) - 1}"
    wanted = parse_list(args.mixing_layers or coarse, "--mixing-layers")
    layers = [layer for layer in wanted if layer < source.net.num_ws]
    if not layers:
        have = f"this generator has the layers 0-{source.net.num_ws - 1}"
        raise ConfigError(f"--mixing-layers {args.mixing_layers}: {have}")
    ws = source.styles(indices)
    rows, columns = ws[: len(ws) // 2], ws[len(ws) // 2 :]
    cells = []
    for row in rows:
        mixed = row.repeat(len(columns), 1, 1)
        mixed[:, layers] = columns[:, layers]
        cells += [row[None], mixed]
    drawn = source.draw(torch.cat([columns, *cells]), None, indices[0])
    sheet = torch.cat([torch.zeros_like(drawn[:1]), drawn])  # the corner stays black
    save(args.out / "mixing.png", grid(sheet, len(columns) + 1))
    return f"{len(rows)} x {len(columns)} mixed styles"


def interpolation(source: Source, indices: list[int], args: argparse.Namespace) -> str:
    """`walk` from each image to the next, and from the last back to the first."""
    import torch

    codes, labels = source.codes(indices)
    closed = [*range(len(codes)), 0]
    shares = torch.arange(args.interpolate, device=codes.device) / args.interpolate
    frames: list[Any] = []
    for here, there in zip(closed, closed[1:]):
        label = None if labels is None else labels[here]
        frames += list(walk(source, codes[here], codes[there], label, shares, indices[0]).permute(0, 2, 3, 1).numpy())
    for i, frame in enumerate(frames):
        save(args.out / "interpolation" / f"{i:04d}.png", frame)
    if args.gif:
        write_gif(args.out / "interpolation.gif", frames, args.fps)
    if args.mp4:
        write_mp4(args.out / "interpolation.mp4", frames, args.fps)
    return f"{len(frames)} frames"


def walk(source: Source, a: Tensor, b: Tensor, label: Tensor | None, shares: Tensor, noise_of: int) -> Tensor:
    """uint8 images [T, 3, R, R] on the way from code a to code b at `shares` [T] of it; layer noise stands still.

    Lines between styles [num_ws, w_dim] where there are any, else great circles between latents [z_dim].
    """
    import torch

    between = torch.lerp if source.has_styles else slerp
    t = shares.view(-1, *[1] * a.ndim)
    path = between(a.expand(len(t), *a.shape), b.expand(len(t), *b.shape), t)
    return source.draw(path, None if label is None else label.expand(len(t), -1), noise_of)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Along the great circle from a to b [N, Z], lengths in a straight line: Gaussian latents stay typical."""
    import torch

    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    a, b = a / length_a, b / length_b
    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).acos()
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle).clamp_min(1e-6)
    direction = torch.where(angle < 1e-4, torch.lerp(a, b, t), arc)
    return direction * torch.lerp(length_a, length_b, t)


# Files


def save(path: Path, picture: Any) -> None:
    """Write a uint8 HWC picture as PNG, complete or not at all."""
    from sdtrain.files import write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, png_of_pixels(picture))


def png_of_pixels(picture: Any) -> bytes:
    """The PNG of a uint8 HWC picture."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def write_gif(path: Path, frames: list[Any], fps: int) -> None:
    """GIF counts in hundredths of a second; rates above 50 would be slowed down by viewers."""
    import io

    from PIL import Image

    from sdtrain.files import write_bytes

    pictures = [Image.fromarray(frame) for frame in frames]
    milliseconds = max(round(100 / fps), 2) * 10
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    write_bytes(path, buffer.getvalue())


def ffmpeg() -> str:
    """The program that writes MP4. Raises ConfigError when it is not there."""
    import shutil

    found = shutil.which("ffmpeg")
    if found is None:
        raise ConfigError("--mp4 needs the program ffmpeg, which is not on this machine; install it, or take --gif")
    return found


def write_mp4(path: Path, frames: list[Any], fps: int) -> None:
    """H.264 through ffmpeg. Raises ConfigError with its last line when it fails."""
    import subprocess
    import tempfile

    from sdtrain.files import write_bytes

    height, width = frames[0].shape[:2]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / path.name
        command = [ffmpeg(), "-loglevel", "error", *raw, "-pix_fmt", "yuv420p", str(whole)]
        done = subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), capture_output=True)
        if done.returncode:
            raise ConfigError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()[-300:]}")
        write_bytes(path, whole.read_bytes())
