"""What `sdtrain upscale` costs: students against their FLOPs, tiles against the bare network, memory, overlap, seams.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_upscale.py students   # RRDBNet, C = 1 to 1/8, a 256 px picture
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_upscale.py photo      # SRVGG and its quarter, 2000 x 1500
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_upscale.py memory     # the same at three tiles, a process each
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_upscale.py seam       # tiled against whole, default overlap
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_upscale.py overlap    # a folder, in turn against at once

Networks have random weights, which cost what trained ones cost. A picture is read, enlarged, encoded and written;
loading a network and importing torch are not counted. Seconds are processor seconds of one thread, the least of
interleaved rounds; those of `overlap`, which processor time does not show, are by the clock. `auto` compiles and
exports networks only with --build, which takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from sdtrain.activations import Watch  # noqa: E402
from sdtrain.commands.overlap import overlapped  # noqa: E402
from sdtrain.commands.upscaler import Upscaler  # noqa: E402
from sdtrain.data.read.picture import Picture, png_of, read_picture  # noqa: E402
from sdtrain.files import write_bytes  # noqa: E402
from sdtrain.interop.network import Network  # noqa: E402
from sdtrain.interop.tiled import auto_overlap, enlarge, spans  # noqa: E402
from sdtrain.models.rrdbnet import networks as rrdbnet  # noqa: E402
from sdtrain.models.rrdbnet import options as rrdbnet_options  # noqa: E402
from sdtrain.models.srvgg import networks as srvgg  # noqa: E402
from sdtrain.models.srvgg import options as srvgg_options  # noqa: E402
from sdtrain.release import runtime  # noqa: E402

WIDTHS = [("1", "scaled"), ("1/2", "scaled"), ("1/4", "scaled"), ("1/8", "scaled")]
WIDTHS += [("1/2", "fixed"), ("1/4", "fixed"), ("1/8", "fixed")]
MANY = 1 << 40  # pixels: a calibration pays
MB = 1 << 20


def rrdb(C: str, growth: Any) -> Any:
    return rrdbnet.Generator(rrdbnet_options.scaled(rrdbnet.GeneratorOptions(), C, growth))


def compact(C: str) -> Any:
    return srvgg.Generator(srvgg_options.scaled(srvgg.GeneratorOptions(), C))


def upscaler_of(net: Any, how: str = "eager", tile: int = 512) -> Upscaler:
    kind, options = type(net).__module__.split(".")[-2], dataclasses.asdict(net.options)
    found = Network(kind=kind, player="Generator", role="G_ema", state=net.state_dict(), options=options)
    made = found.build().requires_grad_(False)
    return Upscaler(made, found, torch.device("cpu"), tile, auto_overlap(made), runtime=how, pixels=MANY)


def photograph(path: Path, height: int, width: int) -> Path:
    """Waves, edges and noise, which a PNG cannot shorten to nothing."""
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(x / 23 + c) * np.cos(y / 31 - c) / 4 + 0.5 * ((x // 97 + y // 71) % 2) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 0.02, (height, width, 3))
    Image.fromarray(((np.stack(planes, 2) + 0.25 + noise).clip(0, 1) * 255).astype(np.uint8)).save(path)
    return path


def least(work: Mapping[Any, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time) -> dict:
    """The smallest of interleaved rounds, in seconds."""
    found = dict.fromkeys(work, math.inf)
    for _ in range(rounds):
        for name, one in work.items():
            start = clock()
            one()
            found[name] = min(found[name], clock() - start)
    return found


def end_to_end(upscaler: Upscaler, source: Path, target: Path) -> None:
    write_bytes(target, png_of(upscaler(read_picture(source))))


def students(folder: Path, rounds: int, teacher: bool) -> None:
    source, x = photograph(folder / "in.png", 256, 256), torch.zeros(1, 3, 64, 64)
    flops, work = {}, {}
    for width in WIDTHS[0 if teacher else 1 :]:
        net = rrdb(*width).eval()
        with torch.no_grad(), Watch() as seen:
            net(x)
        flops[width] = seen.flops * 16
        for how in ("eager", "auto"):
            work[width, how] = partial(end_to_end, upscaler_of(net, how), source, folder / "out.png")
    found, first = least(work, rounds), next(iter(flops))
    for how in ("eager", "auto"):
        for width in flops:
            seconds, ratio = found[width, how], flops[first] / flops[width]
            gain = found[first, how] / seconds
            print(f"{how:5s} C={width[0]:4s} growth {width[1]:6s} {seconds:7.3f} s  x{gain:5.2f}  FLOPs x{ratio:6.2f}")
    for width in flops:
        print(f"auto against eager, C={width[0]} {width[1]}: x{found[width, 'eager'] / found[width, 'auto']:.2f}")


def photo(folder: Path, rounds: int) -> None:
    source = photograph(folder / "in.png", 1500, 2000)
    for name, net in (("SRVGG C=1/4", compact("1/4")), ("SRVGG C=1", compact("1"))):
        for how in ("eager", "channels-last"):
            print(f"{name} {how}: {tiled_against_bare(upscaler_of(net, how), source, rounds)}", flush=True)


@torch.inference_mode()
def tiled_against_bare(upscaler: Upscaler, source: Path, rounds: int) -> str:
    picture = read_picture(source)
    image = torch.from_numpy(picture.rgb.copy()).permute(2, 0, 1).contiguous()  # as `enlarge` hands pieces to a network
    upscaler(picture)  # which chooses the run
    run, sizes = upscaler.run, {"tile": upscaler.tile, "overlap": upscaler.overlap}
    axes = [spans(side, **sizes) for side in image.shape[-2:]]
    tiles = [image[None, :, y.start : y.stop, x.start : x.stop] for y in axes[0] for x in axes[1]]
    work = {
        "bare": lambda: [run(tile) for tile in tiles],
        "square": lambda: run(image[None, :, :512, :512]),
        "tiled": lambda: enlarge(run, image, scale=4, bits=8, **sizes),
        "network": lambda: upscaler(picture),
        "whole": lambda: end_to_end(upscaler, source, source.with_name("out.png")),
    }
    found = least(work, rounds)
    share = sum(tile[0, 0].numel() for tile in tiles) / image[0].numel()
    plain = found["square"] * image[0].numel() / 512**2
    return (
        f"network on the tiles {found['bare']:.2f} s; tiled and blended x{found['tiled'] / found['bare']:.3f}, the "
        f"picture x{found['network'] / found['bare']:.3f}, with PNG and file x{found['whole'] / found['bare']:.3f}; "
        f"pixels computed a pixel {share:.3f}, against 512 px tiles without overlap ({plain:.2f} s): tiled "
        f"x{found['tiled'] / plain:.3f}"
    )


def resident_mb() -> float:
    """The most so far; `ru_maxrss` would begin with that of the process this one was started by."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def peak(source: Path, C: str, tile: int) -> None:
    """Print the peak memory of a process: before the picture, after the network, after the file."""
    upscaler = upscaler_of(compact(C), "eager", tile)
    upscaler(Picture(np.zeros((32, 32, 3), np.float32)))  # libraries make their workspaces
    before = resident_mb()
    made = upscaler(read_picture(source))
    tiled = resident_mb()
    write_bytes(source.with_name("out.png"), png_of(made))
    print(f"{before:.0f} {tiled:.0f} {resident_mb():.0f}")


