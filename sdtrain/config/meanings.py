"""What a key means and its unit: the text under the field of its option class, read from the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from sdtrain.config.options import Images, Span

UNIT = re.compile(r"\[([^\]]+)\] ")


@dataclasses.dataclass(frozen=True)
class Meaning:
    """`text` is a sentence or more; `unit` is empty for words, sections, weights and shares."""

    text: str
    unit: str = ""


def meanings(cls: type) -> dict[str, Meaning]:
    """The meaning of each field of a dataclass that has one, those of its bases included."""
    found: dict[str, Meaning] = {}
    for owner in cls.__mro__[::-1]:
        if owner is not object:
            found.update(_written(owner.__module__).get(owner.__name__, {}))
    return found


@cache
def _written(module: str) -> dict[str, dict[str, Meaning]]:
    """Class name -> field -> meaning, of one imported module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_under_fields(node)) for node in classes}


def _under_fields(node: ast.ClassDef) -> Iterator[tuple[str, Meaning]]:
    for key, below in zip(node.body, node.body[1:]):
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(below, ast.Expr):
            text = inspect.cleandoc(ast.literal_eval(below.value)).replace("\n", " ")
            unit = UNIT.match(text)
            yield key.target.id, Meaning(text[unit.end() :], unit[1]) if unit else Meaning(text)


def unit_of_type(annotation: Any) -> str:
    """The unit of a type that carries one, else ''."""
    if annotation == Images:
        return "images"
    if annotation == Span:
        return "epochs, steps or images"
    return next((unit for inner in get_args(annotation) if (unit := unit_of_type(inner))), "")
