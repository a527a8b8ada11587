"""The shape of the code. Without these it would drift, a line at a time, into something nobody can read whole."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, run_python

PACKAGE = REPO / "sdtrain"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((REPO / "tests").rglob("*.py"))
MEDIAN_LINES, MOST_LINES, MAX_LINES, MAX_FILE_LINES = 8, 30, 80, 350


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function with the number of its lines: decorators, docstring and blank lines are not counted."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1:] if ast.get_docstring(node) is not None else node.body
            start = first[0].lineno if first else node.end_lineno
            body = lines[start - 1 : node.end_lineno]
            header = node.body[0].lineno - node.lineno
            yield f"{relative(path)}:{node.lineno} {node.name}", header + sum(bool(line.strip()) for line in body)


def is_architecture(name: str) -> bool:
    return name.startswith("sdtrain/models/")


def test_half_of_the_functions_are_short_and_nine_in_ten_fit_a_glance():
    lengths = sorted(length for path in SOURCES for _, length in functions(path))
    assert statistics.median(lengths) <= MEDIAN_LINES
    assert lengths[int(0.9 * (len(lengths) - 1))] <= MOST_LINES


def test_no_function_but_an_architecture_is_longer_than_a_screen():
    long = [(name, length) for path in SOURCES for name, length in functions(path) if length > MAX_LINES]
    assert [item for item in long if not is_architecture(item[0])] == []


def test_no_file_but_an_architecture_is_longer_than_five_screens():
    sizes = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES and not is_architecture(name)} == {}


def test_every_module_and_every_test_file_begins_by_saying_what_it_is_for():
    silent = [
        relative(path)
        for path in (*SOURCES, *TESTS)
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def dependency_modules() -> set[str]:
    """Top-level names of every installed distribution that pyproject.toml or one of its dependencies brought."""
    names = set(importlib.metadata.packages_distributions())
    return {name for name in names if not name.startswith("_")} - {"sdtrain"}


def test_no_module_hides_one_of_the_standard_library_or_of_a_dependency():
    """The folder of a script is first on the import path of every launched process."""
    own = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    own -= {"__init__", "__pycache__"}
    assert own & (set(sys.stdlib_module_names) | dependency_modules()) == set()


@pytest.mark.parametrize("folder", ["sdtrain", "tests", "configs", "launch", "shards", "slurm", ".ci"])
def test_text_is_ascii(folder: str):
    odd = []
    for path in (REPO / folder).rglob("*"):
        if path.suffix in (".py", ".yaml", ".sh", ".md", ".toml", "") and path.is_file():
            text = path.read_bytes()
            odd += [relative(path)] if not text.isascii() else []
    assert odd == []


def test_importing_the_package_is_cheap_and_has_no_side_effect():
    script = """
import os, sys
before = dict(os.environ)
import sdtrain, sdtrain.cli, sdtrain.config.load, sdtrain.config.options, sdtrain.errors
assert dict(os.environ) == before
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_imports_are_absolute():
    assert [relative(path) for path in SOURCES if any(name.startswith(".") for name in imports(path))] == []


def test_methods_know_nothing_of_the_machinery():
    machinery = ("sdtrain.engine", "sdtrain.loop", "sdtrain.run", "sdtrain.plan", "sdtrain.cli", "accelerate")
    for path in (PACKAGE / "methods").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith((*machinery, "torch.distributed"))], relative(
            path
        )


def calls(path: Path, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            yield node


def test_nothing_is_unpickled():
    for path in SOURCES:
        assert not {"dill", "cloudpickle", "joblib"} & imports(path), relative(path)
        for load in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            assert not list(calls(path, load)), f"{relative(path)} calls {load}"
        for call in calls(path, "torch.load"):
            safe = [word for word in call.keywords if word.arg == "weights_only" and ast.unparse(word.value) == "True"]
            assert safe, f"{relative(path)}:{call.lineno}: torch.load without weights_only=True"


def code_comments(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from (token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT)


def test_no_banner_art_and_no_ownerless_reminders():
    found = [
        f"{relative(path)}: {comment}"
        for path in (*SOURCES, *TESTS)
        for comment in code_comments(path)
        if re.search(r"[-=#*]{5,}|\b(TODO|FIXME|XXX|HACK)\b", comment)
    ]
    assert found == []
