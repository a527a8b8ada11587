"""Read YAML together with the place of every key, and merge texts and `--set` overrides.

Differences from PyYAML's own loader, all towards fewer surprises: `1e-3` is a number, only true and false are booleans
(`on`, `yes` are text), `010` and dates are text, a key given twice is an error, and tags and aliases are refused.
Nothing that a file holds may keep a launch busy: its bytes, its depth and the number of its values are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml

from sdtrain.config.words import dotted
from sdtrain.errors import ConfigError
from sdtrain.terminal import clip

KeyPath = tuple[str, ...]
Tree = dict[str, Any]

REFUSED = object()
MAX_BYTES = 1_000_000  # a text
MAX_VALUES, MAX_KEYS, MAX_DEPTH = 20_000, 2_000, 30
PLAIN = {f"tag:yaml.org,2002:{name}": name for name in ("str", "int", "float", "bool", "null", "map", "seq")}
PATTERNS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?(?:0|[1-9][0-9_]{0,40})", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        "-+0123456789.",
    ),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes only, and not too many; `yaml_implicit_resolvers` is filled below."""

    yaml_implicit_resolvers: dict = {}
    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node. Raises MarkedYAMLError for too many, an alias, or text that is none."""
        self.depth += 1
        self.values += 1
        problem = self.excess()
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and not is_text(node.value):
            problem = "text holds a character that is none (NUL or half of a pair)"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        self.depth -= 1
        return node

    def excess(self) -> str | None:
        """What the node that comes next has too much of."""
        if self.check_event(yaml.AliasEvent):
            return "aliases (*name) are refused: write the value out"
        if self.depth > MAX_DEPTH:
            return f"sections are nested more than {MAX_DEPTH} deep"
        return f"a configuration holds at most {MAX_VALUES} values" if self.values > MAX_VALUES else None


def is_text(value: str) -> bool:
    """Whether a file name and a JSON file can hold it."""
    return not re.search("[\0\ud800-\udfff]", value)


class Dumper(yaml.SafeDumper):
    """Quotes text that either this loader or a YAML 1.1 reader would take for something else."""

    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in PATTERNS.items():
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))
for _char, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    Dumper.yaml_implicit_resolvers.setdefault(_char, []).extend(_resolvers)


@dataclass
class Source:
    """A tree of plain values, where each key was given, and what is wrong already."""

    tree: Tree = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """FILE:LINE or `--set ...` of a key, else of the nearest section around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "config")


def dump_tree(tree: Tree) -> str:
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=False, width=100)


def read_text(text: str, shown: str) -> Source:
    node = compose(text, shown)
    source = Source(places={(): shown})
    if isinstance(node, yaml.MappingNode):
        tree = _value(node, (), shown, source)
        source.tree = tree if isinstance(tree, dict) else {}
    elif node is not None:
        source.problems.append(f"{shown}: a configuration is a list of 'key: value' lines, this file is not")
    return source


@lru_cache(maxsize=64)  # the runs of a suite share most of their files
def compose(text: str, shown: str) -> yaml.Node | None:
    """The node tree, which nobody may change; ConfigError with the line when the text is not YAML."""
    if len(text) > MAX_BYTES:
        raise too_long(shown)
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = clip(error.problem or error.context or "", 200)
        raise ConfigError(f"{shown}{line}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: not valid YAML: {clip(' '.join(str(error).split()), 200)}") from error
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{shown}: not valid YAML: a number or the code of a letter is too large") from error


def too_long(shown: str) -> ConfigError:
    return ConfigError(f"{shown}: not a configuration: it is longer than {MAX_BYTES} bytes")


