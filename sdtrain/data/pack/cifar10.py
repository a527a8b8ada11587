"""CIFAR-10 as a folder of images: `python -m sdtrain.data.pack.cifar10 data/cifar10/cifar-10-batches-bin OUT`.

OUT/airplane/00029.png ...   the 50,000 training images by class, numbered as they lie in the batches

The binary version is read; the Python version is a pickle, which could run code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.data.read.budget import MB
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, DataError
from sdtrain.exits import run_command
from sdtrain.files import read_within

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
ROW = 1 + 3 * SIDE * SIDE  # the class, then three planes


def export_cifar10(batches: Path, out: Path) -> int:
    """Write the images of data_batch_1.bin to _5.bin as PNG files; returns their number. Raises DataError."""
    number = 0
    for batch in range(1, 6):
        for row in _rows(batches / f"data_batch_{batch}.bin"):
            folder = out / CLASSES[row[0]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)).save(folder / f"{number:05d}.png")
            number += 1
    return number


def _rows(path: Path) -> np.ndarray:
    try:
        rows = np.frombuffer(read_within(path, 64 * MB), np.uint8)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read ({reason}); unpack cifar-10-binary.tar.gz there") from None
    if len(rows) == 0 or len(rows) % ROW or rows[::ROW].max() >= len(CLASSES):
        raise DataError(f"{path} is not a whole batch of the binary version of CIFAR-10; unpack the archive again")
    return rows.reshape(-1, ROW)


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if len(words) != 2:
        print("usage: python -m sdtrain.data.pack.cifar10 BATCHES OUT", file=sys.stderr)
        return EXIT_USER_ERROR
    return run_command(lambda: _export(Path(words[0]), Path(words[1])))


def _export(batches: Path, out: Path) -> int:
    print(f"{out}: {export_cifar10(batches, out)} images")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