def memory(folder: Path) -> None:
    for height, width, C in ((750, 1000, "1"), (750, 1000, "1/4"), (1500, 2000, "1/4")):
        source = photograph(folder / f"{width}.png", height, width)
        for tile in (128, 256, 512):
            words = [sys.executable, __file__, "peak", str(source), C, str(tile)]
            said = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
            before, tiled, whole = map(float, said)
            print(
                f"{width}x{height}, SRVGG C={C}, tile {tile}: {before:.0f} MB before; the network adds "
                f"{tiled - before:.0f} MB (its result has {width * height * 16 * 12 / MB:.0f} MB), with the PNG "
                f"{whole - before:.0f} MB",
                flush=True,
            )


@torch.inference_mode()
def seam(folder: Path, size: tuple[int, int] = (420, 500)) -> None:
    picture = read_picture(photograph(folder / "in.png", *size))
    image = torch.from_numpy(picture.rgb.copy()).permute(2, 0, 1)
    nets = {"SRVGG C=1": compact("1"), "SRVGG C=1/4": compact("1/4"), "RRDBNet C=1/4": rrdb("1/4", "scaled")}
    for name, net in nets.items():
        net.eval()
        overlap = auto_overlap(net)
        whole = enlarge(net, image, scale=4, tile=1 << 20)
        tiled = enlarge(net, image, scale=4, tile=128, overlap=overlap)
        off = (tiled - whole).abs()
        rows, columns = (edges(side, 128, overlap, 4) for side in size)
        near = max(off[:, rows].max().item(), off[:, :, columns].max().item())
        codes = (tiled.clamp(0, 1) * 255).round() - (whole.clamp(0, 1) * 255).round()
        print(
            f"{name}, overlap {overlap}, tiles of 128: off by {near:.1e} at borders, {off.max().item():.1e} anywhere; "
            f"8-bit values {int(codes.abs().max())} ({int((codes != 0).sum())} of {codes.numel()})"
        )


