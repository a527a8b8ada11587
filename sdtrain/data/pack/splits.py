"""Lists that hold images out of training, by a rule anyone can repeat: `python -m sdtrain.data.pack.splits SOURCE OUT`.

OUT/val.txt, OUT/test.txt ...   names of the held-out images, one a line, for `sdtrain pack --list`
OUT/held_out.txt                all of them, for `sdtrain pack --exclude-list`
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from sdtrain.data.pack.sources import SourceReader, list_source
from sdtrain.data.read.images import ImageRejected, decode_image
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, DataError, UserError
from sdtrain.files import write_bytes


def split(names: Sequence[str], sizes: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Disjoint lists of the asked sizes: names in the order of sha256("seed/name"), cut one list after another.

    Independent of the order of `names`. Raises DataError when there are too few.
    """
    if sum(sizes.values()) > len(names):
        raise DataError(f"{len(names)} images are fewer than the {sum(sizes.values())} to hold out; lower the numbers")
    shuffled = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    lists, at = {}, 0
    for part, size in sizes.items():
        lists[part] = sorted(shuffled[at : at + size])
        at += size
    return lists


def large_enough(source: Path, min_side: int) -> list[str]:
    """Names of the usable images of a folder or zip whose sides are at least `min_side` pixels."""
    reader = SourceReader(source)
    names = [file.name for file in list_source(source)]
    return [name for name in names if min_side == 0 or _short_side(reader.read(name)) >= min_side]


def _short_side(data: bytes) -> int:
    try:
        return min(decode_image(data)[0].size)
    except ImageRejected:
        return 0


def write_lists(out: Path, lists: dict[str, list[str]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    everything = sorted(name for names in lists.values() for name in names)
    for part, names in {**lists, "held_out": everything}.items():
        write_bytes(out / f"{part}.txt", "".join(f"{name}\n" for name in names).encode())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sdtrain.data.pack.splits", description="Hold images out by a fixed rule."
    )
    parser.add_argument("source", help="folder or zip of images")
    parser.add_argument("out", help="folder for the lists")
    parser.add_argument("--held-out", nargs="+", default=["val=150", "test=150"], metavar="NAME=COUNT")
    parser.add_argument("--min-side", type=int, default=0, metavar="N", help="only images of at least N pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        sizes = {part: int(count) for part, _, count in (text.partition("=") for text in args.held_out)}
        lists = split(large_enough(Path(args.source), args.min_side), sizes, args.seed)
        write_lists(Path(args.out), lists)
    except UserError as error:
        print(f"sdtrain: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"{args.out}: " + ", ".join(f"{part} {len(names)}" for part, names in lists.items()))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
