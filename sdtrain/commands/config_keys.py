"""`sdtrain config`: what the keys of a configuration mean, which values they take and who has them. Free of torch."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from sdtrain.config import reference, schema
from sdtrain.config.compare import to_tree
from sdtrain.config.declare import ROLES
from sdtrain.config.load import load_config
from sdtrain.config.markdown import page
from sdtrain.config.messages import NO_VALUE, value_at
from sdtrain.config.reference import PLAYER, Key, yaml_line
from sdtrain.config.words import nearest
from sdtrain.errors import EXIT_OK, ConfigError
from sdtrain.terminal import clip

WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY", help="a key or a section, such as sd.alpha or optimizer")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--method", metavar="NAME", help="only what this method has")
    choice.add_argument("--cfg", metavar="FILE|NAME", help="only what this configuration has, with its values")
    parser.add_argument("--markdown", action="store_true", help="print all keys as configs/README.md holds them")


def run(args: argparse.Namespace) -> int:
    if args.markdown:
        print(page(), end="")
        return EXIT_OK
    config = load_config(args.cfg) if args.cfg else None
    for line in explain(args.key, _among(args.method, config), config):
        print(line)
    return EXIT_OK


def _among(method: str | None, config: Any) -> list[Key]:
    """The keys that a method, or a configuration with its models, can have."""
    if method is not None and method not in schema.methods():
        raise ConfigError(f"there is no method '{clip(method)}'{nearest(method, schema.methods())}")
    name = config.method if config else method
    chosen = {f"method {other}" for other in schema.methods() if name in (None, other)}
    kinds = {role: [getattr(config.model, role).kind] if config else schema.kinds(role) for role in ROLES}
    chosen |= {f"{role} {kind}" for role in ROLES for kind in kinds[role]}
    return [key for key in reference.keys() if not key.owners or chosen & set(key.owners)]


def explain(query: str | None, among: list[Key], config: Any = None) -> Iterator[str]:
    """The lines about a key or section of `among`; all top-level keys without a query. Raises ConfigError."""
    if query is None:
        yield from overview([key for key in among if "." not in key.path], config, "")
        yield "\n`sdtrain config KEY` explains one, `sdtrain config SECTION` lists its keys; --method or --cfg chooses."
        return
    path = generic(query)
    found = [key for key in among if key.path == path]
    if not found:
        raise ConfigError(_unknown(query, path, among))
    for number, key in enumerate(found):
        yield from ["", *block(key, query, config)] if number else block(key, query, config)
    inner = [key for key in among if key.path.startswith(f"{path}.")]
    if inner:
        yield from ["", *overview(inner, config, query)]


def generic(query: str) -> str:
    """The key that describes this one: all players share `optimizer.PLAYER.lr`."""
    parts = query.split(".")
    players = {player for name in schema.methods() for player in schema.method(name).players}
    if parts[0] == "optimizer" and parts[1:2] and parts[1] in players:
        parts[1] = PLAYER
    return ".".join(parts)


def _unknown(query: str, path: str, among: Iterable[Key]) -> str:
    """The nearest key, else those of the same last word, else who has it."""
    having = [key for key in reference.keys() if key.path == path]
    if having:
        owners = list(dict.fromkeys(owner for key in having for owner in key.owners))
        return f"'{query}' is a key of {', '.join(owners)}, not of what was chosen"
    paths = list(dict.fromkeys(key.path for key in among))
    same_word = [other for other in paths if other.rpartition(".")[2] == path.rpartition(".")[2]]
    if same_word:
        return f"there is no key '{clip(query)}' (did you mean {' or '.join(same_word)}?)"
    return f"there is no key '{clip(query)}'{nearest(path, paths) or '; `sdtrain config` lists the sections'}"


def block(key: Key, query: str, config: Any) -> Iterator[str]:
    """All about one key, a fact a line."""
    value = _value(query, config)
    facts = {
        "meaning": key.meaning,
        "type": key.type,
        "default": key.default,
        "unit": "" if not key.default else key.unit or "none",
        "in": ", ".join(key.owners) or "every configuration",
        "here": "" if value is NO_VALUE or isinstance(value, dict) else yaml_line(value),
    }
    yield query
    for name, text in facts.items():
        if text:
            yield textwrap.fill(f"  {name:8} {text}", WIDTH, subsequent_indent=" " * 11)


def _value(query: str, config: Any) -> Any:
    return value_at(to_tree(config), tuple(query.split("."))) if config else NO_VALUE


def overview(found: list[Key], config: Any, query: str) -> Iterator[str]:
    """One line a key: its name, its value or default, its meaning; those that owners see differently, several."""
    width = max(len(key.path) for key in found)
    for key in found:
        path = query + key.path[len(generic(query)) :]
        value = _value(path, config)
        text = key.default if value is NO_VALUE or isinstance(value, dict) else yaml_line(value)
        who = f" ({', '.join(key.owners)})" if key.owners else ""
        yield f"{path:{width}}  {clip(text or '...', 24):24}  {key.meaning}{who}"
