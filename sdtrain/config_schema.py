"""Which keys a configuration may have: the classes of its method and models, evaluated without importing torch.

A method file declares, all optional:

    @dataclass(frozen=True, kw_only=True)
    class Options: ...                       its fields become top-level keys; one named like a common key replaces it
    ROLES = {"generator": "GeneratorOptions", "discriminator": "DiscriminatorOptions"}
                                             the keys of `model`, and which class of the chosen kind describes each
    PLAYERS = ("G", "D")                     the keys of `optimizer`, one section a player (default: the roles)
    DECISIVE = ("data.val",)                 keys that elsewhere may change on resume, but decide weights here
    def problems(config): ...                yields (key, sentence) for combinations that cannot work
    def data_problems(config, dataset): ...  sentences about what the opened training data cannot do
    def weights_needed(config): ...          frozen networks in use: {name in sdtrain.weights: key of `weights`}

A model file declares `GeneratorOptions` and/or `DiscriminatorOptions`. Only these definitions, literal constants and
other dataclasses of the file are run; they may name whatever `sdtrain.options` offers.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

import sdtrain.options

PACKAGE = Path(__file__).resolve().parent
ROLES = {"generator": "GeneratorOptions", "discriminator": "DiscriminatorOptions"}
FUNCTIONS = ("problems", "data_problems", "weights_needed")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
NAMES = {name: getattr(sdtrain.options, name) for name in sdtrain.options.__all__}
NAMES |= {"Literal": Literal, "Annotated": Annotated, "Any": Any, "Field": Field, "dataclasses": dataclasses}


def available(folder: str, marker: str) -> list[str]:
    """File names (without .py) in a folder of the package that define the class `marker`."""
    files = sorted((PACKAGE / folder).glob("*.py"))
    return [file.stem for file in files if f"\nclass {marker}" in file.read_text(encoding="utf-8")]


def methods() -> list[str]:
    return available("methods", "Options")


def kinds(options_class: str) -> list[str]:
    return available("models", options_class)


def declared(folder: str, name: str) -> dict[str, Any]:
    """The torch-free definitions of `sdtrain/FOLDER/NAME.py`."""
    return _evaluate(PACKAGE / folder / f"{name}.py")


@cache
def _evaluate(path: Path) -> dict[str, Any]:
    names = {**NAMES, "__name__": f"options of {path.stem}"}
    for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        wanted = isinstance(node, ast.ClassDef) and (node.name.endswith("Options") or bool(node.decorator_list))
        wanted = wanted or isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS
        if wanted or _is_literal(node):
            _run(node, path, names)
    return {name: value for name, value in names.items() if value is not NAMES.get(name)}


def _is_literal(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True


def _run(node: ast.stmt, path: Path, names: dict[str, Any]) -> None:
    module = ast.fix_missing_locations(ast.Module([_without_signatures(node)], []))
    try:
        exec(compile(module, str(path), "exec", dont_inherit=True), names)
    except NameError as error:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
            hint = "option classes may only use what sdtrain/options.py offers"
            raise RuntimeError(f"{path}:{node.lineno}: {error}; {hint}") from error


def _without_signatures(node: ast.stmt) -> ast.stmt:
    """Drop the annotations of functions: they name types of modules that are not imported here."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            part.returns = None
            for argument in ast.walk(part.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
    return node


def harden(annotation: Any) -> Any:
    """Make pydantic refuse unknown keys and loose types in every dataclass that can be reached from `annotation`."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if "__pydantic_config__" not in vars(annotation):
            annotation.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
            for item in dataclasses.fields(annotation):
                harden(item.type)
    for argument in typing.get_args(annotation):
        harden(argument)
    return annotation


def copied_fields(cls: Any) -> dict[str, tuple[str, Any, Any]]:
    """The fields of a dataclass in the form `make_dataclass` takes, by name."""
    return {item.name: (item.name, item.type, _default(item)) for item in dataclasses.fields(cls)}


def _default(item: dataclasses.Field) -> Any:
    return dataclasses.field(default=item.default, default_factory=item.default_factory)  # type: ignore[call-overload]


def make_class(name: str, fields: dict[str, tuple[str, Any, Any]], base: type | None = None) -> Any:
    bases = (base,) if base else ()
    return dataclasses.make_dataclass(name, list(fields.values()), bases=bases, frozen=True, kw_only=True)


@cache
def role_class(options_class: str, kind: str) -> Any:
    """The option class of a model kind, with its `kind`."""
    fields = {"kind": ("kind", Literal[kind], dataclasses.field())}
    return make_class(f"{kind}.{options_class}", fields, declared("models", kind)[options_class])


@dataclasses.dataclass(frozen=True)
class Schema:
    """The configuration class of one method with the chosen kinds of models."""

    cls: Any
    rules: Callable[[Any], Iterator[tuple[str, str]]] | None


@cache
def schema(common: type, method: str | None, chosen: tuple[tuple[str, str | None], ...]) -> Schema:
    """Lay the fields of `method` over those of `common`. A role without a known kind accepts anything."""
    names = declared("methods", method) if method else {}
    roles = names.get("ROLES", ROLES)
    own = copied_fields(names["Options"]) if "Options" in names else {}
    fields = {**own, "model": own.get("model") or ("model", _model_class(roles, dict(chosen)), dataclasses.field())}
    if not roles and "model" not in own:
        fields["model"] = _section("model", fields["model"][1])
    if "optimizer" not in own:
        players = [_section(player, sdtrain.options.Optimizer) for player in names.get("PLAYERS", roles)]
        fields["optimizer"] = _section("optimizer", make_class("Optimizers", {player[0]: player for player in players}))
    return Schema(harden(make_class("Config", fields, common)), names.get("problems"))


def _section(name: str, cls: Any) -> tuple[str, Any, Any]:
    """A field whose default is every default of `cls`."""
    return name, cls, dataclasses.field(default_factory=cls)


def _model_class(roles: dict[str, str], chosen: dict[str, str | None]) -> Any:
    fields = {}
    for role, options_class in roles.items():
        kind = chosen.get(role)
        annotation = role_class(options_class, kind) if kind else Any
        fields[role] = (role, annotation, dataclasses.field())
    return make_class("Model", fields)


def roles_of(method: str | None) -> dict[str, str] | None:
    """The roles of a method's models; None when the method declares a `model` section of its own."""
    names = declared("methods", method) if method else {}
    own = "Options" in names and "model" in copied_fields(names["Options"])
    return None if own else names.get("ROLES", ROLES)
