"""`sdtrain sample RUN|CHECKPOINT|FILE --out DIR`: images of a generator, each a function of (seed, index) alone.

    DIR/
      000007.png           the image of index 7; or, with --grid,
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

from sdtrain.commands.running import MODULES, add_runtime, of_modules
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
    which.add_argument("--num", type=int, help=f"this many images, indices 0, 1, ... (default: {DEFAULT_NUM})")
    which.add_argument("--indices", metavar="LIST", help="these images, such as 0-63 or 3,5,8-11")
    add("--seed", type=int, help="seed of the latents (default: that of the run, or 0)")
    add("--weights", choices=tuple(ROLE), default="ema", help="the average of the generator, or the generator itself")
    one = "one class, by number or by its name in the training set (default: the proportions of the training set)"
    add("--class", dest="label", metavar="K|NAME", help=one)
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
    add("--batch", type=int, default=16, help="images at once; changes no image (default: 16)")
    add("--data", metavar="DATA", help="training set of the run, for its classes (default: as its config.yaml says)")
    add("--allow-pipe", action="store_true", help="run the command of --data pipe:COMMAND")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add_runtime(parser, "eager, so that a seed says the same image on machines alike", MODULES)


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError or WeightsError before anything is written."""
    indices = check(args)
    from sdtrain.engine.ranks import pick_device

    device = pick_device(args.device)
    more = {"truncation": args.truncation, "truncation_cutoff": args.truncation_cutoff, "batch_size": args.batch}
    more |= {"label": args.label, "data": args.data, "allow_pipe": args.allow_pipe}
    source = Source(args.path, device, seed=args.seed, weights=args.weights, **more)
    if args.runtime not in (None, "eager"):
        run_faster(source, indices, args)
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
    if sum((bool(args.interpolate), args.mixing_grid, args.grid)) > 1:
        raise ConfigError("--grid, --mixing-grid and --interpolate are three pictures; ask for one at a time")
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
    """Lines between styles where there are any, else great circles between latents; layer noise stands still."""
    import torch

    z, labels = source.latents(indices)
    codes = source.styles(indices) if source.has_styles else z
    between = torch.lerp if source.has_styles else slerp
    closed = [*range(len(codes)), 0]
    shares = torch.arange(args.interpolate, device=codes.device) / args.interpolate
    frames: list[Any] = []
    for here, there in zip(closed, closed[1:]):
        t = shares.view(-1, *[1] * (codes.ndim - 1))
        path = between(codes[here].expand(len(t), *codes.shape[1:]), codes[there].expand(len(t), *codes.shape[1:]), t)
        kept = None if labels is None else labels[here].expand(len(t), -1)
        frames += list(source.draw(path, kept, indices[0]).permute(0, 2, 3, 1).numpy())
    for i, frame in enumerate(frames):
        save(args.out / "interpolation" / f"{i:04d}.png", frame)
    if args.gif:
        write_gif(args.out / "interpolation.gif", frames, args.fps)
    if args.mp4:
        write_mp4(args.out / "interpolation.mp4", frames, args.fps)
    return f"{len(frames)} frames"


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
    import io

    from PIL import Image

    from sdtrain.files import write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


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
