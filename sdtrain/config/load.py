"""Load a configuration: find and read the files, choose the schema, report every problem at once.

    config = load_config("sdgan_projected.yaml", ["sd.alpha=0.5"])
    config.sd.alpha, config.model.generator.kind, config.optimizer.G.lr

A method adds its own top-level keys, a model the keys of its section: see `schema.py`. Torch is not imported.

What a user names with --cfg or types is trusted, but for running commands. A run folder's config.yaml may come from
anyone: it extends no other file, and the addresses it names are never fetched. The paths it names are read, never
written: shards (data.*) and weights (weights.*) by readers that run nothing; its init and teacher are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sdtrain.config import messages
from sdtrain.config import schema as config_schema
from sdtrain.config.blocks import block_problems
from sdtrain.config.declare import ROLES
from sdtrain.config.find import RUN_CONFIG, find_config, read_with_bases, read_written
from sdtrain.config.keys import Config, common_problems
from sdtrain.config.schema import Schema
from sdtrain.config.words import dotted, is_address, nearest, report, show
from sdtrain.config.yaml_source import KeyPath, Source, merge, parse_overrides
from sdtrain.errors import ConfigError
from sdtrain.terminal import clip


def load_config(path_or_name: str | Path, overrides: Iterable[str] = (), world: int | None = None) -> Config:
    """Read, extend, override and check a configuration. ConfigError lists every problem, one a line, with its place.

    `world` is the number of ranks when it is known; a world size that does not divide the ghosts is then a problem too.
    """
    return resolve(read_config(path_or_name, overrides), world)


def read_config(path_or_name: str | Path, overrides: Iterable[str] = (), written: Iterable[str] = ()) -> Source:
    """What `resolve` checks: the files, what a suite has `written` over them, what was typed as `overrides`."""
    path = find_config(path_or_name)
    source = read_with_bases(path)
    source.tree.setdefault("name", path.stem)
    for override in parse_overrides(written):
        source = merge(source, override)
    source.problems += _permissions(source)
    for override in parse_overrides(overrides):
        source = merge(source, override)
    source.problems += _addresses(source, path)
    return source


def load_written(path: Path) -> Config:
    """The config.yaml of a run folder that was named for its weights or rows. Raises ConfigError.

    The addresses it may hold are kept as they are: `sdtrain.commands.source.of_run` refuses them where data is opened.
    """
    source = read_written(path)
    source.problems += _permissions(source)
    return resolve(source)


def _addresses(source: Source, path: Path) -> Iterable[str]:
    """An address in the config.yaml of a run folder counts no more when that file is named itself."""
    data = source.tree.get("data")
    for key, value in data.items() if isinstance(data, dict) else ():
        place = source.place(("data", key))
        typed = place.startswith("--set") or RUN_CONFIG not in (path.name, place.rpartition(":")[0].rpartition("/")[2])
        found = next((v for v in (value if isinstance(value, list) else [value]) if is_address(v)), None)
        if found and not typed:
            yield (
                f"{place}: data.{key} is the address or command '{clip(found)}', and a {RUN_CONFIG} belongs to a run "
                f"folder, which may come from anyone: type it as --set data.{key}=..., or use a file of another name"
            )


def _permissions(source: Source) -> Iterable[str]:
    """A file may come from anyone: to run the commands it names is for the one who types."""
    path = ("data", "allow_pipe")
    if messages.value_at(source.tree, path) not in (messages.NO_VALUE, False):
        yield (
            f"{source.place(path)}: data.allow_pipe would let this configuration run commands, so no file can give it: "
            "take it out, and allow it on the command line with --set data.allow_pipe=true or --allow-pipe"
        )


def resolve(source: Source, world: int | None = None) -> Any:
    """Check a source and build the frozen `Config`. Raises one ConfigError that lists everything wrong."""
    problems, schema = _choices(source)
    config, found = validated(schema.cls, source)
    problems = {**found, **problems}
    broken = set(problems)
    if config is None:
        config, _ = validated(schema.cls, _pruned(source, broken))
    if config is not None:
        problems.update(_broken_rules(config, schema, world, source, broken))
    texts = [*source.problems, *problems.values()]
    if texts:
        raise ConfigError(report(texts))
    return config


def _choices(source: Source) -> tuple[dict[KeyPath, str], Schema]:
    """Read `method` and each `kind`, and the schema they choose."""
    problems: dict[KeyPath, str] = {}
    method = _choice(source, ("method",), config_schema.methods(), problems)
    chosen = {}
    for role in ROLES:
        chosen[role] = _choice(source, ("model", role, "kind"), config_schema.kinds(role), problems)
    return problems, config_schema.schema(method, tuple(chosen.items()))


def _choice(source: Source, path: KeyPath, names: list[str], problems: dict[KeyPath, str]) -> str | None:
    value = messages.value_at(source.tree, path)
    if isinstance(value, str) and value in names:
        return value
    key, known = dotted(path), f"one of {', '.join(names) or '(none)'}"
    if value is messages.NO_VALUE:
        outer = path[:2] if messages.value_at(source.tree, path[:2]) is messages.NO_VALUE else path
        text = f"key '{key}' is missing: give it {known}"
    else:
        outer = path
        text = f"key '{key}' must be {known}, not {show(value)}{nearest(str(value), names)}"
    problems[outer] = f"{source.place(path)}: {text}"
    return None


@cache
def _checker(cls: Any) -> TypeAdapter:
    return TypeAdapter(cls)


def validated(cls: Any, source: Source) -> tuple[Any, dict[KeyPath, str]]:
    """The source as a hardened dataclass, None if it is none; and a sentence for each key at fault."""
    # through JSON, because pydantic's strict mode takes sections and lists for dataclasses and tuples only from there
    try:
        return _checker(cls).validate_json(json.dumps(source.tree)), {}
    except ValidationError as error:
        return None, messages.type_problems(error, cls, source)


def _pruned(source: Source, broken: Iterable[KeyPath]) -> Source:
    """The source without the keys at fault, so that rules can be checked on the rest."""
    tree = json.loads(json.dumps(source.tree))
    for path in broken:
        while path and not isinstance(messages.value_at(tree, path[:-1]), dict):
            path = path[:-1]
        if path:
            messages.value_at(tree, path[:-1]).pop(path[-1], None)
    return Source(tree, source.places)


def _broken_rules(
    config: Any, schema: Schema, world: int | None, source: Source, broken: set[KeyPath]
) -> dict[KeyPath, str]:
    """Rules across keys; those that involve a key already at fault are left out."""
    found: dict[KeyPath, str] = {}
    kinds_known = not any(path[0] in ("method", "model") for path in broken)
    own = chain(schema.rules(config), block_problems(config)) if kinds_known else ()
    for keys, sentence in chain(common_problems(config, world), own):
        paths = [tuple(key.strip().split(".")) for key in keys.split(",")]
        if not any(path[: len(bad)] == bad or bad[: len(path)] == path for path in paths for bad in broken):
            given = [path for path in paths if path in source.places]
            at = (*paths[0], sentence)
            found[at] = f"{source.place((given or paths)[0])}: {sentence}"
    return found
