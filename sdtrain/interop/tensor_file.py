"""Safetensors files and JSON beside them, checked before anything large is read. Free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from sdtrain.errors import WeightsError
from sdtrain.files import read_json
from sdtrain.interop.budget import MAX_CARD_BYTES, MAX_CARD_DEPTH, is_name, max_header, open_weights, quoted

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_header(path: Path) -> dict[str, Any]:
    """The table of a safetensors file: name -> dtype, shape and data_offsets. Raises WeightsError.

    Every tensor has a known type and exactly the bytes of its shape, and together they are the file.
    """
    file, size = open_weights(path)
    with file:
        try:
            return _checked(*_parsed(file, size))
        except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise WeightsError(f"{path} is no complete safetensors file ({quoted(error)}); copy it again") from error


def _parsed(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header and how many bytes of tensors follow. Raises ValueError."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"its header would have {length} bytes, the file has {size}")
    if length > max_header(size):
        raise ValueError(f"its header has {length} bytes, more than the tensors explain")
    header = json.loads(file.read(length), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    header.pop("__metadata__", None)
    return header, size - 8 - length


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def _checked(header: dict[str, Any], num_bytes: int) -> dict[str, Any]:
    """Raises ValueError, TypeError or KeyError for a table that does not describe `num_bytes`."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, stop = entry["data_offsets"]
        shape = entry["shape"]
        if not is_name(name) or not all(type(n) is int and 0 <= n < 1 << 48 for n in (begin, stop, *shape)):
            raise ValueError(f"the tensor {name!r:.99} has a name, a shape or a place that none has")
        if begin != end or stop - begin != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"the tensor {name!r:.99} is not as long as its shape, or not where it should be")
        end = stop
    if end != num_bytes:
        raise ValueError(f"its tensors have {end} bytes, the file {num_bytes}")
    return header


def read_description(path: Path) -> Any:
    """The description of a network: JSON of at most MAX_CARD_BYTES and MAX_CARD_DEPTH. Raises WeightsError."""
    try:
        value = read_json(path, MAX_CARD_BYTES)
        require_depth(value, MAX_CARD_DEPTH)
        return value
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} does not describe a network ({quoted(error)}); mend or delete it") from error


def require_depth(value: Any, depth: int) -> None:
    """Raises ValueError where JSON is nested more than `depth` times."""
    level = [value]
    for _ in range(depth):
        level = [part for node in level if isinstance(node, (list, dict)) for part in _parts(node)]
        if not level:
            return
    raise ValueError(f"it is nested more than {depth} times")


def _parts(node: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node
