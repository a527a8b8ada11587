"""Write a configuration down, and compare that of a run folder with the one of the command that resumes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.config.find import read_written
from sdtrain.config.keys import HARMLESS, Config
from sdtrain.config.words import MAX_PROBLEMS, report
from sdtrain.config.yaml_source import Tree, dump_tree
from sdtrain.errors import ConfigError
from sdtrain.terminal import clip


def to_tree(config: Any) -> Any:
    """Plain values (sections, lists, text, numbers) with every default; `kind` first in a section."""
    if dataclasses.is_dataclass(config):
        names = sorted((item.name for item in dataclasses.fields(config)), key=lambda name: name != "kind")
        return {name: to_tree(getattr(config, name)) for name in names}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    return [to_tree(value) for value in config] if isinstance(config, (list, tuple)) else config


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every default written out; loads back to an equal `Config`.

    `data.allow_pipe` is written as false: a permission to run commands ends with the command that was given it.
    """
    tree = to_tree(config)
    if tree.get("data"):
        tree["data"]["allow_pipe"] = False
    return dump_tree(tree)


def config_hash(config: Config) -> str:
    """Hex digest of everything in the configuration."""
    return hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Difference:
    """One key that differs between a run folder and the command that resumes it; None = the key is absent there."""

    key: str
    old: Any
    new: Any

    @property
    def harmless(self) -> bool:
        return any(self.key == key or self.key.startswith(f"{key}.") for key in HARMLESS)

    def __str__(self) -> str:
        return f"{clip(self.key)}: {clip(str(self.old))} -> {clip(str(self.new))}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Compare two trees (see `to_tree`; `read_tree` reads that of a run folder), key by key."""
    before, after = _leaves(old), _leaves(new)
    keys = dict.fromkeys([*before, *after])
    return [Difference(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def listed(found: list[Difference]) -> str:
    """A line for each, of many the first."""
    more = [f"and {len(found) - MAX_PROBLEMS} more"] if len(found) > MAX_PROBLEMS else []
    return "".join(f"\n  {line}" for line in [*found[:MAX_PROBLEMS], *more])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        found.update(inner)
    return found


def read_tree(path: Path) -> Tree:
    """The plain tree of a written `config.yaml`, without checking its keys: it may come from another version.

    Raises ConfigError for a file that cannot be read as one.
    """
    source = read_written(path)
    if source.problems:
        raise ConfigError(report(source.problems))
    return source.tree
