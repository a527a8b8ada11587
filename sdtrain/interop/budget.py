"""What a weights file from a stranger may cost, as a function of its size, and how it is opened and quoted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from sdtrain.errors import WeightsError
from sdtrain.files import open_regular
from sdtrain.terminal import clip

MAX_FILE_BYTES = 16 << 30
MAX_CARD_BYTES = 1 << 20
MAX_CARD_DEPTH = 32
MAX_NAME = 512  # characters of a tensor's name, twice what any known network has
MAX_INDEX = 1 << 16  # in a tensor's name: a layer, a level or a resolution
MAX_QUOTED = 300  # characters of a file that stand in a message
VALUE_BYTES = 128  # about what a small Python object costs
SPARSE = 16  # times larger than what is on the disk; trained weights have no holes at all


class Budget:
    """What a file of N bytes may become. Whoever makes something of it spends here first.

        values    32 MiB + 4 N, at most 1 GiB, for Python objects: VALUE_BYTES for each opcode, for each item that a
                  call copies and for each module or tensor that gets a name, and the length of each text
        views     1 MiB + 4 N, for tensors that are views of the file's storages

    Time is bounded with the values: there are at most values / VALUE_BYTES steps. For a network of T tensors with E
    numbers in all:

        modules   4000 + 10 T, for the modules and parameters of the network that its options describe
        integers  the larger of 2^20 and E, for each option, the resolution and the number of classes
        header    4 MiB + N / 64, for the table at the beginning of a safetensors file

    All methods raise WeightsError when less is left than they are asked for.
    """

    def __init__(self, source: str, num_bytes: int):
        self.source = source
        self._values = min((32 << 20) + 4 * num_bytes, 1 << 30)
        self._views = (1 << 20) + 4 * num_bytes

    def items(self, count: int) -> None:
        self.text(VALUE_BYTES * count)

    def text(self, num_bytes: int) -> None:
        self._values -= num_bytes
        if self._values < 0:
            raise refuse(self.source, "describes far more than a checkpoint of its size holds")

    def copies(self, values: tuple) -> None:
        """For a call that copies its arguments, as deep as their first level."""
        for value in values:
            if isinstance(value, (str, bytes)):
                self.text(sys.getsizeof(value))
            elif isinstance(value, (list, tuple, set, frozenset, dict)):
                self.items(len(value))

    def views(self, num_bytes: int) -> None:
        self._views -= num_bytes
        if self._views < 0:
            raise refuse(self.source, "describes far more tensor data than it holds")


def max_modules(num_tensors: int) -> int:
    return 4000 + 10 * num_tensors


def max_integer(num_numbers: int) -> int:
    return max(1 << 20, num_numbers)


def max_header(num_bytes: int) -> int:
    return (4 << 20) + num_bytes // 64


def quoted(text: Any) -> str:
    """Text of a file for a message: one line, no control characters, not long."""
    return clip(str(text), MAX_QUOTED)


def refuse(source: str, what: str) -> WeightsError:
    return WeightsError(f"{source}: {quoted(what)}; nothing of the file was run, use a file from a source you trust")


def index_of(digits: str) -> int:
    """The number in a tensor's name. Raises ValueError for one that no network has."""
    number = int(digits[: len(str(MAX_INDEX)) + 1])
    if number > MAX_INDEX:
        raise ValueError(f"a tensor's name counts to {quoted(digits)}")
    return number


def is_name(name: object) -> bool:
    """Whether a file's text can be the name of a tensor: printable and not long."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


def open_weights(path: Path) -> tuple[BinaryIO, int]:
    """A file to read and its size. Raises WeightsError: missing, no regular file, too large, or mostly holes."""
    try:
        file = open(open_regular(path), "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"{path}: cannot be read ({reason}); give an existing file") from error
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES or size > SPARSE * _stored(file, size) + (1 << 26):
        file.close()
        raise refuse(str(path), f"claims {size} bytes, more than any known checkpoint has or than are on the disk")
    return file, size


def _stored(file: BinaryIO, size: int) -> int:
    """Bytes outside holes, of the first thousand stretches; all of them where the file system does not tell."""
    stored, at = 0, 0
    try:
        for _ in range(1000):
            start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            stored += at - start
    except (OSError, AttributeError):  # behind the last data; AttributeError: a system without SEEK_DATA
        pass
    finally:
        file.seek(0)
    return stored
