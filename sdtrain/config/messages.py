"""Turn what pydantic found into sentences: which key, what was given, what would work, and the nearest valid name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import ValidationError

from sdtrain.config.declare import field_types
from sdtrain.config.options import Images, Span
from sdtrain.config.words import dotted, nearest, show, show_plain
from sdtrain.config.yaml_source import KeyPath, Source, Tree

PLAIN_TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "anything",
}
IMAGE_EXAMPLES = " such as 4000, 200k or 1.5M (1k = 1000)"
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
NO_VALUE = object()
RENAMED = {"tensorboard": "write tracker: tensorboard in place of true, tracker: none in place of false"}
MAX_ERRORS = 100  # a sentence takes a search for the nearest name


def describe(annotation: Any) -> str:
    """What a value of this type looks like, for a person."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation == Images:
        return f"a number of images{IMAGE_EXAMPLES}"
    if annotation == Span:
        return "a number and its unit, such as 30 epochs, 500 steps or 64k images"
    if origin is Annotated:
        return describe(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return "one of " + ", ".join(map(show_plain, arguments)) if len(arguments) > 1 else show_plain(arguments[0])
    if _is_union(annotation):
        return " or ".join(map(describe, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} values (each {describe(arguments[0])})"
    if origin in (list, tuple):
        return f"a list (each entry {describe(arguments[0])})"
    if origin is dict:
        return f"a section of named entries (each {describe(arguments[1])})"
    if dataclasses.is_dataclass(annotation):
        return "a section with the keys " + ", ".join(key_names(annotation))
    return PLAIN_TYPES.get(annotation, str(annotation))


def _bounds(metadata: tuple[Any, ...]) -> str:
    limits = [limit for item in metadata for limit in getattr(item, "metadata", [])]
    found = [
        f"{sign} {getattr(limit, name):g}" for limit in limits for name, sign in BOUNDS.items() if hasattr(limit, name)
    ]
    return " " + " and ".join(found) if found else ""


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def key_names(cls: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def annotation_at(annotation: Any, path: KeyPath) -> Any:
    """The type of the value at `path`, looking through unions; Any where the path leaves the types."""
    if not path:
        return annotation
    key, rest = path[0], path[1:]
    for option in alternatives(annotation):
        inner = _child(option, key)
        if inner is not None:
            return annotation_at(inner, rest)
    return Any


def alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself, without bounds."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if _is_union(annotation):
        for argument in typing.get_args(annotation):
            yield from alternatives(argument)
    else:
        yield annotation


def _child(annotation: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return field_types(annotation).get(key)
    if origin is dict:
        return arguments[1]
    if origin in (list, tuple) and key.isdigit():
        return (
            arguments[int(key)]
            if origin is tuple and Ellipsis not in arguments and int(key) < len(arguments)
            else arguments[0]
        )
    return None


def value_at(tree: Any, path: KeyPath) -> Any:
    for key in path:
        if isinstance(tree, dict) and key in tree:
            tree = tree[key]
        elif isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return NO_VALUE
    return tree


def all_keys(annotation: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Sections and the keys in them, from the top."""
    for option in alternatives(annotation):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            for name, inner in field_types(option).items():
                yield (*path, name)
                yield from all_keys(inner, (*path, name))


def type_problems(error: ValidationError, cls: Any, source: Source) -> dict[KeyPath, str]:
    """One sentence for each key at fault."""
    found: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False)[:MAX_ERRORS]:
        path, kind = key_path(item["loc"], item["type"], source.tree), item["type"]
        if path not in found:
            found[path] = f"{source.place(path)}: {_sentence(path, kind, item['msg'], cls, source.tree)}"
    deeper = {path[:i] for path in found for i in range(len(path))}
    return {path: text for path, text in found.items() if path not in deeper}


def key_path(loc: tuple[int | str, ...], kind: str, tree: Tree) -> KeyPath:
    """Drop what pydantic puts into a location besides keys: the names of the members of a union."""
    parts = [str(part) for part in loc]
    last = [parts.pop()] if kind in ("missing", "unexpected_keyword_argument") else []
    path: list[str] = []
    for part in parts:
        if value_at(tree, (*path, part)) is not NO_VALUE:
            path.append(part)
    return (*path, *last)


def _sentence(path: KeyPath, kind: str, message: str, cls: Any, tree: Tree) -> str:
    if kind == "unexpected_keyword_argument":
        return unknown_key(path, cls)
    if kind == "missing":
        return f"key '{dotted(path)}' is missing: give it {describe(annotation_at(cls, path))}"
    value, annotation = value_at(tree, path), annotation_at(cls, path)
    if kind == "value_error":
        return f"key '{dotted(path)}' cannot be {show(value)}: {message.removeprefix('Value error, ')}"
    return f"key '{dotted(path)}' must be {describe(annotation)}, not {show(value)}{_hint(value, annotation)}"


def _hint(value: Any, annotation: Any) -> str:
    """What the writer probably meant."""
    if not isinstance(value, str):
        return ""
    options = list(alternatives(annotation))
    words = [
        str(word) for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option)
    ]
    if bool in options and value.lower() in ("yes", "no", "on", "off", "y", "n"):
        return f" (write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'})"
    if {int, float} & set(options):
        return _number_hint(value)
    return nearest(value, words)


def _number_hint(value: str) -> str:
    plain = value.lstrip("0") or "0"
    if value.isdigit():
        return f" (a leading zero makes it text: write {plain})" if plain != value else " (remove the quotes)"
    try:
        float(value)
    except ValueError:
        return ""
    return " (remove the quotes)"


def unknown_key(path: KeyPath, cls: Any) -> str:
    """Name the nearest key of the same section, else, at the top, the same word in a section, else list the keys."""
    if dotted(path) in RENAMED:
        return f"key '{dotted(path)}' is no more: {RENAMED[dotted(path)]}"
    section = annotation_at(cls, path[:-1])
    names = [name for option in alternatives(section) if dataclasses.is_dataclass(option) for name in key_names(option)]
    hint = nearest(path[-1], names)
    if not hint:
        elsewhere = [dotted(key) for key in all_keys(cls) if key[-1] == path[-1] and len(path) == 1]
        hint = f" (did you mean '{elsewhere[0]}'?)" if elsewhere else f" (known here: {', '.join(names)})"
    return f"unknown key '{dotted(path)}'{hint}"
