"""What `sdtrain upscale` is told about films, and whether it can be; nothing heavy is loaded for that."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdtrain.errors import ConfigError

SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".ivf", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"),
    *(".nut", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
)
RESULTS = (".mkv", ".mp4")
CODECS = ("h264", "hevc", "ffv1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of_film = parser.add_argument_group("films (with the programs ffmpeg and ffprobe)")
    add = of_film.add_argument
    add("--codec", choices=CODECS, default="h264", help="of the enlarged film; ffv1 loses nothing (default: h264)")
    add("--crf", type=int, default=17, help="quality of h264 and hevc, 0 to 51, lower is better (default: 17)")
    after = "frames after which an interrupted film goes on (default: 120)"
    add("--part", type=int, default=120, metavar="FRAMES", help=after)


def is_film(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def folder_of(out: Path) -> Path:
    """Where something will be written: `--out` itself, unless it is the name of a film."""
    return out.parent if is_film(out) and not out.is_dir() else out


def targets(inputs: list[Path], out: Path) -> list[tuple[Path, Path]]:
    """(film, result) of each input: FILM.mkv in the folder `out`, or `out` itself. Raises ConfigError."""
    if other := [path for path in inputs if not is_film(path)]:
        raise ConfigError(f"{other[0]} is no film, but {inputs[0]} is one; give films and pictures in two commands")
    if folder_of(out) == out:
        pairs = [(path, out / f"{path.stem}.mkv") for path in inputs]
        if len({target for _, target in pairs}) < len(pairs):
            raise ConfigError("two of the films have one name; give them in two commands with other folders")
        return pairs
    if len(inputs) > 1 or out.suffix.lower() not in RESULTS:
        raise ConfigError(f"--out {out}: name one result .mkv or .mp4, or give a folder for all of them")
    return [(inputs[0], out)]


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that cannot be."""
    if not 0 <= args.crf <= 51 or args.part < 1:
        raise ConfigError(f"--crf {args.crf} --part {args.part}: a quality from 0 to 51, and parts of at least 1 frame")
