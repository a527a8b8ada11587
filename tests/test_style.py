"""The shape of the code. Without these it would drift, a line at a time, into something nobody can read whole."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPO, run_python
from import_graph import ANYTHING, all_imports, circles, graph, imports_of, lies_in, modules, reached

PACKAGE = REPO / "sdtrain"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((REPO / "tests").rglob("*.py"))
MEDIAN_LINES, MOST_LINES, MAX_LINES, MAX_FILE_LINES = 8, 30, 80, 350


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function with the number of its lines: decorators, docstring and blank lines are not counted."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(syntax(path)):
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
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(syntax(path))
    ]
    assert silent == []


def dependency_modules() -> set[str]:
    """Top-level names of every installed distribution that pyproject.toml or one of its dependencies brought."""
    names = set(importlib.metadata.packages_distributions())
    return {name for name in names if not name.startswith("_")} - {"sdtrain"}


# what is imported under another name than it is installed by; of lpips the files are read (`package_heads`)
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "tensorboard": "torch.utils.tensorboard", "lpips": None}


def test_every_dependency_of_a_plain_install_is_imported_on_a_way_from_a_command():
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", (REPO / "pyproject.toml").read_text(), re.M | re.S)
    assert listed
    names = set(re.findall(r'^ *"([A-Za-z0-9-]+)', listed[1], re.M))
    assert {"torch", "timm", "torch-fidelity", "lpips"} <= names
    ways = all_edges()
    starts = [name for name in ("sdtrain.main", *modules()) if name.startswith(("sdtrain.main", "sdtrain.commands."))]
    used = set().union(*(reached(ways, start) for start in starts))
    wanted = {name: MODULES.get(name, name.replace("-", "_")) for name in names}
    assert {name for name, module in wanted.items() if module and not any(lies_in(u, [module]) for u in used)} == set()
    assert 'in_package("lpips",' in modules()["sdtrain.losses.perceptual"].read_text()


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
import sdtrain, sdtrain.cli, sdtrain.config.load, sdtrain.commands.config_keys, sdtrain.config.options, sdtrain.errors
assert dict(os.environ) == before
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_imports_are_absolute():
    assert [relative(path) for path in SOURCES if any(name.startswith(".") for name in imports(path))] == []


ROUTES = {
    "import own.machine": "own.machine",
    "import own.machine as m": "own.machine",
    "from own import machine": "own.machine",
    "from own.machine import part": "own.machine",
    "from own.machine import *": "own.machine",
    "def f():\n    from own.machine import part": "own.machine",
    "class C:\n    def f(self):\n        import own.machine": "own.machine",
    "if TYPE_CHECKING:\n    import own.other\nelse:\n    import own.machine": "own.machine",
    "try:\n    import fast\nexcept ImportError:\n    import own.machine": "own.machine",
    "importlib.import_module('own.machine')": "own.machine",
    "f = lambda kind: import_module(f'own.{kind}')": "own.machine",
    "__import__('own.machine')": "own.machine",
    "NAMES = ('own.machine',)\nimport_module(NAMES[0])": "own.machine",
    "import_module(name)": ANYTHING,
    "import_module('own.' + name)": ANYTHING,
    "exec(text)": ANYTHING,
    "import torch\ntorch.distributed.barrier()": "torch.distributed",
    "import torch as t\nt.distributed.barrier()": "torch.distributed",
    "from torch import distributed": "torch.distributed",
    "import torch.distributed as dist": "torch.distributed",
}


@pytest.mark.parametrize("text, target", ROUTES.items())
def test_a_module_is_seen_by_whatever_route_it_is_reached(text: str, target: str):
    assert any(lies_in(item.target, [target]) for item in imports_of("own.here", text, ["own.machine", "own.other"]))


def test_what_only_type_checkers_see_is_no_import():
    assert not imports_of("own.here", "if TYPE_CHECKING:\n    import own.machine", ["own.machine"])


def test_circles_and_ways_are_found_in_a_graph():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "e": {"e"}}
    assert reached(edges, "a") == {"a": ["a"], "b": ["a", "b"], "c": ["a", "b", "c"], "d": ["a", "b", "c", "d"]}
    assert list(circles(edges)) == [{"b", "c"}]


# The imports inside functions that break the rule today; nothing may be added here.
LATE_WITHOUT_REASON = {
    *(f"sdtrain.commands.{name}" for name in ("doctor", "evaluate", "evaluate_sr", "exporting", "importing")),
    *(f"sdtrain.commands.{name}" for name in ("sample", "snapshots", "upscale")),
    *("sdtrain.data.pack.pack", "sdtrain.data.pack.verify", "sdtrain.data.read.remote", "sdtrain.engine.runfolder"),
    *("sdtrain.finetune", "sdtrain.loop", "sdtrain.metrics.evaluate", "sdtrain.plan", "sdtrain.tasks.validation"),
}

MACHINERY = (
    *("sdtrain.engine", "sdtrain.run", "sdtrain.loop", "sdtrain.plan", "sdtrain.cli", "sdtrain.main", "sdtrain.tasks"),
    *("sdtrain.commands", "sdtrain.interop", "accelerate", "deepspeed", "torch.distributed", ANYTHING),
)
FORMULAS = ("sdtrain.losses", "sdtrain.models", "sdtrain.augment")


def is_mathematics(name: str) -> bool:
    return lies_in(name, FORMULAS) or re.fullmatch(r"sdtrain\.methods\.\w+\.method", name) is not None


@cache
def all_edges() -> dict[str, set[str]]:
    return graph(all_imports())


MATHEMATICS = [name for name in modules() if is_mathematics(name)]


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_knows_nothing_of_the_machinery(name: str):
    """Neither a loss, a model, an augmentation nor what a method minimises reaches it, directly or through others.

    The file that builds a method's networks reads weights; it is handed to the method, never imported by it.
    """
    for target, way in reached(all_edges(), name).items():
        builds = re.fullmatch(r"sdtrain\.methods\.\w+\.build", target)
        assert not lies_in(target, MACHINERY) and not builds, " -> ".join(way)


def test_all_of_the_mathematics_is_looked_at():
    methods = {f"sdtrain.methods.{name}.method" for name in ("dcd", "dirac", "omgd", "sdakd", "sdgan")}
    assert methods | {"sdtrain.losses.distance", "sdtrain.augment.ada"} <= set(MATHEMATICS) and len(MATHEMATICS) > 30


def test_modules_do_not_import_each_other_in_circles_while_they_load():
    assert list(circles(graph(item for item in all_imports() if not item.late))) == []


def test_modules_do_not_need_each_other_in_circles_while_they_run():
    assert list(circles(all_edges())) == []


# What takes long to load, or is not installed everywhere: the reasons to import inside a function.
HEAVY = (
    *("torch", "torchvision", "torch_fidelity", "accelerate", "deepspeed", "timm", "lpips", "natten", "kornia"),
    *("numpy", "scipy", "skimage", "PIL", "matplotlib", "tensorboard", "safetensors", "webdataset", "tqdm"),
    *("onnx", "onnxruntime", "onnxscript", "spandrel", "huggingface_hub", "pydantic", "yaml", "wandb", "uvicorn"),
)
LATE_FOR_ANOTHER_REASON = {
    "sdtrain.engine.timing": "resource is no module of Windows",
    "sdtrain.main": "a script is another module than the one others import; signals are caught before torch loads",
}


def test_imports_inside_functions_spare_the_start_something_heavy():
    """What is imported late is heavy, or loads something heavy when it is imported itself."""
    loading = graph(item for item in all_imports() if not item.late)
    light: dict[str, set[str]] = {}
    for item in all_imports():
        heavy = any(lies_in(target, HEAVY) for target in reached(loading, item.target))
        if item.late and not item.by_name and not heavy:
            light.setdefault(item.source, set()).add(item.target)
    known = LATE_WITHOUT_REASON | set(LATE_FOR_ANOTHER_REASON)
    assert {name: targets for name, targets in light.items() if name not in known} == {}


def calls(path: Path, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(syntax(path)):
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