def edges(side: int, tile: int, overlap: int, scale: int) -> list[int]:
    """The output rows, or columns, on either side of where two cores meet."""
    inner = [span.core_start * scale for span in spans(side, tile, overlap) if span.core_start]
    return [at + step for at in inner for step in (-1, 0)]


def overlap(folder: Path, rounds: int, count: int = 8) -> None:
    sources = [photograph(folder / f"{number}.png", 300, 400) for number in range(count)]
    (folder / "out").mkdir()
    for name, net in (("SRVGG C=1/4", compact("1/4")), ("SRVGG C=1", compact("1"))):
        upscaler = upscaler_of(net, "eager")
        ways = {"one by one": partial(one_by_one, upscaler, sources), "at once": partial(at_once, upscaler, sources)}
        clock, work = least(ways, rounds, time.perf_counter), least(ways, 1)
        ratio = clock["one by one"] / clock["at once"]
        print(
            f"{name}, {count} pictures of 400x300: one by one {clock['one by one']:.2f} s, at once "
            f"{clock['at once']:.2f} s by the clock, x{ratio:.2f}; processor time {work['one by one']:.2f} and "
            f"{work['at once']:.2f} s",
            flush=True,
        )


def one_by_one(upscaler: Upscaler, sources: list[Path]) -> None:
    for source in sources:
        end_to_end(upscaler, source, source.parent / "out" / source.name)


def at_once(upscaler: Upscaler, sources: list[Path]) -> None:
    for source, made in overlapped(sources, read_picture, upscaler, png_of, upscaler.both_fit):
        write_bytes(source.parent / "out" / source.name, made.get())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("students", "photo", "memory", "seam", "overlap", "peak"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--build", action="store_true", help="let auto try what takes long to build")
    parser.add_argument("--no-teacher", dest="teacher", action="store_false", help="leave out the full width")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.build:
        runtime.BUILD_SEC |= {"compiled": math.inf, "onnx": math.inf}
    if args.what == "peak":
        return peak(Path(args.rest[0]), args.rest[1], int(args.rest[2]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "students":
            students(folder, args.rounds, args.teacher)
        elif args.what == "photo":
            photo(folder, args.rounds)
        elif args.what == "memory":
            memory(folder)
        elif args.what == "seam":
            seam(folder)
        else:
            overlap(folder, args.rounds)


if __name__ == "__main__":
    main()