def _value(node: yaml.Node, path: KeyPath, shown: str, source: Source) -> Any:
    kind = PLAIN.get(node.tag)
    if kind is None or not _fits(kind, node):
        line = node.start_mark.line + 1
        tag = clip(node.tag.replace("tag:yaml.org,2002:", "!!"))
        source.problems.append(f"{shown}:{line}: tag '{tag}' is refused: a configuration holds plain values only")
        return REFUSED
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, shown, source)
    if isinstance(node, yaml.SequenceNode):
        items = [_value(item, (*path, str(i)), shown, source) for i, item in enumerate(node.value)]
        return [item for item in items if item is not REFUSED]
    return _scalar(kind, str(node.value))


def _fits(kind: str, node: yaml.Node) -> bool:
    """Whether a value is of the kind that its tag says: a tag can be written before anything."""
    if not isinstance(node, yaml.ScalarNode):
        return kind == ("map" if isinstance(node, yaml.MappingNode) else "seq")
    return kind == "str" or kind in PATTERNS and re.fullmatch(PATTERNS[kind][0], node.value) is not None


def _mapping(node: yaml.MappingNode, path: KeyPath, shown: str, source: Source) -> Tree:
    tree: Tree = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        here = (*path, key)
        if not isinstance(key_node, yaml.ScalarNode):
            source.problems.append(f"{shown}:{line}: a key must be a word, not a list or a section")
        elif key in lines:
            source.problems.append(
                f"{shown}:{line}: key '{dotted(here)}' is given twice, first on line {lines[key]}: keep one"
            )
        else:
            lines[key] = line
            if len(source.places) > MAX_KEYS:
                raise ConfigError(f"{shown}:{line}: a configuration has at most {MAX_KEYS} keys")
            source.places[here] = f"{shown}:{line}"
            tree[key] = _value(value_node, here, shown, source)
    return {key: value for key, value in tree.items() if value is not REFUSED}


def _scalar(kind: str, text: str) -> Any:
    if kind == "int":
        return int(text.replace("_", ""))
    if kind == "float":
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return {"bool": text.lower() == "true", "null": None}.get(kind, text)


def merge(below: Source, above: Source) -> Source:
    """`above` wins key by key; a section whose `kind` changes is replaced whole, since its keys belong to the kind."""
    kept = dict(below.places)
    tree = _merge_tree(below.tree, above.tree, (), kept)
    root: dict[KeyPath, str] = {(): above.places.get((), below.place(()))}
    return Source(tree, {**above.places, **kept, **root}, below.problems + above.problems)


def _merge_tree(below: Tree, above: Tree, path: KeyPath, places: dict[KeyPath, str]) -> Tree:
    tree = dict(below)
    for key, value in above.items():
        old, here = below.get(key), (*path, key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("kind") in (None, old.get("kind")):
            tree[key] = _merge_tree(old, value, here, places)
        else:
            tree[key] = value
            for stale in [place for place in places if place[: len(here)] == here]:
                del places[stale]
    return tree


def parse_overrides(overrides: Iterable[str]) -> Iterator[Source]:
    """One source for each `key.path=value`; the value is YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        shown = f"--set {clip(text, 200)}"
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            yield Source(problems=[f"{shown}: write it as --set key.path=value"])
            continue
        if len(path) > MAX_DEPTH:
            yield Source(problems=[f"{shown}: no key lies {len(path)} sections deep"])
            continue
        yield _override(path, value, shown)


def _override(path: KeyPath, value: str, shown: str) -> Source:
    source = Source(places={path[:i]: shown for i in range(1, len(path) + 1)})
    try:
        node = compose(value, shown)
    except ConfigError as error:
        source.problems.append(str(error))
        return source
    inner = Source()
    tree = None if node is None else _value(node, path, shown, inner)
    if tree is REFUSED:
        return Source(problems=[problem.replace(f"{shown}:1:", f"{shown}:") for problem in inner.problems])
    source.problems.extend(problem.replace(f"{shown}:1:", f"{shown}:") for problem in inner.problems)
    source.places.update(dict.fromkeys(inner.places, shown))
    for key in reversed(path):
        tree = {key: tree}
    source.tree = tree or {}
    return source
