"""Which images packing left out, and whether so many of them can be an accident."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sdtrain.errors import DataError
from sdtrain.terminal import printable

Rejected = Sequence[Sequence[str]]  # (file, reason) each; what stands before the colon of a reason is its kind

CURES = {
    "not square": "--crop center takes the middle square",
    "too small": "--enlarge accepts them for --resolution, a smaller --tile for tiles",
    "decompression bomb": "--max-pixels N accepts larger ones",
    "too large": "--max-image-mb N accepts those that need more memory",
}


class TooManyRejected(DataError):
    """So many images cannot be used that the choices, not the images, are wrong."""


def share(text: str) -> float:
    """'10%' or '0.1' as 0.1, for argparse. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; give 0% to 100%, or 0 to 1")
    return value


def kinds(rejected: Rejected) -> list[tuple[str, list[Sequence[str]]]]:
    """Rejected images by the kind of reason, most frequent first."""
    found: dict[str, list[Sequence[str]]] = {}
    for pair in rejected:
        found.setdefault(pair[1].partition(":")[0], []).append(pair)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def check_rejected(rejected: Rejected, num_files: int, num_images: int, limit: float) -> None:
    """Raise TooManyRejected when more than `limit` of the files, or all of them, were left out."""
    if len(rejected) <= limit * num_files and num_images:
        return
    reasons = "; ".join(f"{len(pairs)} {kind}{_cure(kind)}" for kind, pairs in kinds(rejected))
    raise TooManyRejected(
        f"{_part(rejected, num_files)} were rejected, --max-rejected allows {limit * 100:.3g} %; nothing was packed: "
        f"{reasons}; for example {_example(rejected[0])}"
    )


def report(rejected: Rejected, num_files: int) -> list[str]:
    """Lines for the screen; none when nothing was rejected."""
    if not rejected:
        return []
    lines = [f"  rejected: {_part(rejected, num_files)}"]
    return lines + [f"    {len(p)} {kind}{_cure(kind)}, for example {_example(p[0])}" for kind, p in kinds(rejected)]


def _part(rejected: Rejected, num_files: int) -> str:
    return f"{len(rejected)} of {num_files} images ({100 * len(rejected) / num_files:.3g} %)"


def _cure(kind: str) -> str:
    return f" ({CURES[kind]})" if kind in CURES else ""


def _example(pair: Sequence[str]) -> str:
    detail = pair[1].partition(":")[2].partition("(")[0].strip()
    return printable(f"{pair[0]}: {detail}" if detail else pair[0])[:300]
