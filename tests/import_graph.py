"""Who imports whom in the package, read from its source: at the top of a module, late (inside a function) or by name.

What only type checkers see is left out. `import_module` with a text or an f-string counts for every module that it can
name; with anything else (and `exec`, `eval`) for ANYTHING, and for every module that a text of the same file names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conftest import REPO

PACKAGE = REPO / "sdtrain"
ANYTHING = "a module that is chosen while running"


@dataclass(frozen=True)
class Import:
    """`source` imports `target`, a module of the package or an outside name such as torch.distributed."""

    source: str
    target: str
    late: bool
    """Inside a function."""
    by_name: bool = False
    """Through `import_module`."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class _Reader(ast.NodeVisitor):
    """Collects the imports of one module."""

    def __init__(self, source: str, own: Collection[str]) -> None:
        self.source, self.own, self.depth = source, own, 0
        self.found: set[Import] = set()
        self.texts: set[str] = set()
        self.torch = {"torch"}

    def add(self, target: str, by_name: bool = False) -> None:
        self.found.add(Import(self.source, target, self.depth > 0, by_name))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name)
            self.torch |= {alias.asname} if alias.name == "torch" and alias.asname else set()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            is_module = inner in self.own or not str(node.module).startswith("sdtrain")
            self.add(inner if is_module else str(node.module))

    def later(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = later

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        if test in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                self.visit(other)
        elif test == "__name__ == '__main__'":
            self.later(node)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`torch.distributed.all_reduce` needs no import of its own."""
        head, _, rest = ast.unparse(node).partition(".")
        if head in self.torch:
            self.add(f"torch.{rest}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.texts.add(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func)
        if function.split(".")[-1] in ("import_module", "__import__"):
            self.by_name(node.args[0] if node.args else None)
        if function in ("exec", "eval"):
            self.add(ANYTHING, by_name=True)
        self.generic_visit(node)

    def by_name(self, name: ast.expr | None) -> None:
        parts = name.values if isinstance(name, ast.JoinedStr) else [name]
        if not all(isinstance(part, (ast.Constant, ast.FormattedValue)) for part in parts):
            self.add(ANYTHING, by_name=True)
            return
        pattern = "".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in parts)
        for target in self.own:
            if re.fullmatch(pattern, target):
                self.add(target, by_name=True)


def imports_of(source: str, text: str, own: Collection[str]) -> set[Import]:
    """The imports of the module `source` with this text, in a package that has the modules `own`."""
    reader = _Reader(source, own)
    reader.visit(ast.parse(text))
    named = reader.texts & set(own) if any(item.target == ANYTHING for item in reader.found) else ()
    return reader.found | {Import(source, name, late=True, by_name=True) for name in named}


@cache
def all_imports() -> frozenset[Import]:
    found: set[Import] = set()
    for name, path in modules().items():
        found |= imports_of(name, path.read_text(encoding="utf-8"), modules())
    return frozenset(found)


Graph = dict[str, set[str]]


def graph(imports: Iterable[Import]) -> Graph:
    edges: Graph = {}
    for item in imports:
        edges.setdefault(item.source, set()).add(item.target)
    return edges


def reached(edges: Graph, start: str) -> dict[str, list[str]]:
    """Everything that loading and running `start` can import, with the shortest way there."""
    ways = {start: [start]}
    queue = [start]
    for here in queue:
        for target in sorted(edges.get(here, ())):
            if target not in ways:
                ways[target] = [*ways[here], target]
                queue.append(target)
    return ways


def lies_in(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def circles(edges: Graph) -> Iterator[set[str]]:
    """Groups of modules of which each reaches every other."""
    ways = {name: set(reached(edges, name)) for name in edges}
    seen: set[str] = set()
    for name in sorted(edges):
        group = {other for other in ways[name] if other in ways and name in ways[other]}
        if len(group) > 1 and name not in seen:
            seen |= group
            yield group
