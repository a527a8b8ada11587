"""Networks that nobody has: a slip of the keyboard would otherwise build for hours or take all memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

WIDEST, DEEPEST = 1 << 20, 1_000  # the largest widths are 32768, the most layers 23
DEEP = re.compile(r"layers|blocks?|num_conv|num_discs|kernels|dilations|factor_max|upscale|expansion|multiplier")


def size_problems(model: Any) -> Iterator[tuple[str, str]]:
    """(key, sentence) for each number of a section of `model` that is larger than any network has."""
    for role, section in vars(model).items():
        for item in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            most = DEEPEST if DEEP.search(item.name) else WIDEST
            largest = max(whole_numbers(getattr(section, item.name)), default=0)
            if largest > most and not item.name.endswith("seed"):
                key = f"model.{role}.{item.name}"
                yield key, f"{key} {largest} is more than any network has: take at most {most}"


def whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for part in value:
            yield from whole_numbers(part)
    elif isinstance(value, int):
        yield value
