"""Every key there is, of all methods and models: type, default, unit, meaning and who has it. Torch is not imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

from sdtrain.config import schema
from sdtrain.config.compare import to_tree
from sdtrain.config.declare import ROLES, field_types
from sdtrain.config.keys import Config
from sdtrain.config.meanings import Meaning, meanings, unit_of_type
from sdtrain.config.messages import alternatives, describe
from sdtrain.config.options import Optimizer
from sdtrain.config.words import show_plain

REQUIRED = "required"
PLAYER = "PLAYER"  # any player of a method, as in `optimizer.PLAYER.lr`
FILLED = {"name": "the file's name"}  # what loading fills in where the class has no default


@dataclasses.dataclass(frozen=True)
class Key:
    """A key, or a section, as its owners have it."""

    path: str
    type: str
    default: str
    """As YAML; '' for a section."""
    unit: str
    meaning: str
    owners: tuple[str, ...] = ()
    """`method NAME`, `generator KIND` or `discriminator KIND`; () = every configuration."""


@cache
def keys() -> tuple[Key, ...]:
    """All keys, in the order of their classes; one for each difference in type, default or meaning."""
    found = [*_common(), *_models(), *_optimizers()]
    for name in schema.methods():
        found += _fields(schema.method(name).options, (), (f"method {name}",))
    return tuple(_joined(found))


def _joined(found: list[Key]) -> list[Key]:
    owners: dict[Key, tuple[str, ...]] = {}
    for key in found:
        alone = dataclasses.replace(key, owners=())
        owners[alone] = owners.get(alone, ()) + key.owners
    every = tuple(f"method {name}" for name in schema.methods())
    return [dataclasses.replace(key, owners=() if who == every else who) for key, who in owners.items()]


def _common() -> Iterator[Key]:
    """The keys of `Config`; a method's own key of the same name takes the place of one."""
    own = {name: schema.fields_of(schema.method(name).options) for name in schema.methods()}
    for key in _fields(Config, (), ()):
        top = key.path.partition(".")[0]
        having = tuple(f"method {name}" for name, fields in own.items() if top not in fields)
        if top not in ("model", "optimizer"):
            kind = f"one of {', '.join(own)}" if top == "method" else key.type
            yield dataclasses.replace(key, type=kind, owners=having if len(having) < len(own) else ())


def _models() -> Iterator[Key]:
    yield Key("model", f"a section with the keys {', '.join(ROLES)}", "", "", meanings(Config)["model"].text)
    for role in ROLES:
        kinds = ", ".join(schema.kinds(role))
        yield Key(f"model.{role}", "a section", "", "", f"The {role}: its kind and the keys of that kind.")
        yield Key(f"model.{role}.kind", f"one of {kinds}", REQUIRED, "", "Folder of sdtrain/models.")
        for kind in schema.kinds(role):
            yield from _fields(schema.options(kind, role), ("model", role), (f"{role} {kind}",))


def _optimizers() -> Iterator[Key]:
    for name in schema.methods():
        players = ", ".join(schema.method(name).players)
        yield Key("optimizer", f"sections {players}", "", "", meanings(Config)["optimizer"].text, (f"method {name}",))
    yield Key(f"optimizer.{PLAYER}", describe(Optimizer), "", "", str(Optimizer.__doc__))
    yield from _fields(Optimizer, ("optimizer", PLAYER), ())


def _fields(cls: Any, path: tuple[str, ...], owners: tuple[str, ...], instance: Any = None) -> Iterator[Key]:
    """The keys of an option class, those of the sections in it included; `instance` has other defaults."""
    said, types = meanings(cls), field_types(cls)
    for item in dataclasses.fields(cls):
        annotation, here = types[item.name], (*path, item.name)
        default = getattr(instance, item.name) if isinstance(instance, cls) else _default(item)
        meaning = said.get(item.name, Meaning(""))
        unit = meaning.unit or unit_of_type(annotation)
        shown = "" if dataclasses.is_dataclass(annotation) else _shown(default, annotation)
        yield Key(".".join(here), describe(annotation), shown, unit, meaning.text, owners)
        for option in alternatives(annotation):
            if dataclasses.is_dataclass(option):
                yield from _fields(option, here, owners, default)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return FILLED.get(item.name, REQUIRED) if item.default is dataclasses.MISSING else item.default


def _shown(value: Any, annotation: Any) -> str:
    """A default as YAML on one line; thousands of images get their suffix."""
    if unit_of_type(annotation) == "images" and isinstance(value, int) and value and value % 1000 == 0:
        return f"{value // 1000}k"
    return yaml_line(to_tree(value))


def yaml_line(tree: Any) -> str:
    """A plain value on one line."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name}: {yaml_line(value)}" for name, value in tree.items()) + "}"
    return "[" + ", ".join(map(yaml_line, tree)) + "]" if isinstance(tree, list) else show_plain(tree)
