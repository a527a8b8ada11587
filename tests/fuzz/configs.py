"""Configurations, overrides and names of keys, as a user may be handed them."""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzz.harness import Inputs
from fuzz.mutate import NAMES, changed, damaged, odd
from sdtrain.cli import main
from sdtrain.commands import config_keys
from sdtrain.config.compare import dump, to_tree
from sdtrain.config.load import load_config
from sdtrain.config.reference import keys

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BOMBS = (
    "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(30)),
    "a: &a {b: *a}\n",
    "[" * 100_000,
    "{a: " * 100_000,
    "- " * 100_000,
    "\n".join("  " * i + "a:" for i in range(1_000)),
    "? " * 50_000,
    "a: " + "9" * 500_000,
    "a: " + "1." * 300_000,
    "a: 1e" + "9" * 5_000,
    "a: " + "x" * 3_000_000,
    'a: "' + "\\n" * 400_000 + '"',
    "a: " + "x\n  " * 200_000,
    "a: |\n" + "  x\n" * 200_000,
    "#" * 900_000,
    "# x\n" * 220_000,
    "---\n" * 100_000,
    "--- !!python/object/apply:os.system ['touch canary']\n",
    "a: !!python/object/new:os.system [touch canary]\n",
    "!!binary aGVsbG8=\n",
    "a: !!int x\nb: !!float y\nc: !!bool z\nd: !!timestamp 2001-01-01\n",
    "<<: {a: 1}\n",
    "%YAML 9.9\n---\na: 1\n",
    "%TAG ! tag:evil:\n---\na: !b 1\n",
    "a: 1\na: 2\n" * 10_000,
    "".join(f"k{i}: {i}\n" for i in range(60_000)),
    "a: [" + "0, " * 200_000 + "0]",
    "{" + ", ".join(f"k{i}" for i in range(20_000)) + "}",
    "'" * 900_001,
    "a: 'it''s" + "''" * 400_000 + "'",
    "&" * 500_000,
    "a: &" + "b" * 500_000 + " 1",
    "a: !" + "b" * 500_000 + " 1",
    "\ufeffa: 1",
    "\t- a",
    "a:\tb\n\tc: d",
    "",
    "\n",
    "null",
    "[]",
    "5",
    "... ...",
    "base: [x]",
    "base: 5",
    "base: ../../canary",
    'base: "a\\0b"',
    f"base: {'x' * 260}",
    f"base: {'x/' * 3000}",
    "base: /dev/zero",
    "base: /dev/stdin",
    "base: .",
    "base: ''",
    "base: /",
    "base: input.yaml",
)


@cache
def files() -> tuple[tuple[str, str], ...]:
    """(path below configs/, text) of every configuration that comes with the project."""
    found = sorted(CONFIGS.rglob("*.yaml"))
    return tuple((path.relative_to(CONFIGS).as_posix(), path.read_text()) for path in found)


def texts(chance: Random, folder: Path) -> Path:
    """A configuration with damaged bytes, or one that is nothing but trouble."""
    path = folder / "input.yaml"
    if chance.random() < 0.3:
        data = chance.choice(BOMBS).encode()
        data = damaged(chance, data) if chance.random() < 0.2 else data
    else:
        data = damaged(chance, chance.choice(files())[1].encode())
    path.write_bytes(data.decode(errors="ignore").encode("utf-16") if chance.random() < 0.02 else data)
    return path


def values(chance: Random, folder: Path) -> Path:
    """A configuration whose values and keys are not what they should be; sometimes the one that another extends."""
    name, text = chance.choice(files())
    tree = yaml.safe_load(text)
    if chance.random() < 0.5:  # the sections of what it extends, too
        tree = flattened(tree)
    tree = changed(chance, tree)
    path = folder / chance.choice(("input.yaml", "input.yaml", "a|b$<x>.yaml", "l\nn.yaml", f"{'n' * 240}.yaml"))
    path.write_text(as_yaml(tree), errors="replace")
    if chance.random() < 0.2:
        above = folder / "above.yaml"
        above.write_text(as_yaml(changed(chance, {"base": path.name, "seed": 1, "data": {"workers": 0}})))
        return above
    return path


def as_yaml(tree: Any) -> str:
    """The tree as YAML; what is nested too deeply for its writer as JSON, which is YAML as well."""
    try:
        return yaml.safe_dump(tree, width=10**6)
    except RecursionError:
        return json.dumps(tree)


def flattened(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree laid over those of its bases, roughly: whole sections."""
    base = tree.pop("base", None)
    found = next((text for name, text in files() if base and Path(name).stem == Path(str(base)).stem), None)
    below = flattened(yaml.safe_load(found)) if found else {}
    return {**below, **tree}


def read(path: Path) -> None:
    """Load, write out, load again; then look a key up in it."""
    config = load_config(path)
    path.with_name("written.yaml").write_text(dump(config))
    again = load_config(path.with_name("written.yaml"))
    assert to_tree(again) == to_tree(config), "a configuration written down is another one"
    config_keys.run(argparse.Namespace(key="optimizer", method=None, cfg=str(path), markdown=False))


def overrides(chance: Random, folder: Path) -> Path:
    """One to five texts of --set."""
    known = [key.path.replace("PLAYER", chance.choice("GDx")) for key in keys()]
    found = []
    for _ in range(chance.randint(1, 5)):
        key = chance.choice((*[chance.choice(known)] * 3, chance.choice(NAMES), "." * 50, "a." * 40))
        value = odd(chance)
        text = chance.choice((json.dumps(value), json.dumps(value), chance.choice(BOMBS)))
        found.append(f"{key}{chance.choice(('=', '=', '=', '', '==', ' = '))}{text}")
        if chance.random() < 0.2:
            found[-1] = damaged(chance, found[-1].encode(errors="replace")).decode(errors="replace")
    path = folder / "overrides.json"
    path.write_text(json.dumps(found))
    return path


def override(path: Path) -> None:
    load_config("sdgan_projected.yaml", json.loads(path.read_text()))


def words(chance: Random, folder: Path) -> Path:
    """What is asked of `sdtrain config`."""
    key = chance.choice(keys()).path
    word = chance.choice((key, damaged(chance, key.encode()).decode(errors="replace"), chance.choice(NAMES)))
    word = chance.choice((word, f"{word}.{chance.choice(NAMES)}", f"optimizer.{word}", f"{word}.0", word.upper()))
    path = folder / "words.json"
    path.write_text(json.dumps([word, chance.choice((None, None, "sdgan", chance.choice(NAMES)))]))
    return path


def explain(path: Path) -> None:
    word, method = json.loads(path.read_text())
    config_keys.run(argparse.Namespace(key=word, method=method, cfg=None, markdown=False))
    if not word.startswith("-"):
        main(["config", word])


CLASSES = {
    "configuration text": Inputs(texts, read),
    "configuration values": Inputs(values, read),
    "overrides": Inputs(overrides, override),
    "config KEY": Inputs(words, explain),
}
