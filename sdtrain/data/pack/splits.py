"""Lists that hold images out of training, by a rule anyone can repeat: `python -m sdtrain.data.pack.splits SOURCE OUT`.

OUT/val.txt, OUT/test.txt ...   names of the held-out images, one a line, for `sdtrain pack --list`
OUT/held_out.txt                all of them, for `sdtrain pack --exclude-list`
OUT/{train,val,test}.txt        with --celeba: the images of CelebA-HQ in the parts that CelebA defines; the held-out
                                lists are then drawn from its val
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sdtrain.data.pack.sources import SourceFile, SourceReader, list_source
from sdtrain.data.read.budget import LIST_BYTES
from sdtrain.data.read.images import ImageRejected, decode_image
from sdtrain.errors import EXIT_OK, DataError
from sdtrain.exits import run_command
from sdtrain.files import read_within, write_bytes


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


CELEBA_MAPPING, CELEBA_PARTITION = "CelebA-HQ-to-CelebA-mapping.txt", "list_eval_partition.txt"
CELEBA_PARTS = ("train", "val", "test")


def celeba_parts(names: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Images of CelebA-HQ by the part of CelebA that the photograph behind each belongs to.

    `folder` holds the table of CelebAMask-HQ (HQ number, CelebA number, CelebA file) and CelebA's own partition
    (file, 0 to 2). The number of an image stands at the end of its name. Raises DataError for what does not fit.
    """
    part_of = {words[0]: int(words[1]) for words in _table(folder / CELEBA_PARTITION, 2) if words[1] in ("0", "1", "2")}
    file_of = {words[0]: words[2] for words in _table(folder / CELEBA_MAPPING, 3) if words[0].isdigit()}
    parts: dict[str, list[str]] = {part: [] for part in CELEBA_PARTS}
    for name in names:
        number = re.search(r"[0-9]+$", PurePosixPath(name).stem)
        part = part_of.get(file_of.get(str(int(number[0])), "")) if number else None
        if part is None or not 0 <= part < len(CELEBA_PARTS):
            raise DataError(f"{name} is not in {CELEBA_MAPPING} and {CELEBA_PARTITION}; is it an image of CelebA-HQ?")
        parts[CELEBA_PARTS[part]].append(name)
    return parts


def _table(path: Path, columns: int) -> list[list[str]]:
    try:
        text = read_within(path, LIST_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise DataError(f"{path} cannot be read ({reason}); the recipe says where it comes from") from None
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if any(len(row) != columns for row in rows):
        raise DataError(f"{path} does not have {columns} columns; the recipe says which file is meant")
    return rows


def large_enough(source: Path, min_side: int) -> list[str]:
    """Names of the usable images of a folder or zip whose sides are at least `min_side` pixels."""
    reader = SourceReader(source)
    return [file.name for file in list_source(source) if min_side == 0 or _short_side(reader, file) >= min_side]


def _short_side(reader: SourceReader, file: SourceFile) -> int:
    try:
        return min(decode_image(reader.read(file.name))[0].size)
    except ImageRejected:
        return 0


def write_lists(out: Path, lists: dict[str, list[str]]) -> None:
    everything = sorted(name for names in lists.values() for name in names)
    for part, names in {**lists, "held_out": everything}.items():
        write_list(out / f"{part}.txt", names)


def write_list(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "".join(f"{name}\n" for name in names).encode())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sdtrain.data.pack.splits", description="Hold images out by a fixed rule."
    )
    parser.add_argument("source", help="folder or zip of images")
    parser.add_argument("out", help="folder for the lists")
    parser.add_argument("--held-out", nargs="+", default=["val=150", "test=150"], metavar="NAME=COUNT")
    parser.add_argument("--min-side", type=int, default=0, metavar="N", help="only images of at least N pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--celeba", type=Path, metavar="FOLDER", help=f"of {CELEBA_MAPPING} and {CELEBA_PARTITION}")
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    lists = _lists(args)
    print(f"{args.out}: " + ", ".join(f"{part} {len(names)}" for part, names in lists.items()))
    return EXIT_OK


def _lists(args: argparse.Namespace) -> dict[str, list[str]]:
    """Write all lists and return them. Raises DataError."""
    sizes = _sizes(args.held_out)
    names = large_enough(Path(args.source), args.min_side)
    parts = celeba_parts(names, args.celeba) if args.celeba else {}
    if sizes.keys() & parts.keys():
        raise DataError("--celeba makes train, val and test itself; give --held-out other names, such as val100=100")
    drawn = split(parts["val"] if parts else names, sizes, args.seed)
    write_lists(Path(args.out), drawn)
    for part, members in parts.items():
        write_list(Path(args.out) / f"{part}.txt", members)
    return parts | drawn


def _sizes(texts: Sequence[str]) -> dict[str, int]:
    found = {part: count for part, _, count in (text.partition("=") for text in texts)}
    wrong = [part for part, count in found.items() if not re.fullmatch(r"[\w-]+=[0-9]{1,9}", f"{part}={count}")]
    if wrong:
        raise DataError(f"--held-out {wrong[0]}={found[wrong[0]]} is not NAME=COUNT, such as val=150")
    return {part: int(count) for part, count in found.items()}


if __name__ == "__main__":
    sys.exit(main())
