"""Which keys a configuration may have: the common ones, its method's, its models'. Torch is not imported."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any, Literal

from pydantic import ConfigDict

import sdtrain.methods
import sdtrain.models
from sdtrain.config.declare import MethodDeclaration, ModelDeclaration, Role, field_types
from sdtrain.config.keys import Config
from sdtrain.config.options import Optimizer

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Field = tuple[str, Any, Any]  # name, type, default: the form that `make_dataclass` takes


def folders(room: ModuleType) -> list[str]:
    """Names of the packages in `sdtrain.methods` or `sdtrain.models`, in alphabetical order."""
    return sorted(found.name for found in pkgutil.iter_modules(room.__path__) if found.ispkg)


@cache
def method(name: str) -> MethodDeclaration:
    """The declaration of a method that exists (see `methods`)."""
    declared = importlib.import_module(f"sdtrain.methods.{name}.options").METHOD
    assert isinstance(declared, MethodDeclaration)
    return declared


@cache
def model(kind: str) -> ModelDeclaration:
    """The declaration of a model that exists (see `kinds`)."""
    declared = importlib.import_module(f"sdtrain.models.{kind}.options").MODEL
    assert isinstance(declared, ModelDeclaration)
    return declared


def methods() -> list[str]:
    return folders(sdtrain.methods)


def kinds(role: Role) -> list[str]:
    return [kind for kind in folders(sdtrain.models) if model(kind).options(role)]


def options(kind: str, role: Role) -> type:
    """The option class of a kind that `kinds` lists for the role."""
    found = model(kind).options(role)
    assert found is not None
    return found


def harden(annotation: Any) -> Any:
    """Make pydantic refuse unknown keys and loose types in every dataclass that can be reached from `annotation`."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if "__pydantic_config__" not in vars(annotation):
            annotation.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
            for inner in field_types(annotation).values():
                harden(inner)
    for argument in typing.get_args(annotation):
        harden(argument)
    return annotation


def fields_of(cls: Any) -> dict[str, Field]:
    """The fields of a dataclass, by name, with their types resolved."""
    hints = field_types(cls)
    return {item.name: (item.name, hints[item.name], _default(item)) for item in dataclasses.fields(cls)}


def _default(item: dataclasses.Field[Any]) -> Any:
    return dataclasses.field(default=item.default, default_factory=item.default_factory)  # type: ignore[call-overload]


def make_class(name: str, fields: Iterable[Field], *bases: type) -> type:
    return dataclasses.make_dataclass(name, list(fields), bases=bases, frozen=True, kw_only=True)


@cache
def role_class(role: Role, kind: str) -> type:
    """The option class of a model kind, with its `kind`."""
    own = options(kind, role)
    fields = [("kind", Literal[kind], dataclasses.field()), *fields_of(own).values()]
    return make_class(f"{kind}.{role}", fields, own)


@dataclasses.dataclass(frozen=True)
class Schema:
    """The configuration class of one method with the chosen kinds of models."""

    cls: type
    rules: Callable[[Any], Iterable[tuple[str, str]]]


@cache
def schema(name: str | None, chosen: tuple[tuple[Role, str | None], ...]) -> Schema:
    """Lay the fields of the method `name` over those of `Config`. A role without a known kind accepts anything."""
    declared = method(name) if name else MethodDeclaration(options=object)
    own = fields_of(declared.options) if name else {}
    fields = {**fields_of(Config), **own}
    fields["model"] = ("model", _model_class(dict(chosen)), dataclasses.field())
    players = [(player, Optimizer, dataclasses.field(default_factory=Optimizer)) for player in declared.players]
    sections = make_class("Optimizers", players)
    fields["optimizer"] = ("optimizer", sections, dataclasses.field(default_factory=sections))
    bases = (declared.options, Config) if name else (Config,)
    return Schema(harden(make_class("Config", fields.values(), *bases)), declared.problems)


def _model_class(chosen: dict[Role, str | None]) -> type:
    return make_class(
        "Model", [(role, role_class(role, kind) if kind else Any, dataclasses.field()) for role, kind in chosen.items()]
    )
