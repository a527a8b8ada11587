"""Compare this repository's networks and formulas with a folder of golden numbers.

    python tests/golden/check.py DIR [FILE_PATTERN ...]

DIR holds `manifest.json` and the files it lists. Everything is driven by these files: seeds, sizes, options, strides,
output names and tolerances are read from manifest entries, tensor names and shapes, so any folder of this format can be
checked. One line is printed per file and output, then 'N ok, N short, N not comparable, N failed':

    ok              deviates by no more than is allowed
    short           was not compared: the file or its adapter is missing, or no adapter looked at this output
    not comparable  the adapter gives the reason why the folder does not hold what the output depends on
    failed          deviates by more, or the adapter raised

The exit status is 1 if anything is short or failed.

Adapters. A module `adapters_NAME.py` beside this file knows how to compute the outputs of some files:

    def generator(case):                       # case: check.Case, see its docstring
        from sdtrain.models.fastgan.networks import Generator  # import inside: a missing module reads 'short'
        net = Generator(...case.entry["config"]...)
        net.load_state_dict(case.group("sd."))
        yield "out.img", net(case.tensors["in.z"])                     # reference and tolerance from the file
        yield "grad.sum", total, 3.25, case.norm_limit(7.5)            # or given: reference, allowed |difference|

    ADAPTERS = {"pg_fastgan*.safetensors": generator}       # exact file names win over patterns, longer over shorter

Values may be tensors, numbers or bools. Expectations that the manifest itself holds (calls, expected, sums) and
refusals use the form with a reference: `yield "refused", True, True, 0.0`. What the manifest says in words is read with
`case.said(output)` and `rules.number(text, name)`. `yield name, Skip(reason)` (`from check import Skip`) says why an
output cannot be compared. Short are: stored outputs (`out.`, `mid.`, `after*`, `grad.`) that no adapter yields, other
stored tensors but inputs that none reads, numbers under `expected` that none yields by their dotted name, and tensors
that the manifest lists and the file does not hold.
`rules.py` has the seeded inputs and weights.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent.parent, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import rules  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

OUTPUT_PREFIXES = ("out.", "mid.", "after", "grad.")
INPUT_PREFIXES = ("in.", "sd.", "aux.", "draw.", "param.", "filter.")
OK, SHORT, SKIPPED, FAILED = "ok", "short", "not comparable", "failed"


class Tensors(dict[str, Tensor]):
    """The tensors of a file by name, and which of them were looked at."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return super().__getitem__(name)


@dataclass(frozen=True)
class Case:
    """One file of a golden folder.

    name      file name (or the manifest key for numbers kept in the manifest itself)
    folder    the golden folder; other files of it may be read too
    entry     the manifest entry of this file: config, seed, stride, calls, tol ...
    manifest  the whole manifest
    tensors   the tensors of a .safetensors file, by name
    """

    name: str
    folder: Path
    entry: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @cached_property
    def tensors(self) -> Tensors:
        from safetensors.torch import load_file

        return Tensors(load_file(self.path) if self.path.suffix == ".safetensors" else {})

    @cached_property
    def json(self) -> Any:
        return json.loads(self.path.read_text())

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix`, without it ('sd.' gives the state dict)."""
        return {name[len(prefix) :]: self.tensors[name] for name in self.tensors if name.startswith(prefix)}

    def names(self, pattern: str) -> list[tuple[str, ...]]:
        """(name, *groups) of every tensor whose whole name fits a regular expression; no group reads ''."""
        found = [re.fullmatch(pattern, name) for name in self.tensors]
        return [(hit[0], *(part or "" for part in hit.groups())) for hit in found if hit]

    def said(self, output: str) -> str:
        """What the manifest's `calls` say about an output, the most special first; keys may hold {name} and *."""
        said = dict(self.entry.get("calls", {}))
        patterns = {key: re.sub(r"\{[^}]*\}", "*", key) for key in said}
        fitting = [k for k, p in patterns.items() if any(fnmatch.fnmatch(output, p + end) for end in ("", ".*"))]
        return "; ".join(str(said[key]) for key in sorted(fitting, key=lambda key: (key != output, -len(key))))

    def other(self, name: str) -> Case:
        """Another file of the same folder."""
        return Case(name, self.folder, self.manifest["files"].get(name, {}), self.manifest)

    @property
    def base_seed(self) -> int:
        return rules.base_seed(self.manifest)

    def rnd(self, key: str, *shape: int, scale: float = 1.0, seed: int | None = None) -> Tensor:
        """The manifest's rnd_rule; `seed` defaults to its base seed."""
        return rules.rnd(key, *shape, scale=scale, seed=self.base_seed if seed is None else seed)

    def rnd_in_text(self, text: str, **sizes: int) -> dict[str, Tensor]:
        """Inputs that a manifest text spells as rnd('key',1,3,8,res); `sizes` are the words in it."""
        return rules.rnd_in_text(text, self.base_seed, sizes)

    def fill(self, net: nn.Module, family: str, seed: int | None = None) -> nn.Module:
        """Load `net` with the weights of the fill rule; `seed` defaults to the entry's."""
        net.load_state_dict(rules.fill(net.state_dict(), self.entry["seed"] if seed is None else seed, family))
        return net

    def procedural(self, net: nn.Module) -> nn.Module:
        """Load `net` with the weights that entry['weights'] describes."""
        net.load_state_dict(rules.procedural(net.state_dict(), self.entry["weights"]))
        return net

    def limit(self, reference: Any) -> float:
        """The allowed |got - reference| of this file's tolerance."""
        return rules.limit(self.entry, _tensor(reference))

    def norm_limit(self, norm: float) -> float:
        """The allowed deviation of a gradient norm, or of a sum belonging to that norm."""
        return rules.norm_limit(self.manifest, norm)


@dataclass(frozen=True)
class Skip:
    """Yielded in place of a value: this output cannot be computed from what the folder holds."""

    reason: str


Adapter = Callable[[Case], Iterator[tuple]]


@dataclass(frozen=True)
class Line:
    """One result; verdict is one of OK, SHORT, SKIPPED and FAILED."""

    file: str
    output: str
    verdict: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file:44s} {self.output:52s} {self.detail:44s} {self.verdict}"


def find_adapters() -> dict[str, Adapter]:
    """All ADAPTERS of the adapters_*.py modules beside this file, by file name or pattern."""
    found: dict[str, Adapter] = {}
    for path in sorted(HERE.glob("adapters_*.py")):
        for pattern, adapter in importlib.import_module(path.stem).ADAPTERS.items():
            if pattern in found:
                raise ValueError(f"{path.name}: another module has an adapter for {pattern!r}; keep one")
            found[pattern] = adapter
    return found


def adapter_of(name: str, adapters: dict[str, Adapter]) -> Adapter | None:
    if name in adapters:
        return adapters[name]
    fitting = sorted((pattern for pattern in adapters if fnmatch.fnmatch(name, pattern)), key=len)
    return adapters[fitting[-1]] if fitting else None


def entries_of(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Manifest entries by file name, with the .pth list and the statistics that some manifests keep apart."""
    entries = dict(manifest["files"])
    entries.update({name: {"what": what} for name, what in manifest.get("pth", {}).items()})
    entries.update({name: value for name, value in manifest.items() if name.startswith("init_statistics")})
    return entries


def run(folder: Path | str, patterns: Sequence[str] = ()) -> list[Line]:
    """Check every file of `folder` whose name fits one of `patterns` (all without patterns)."""
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    adapters = find_adapters()
    lines: list[Line] = []
    for name, entry in entries_of(manifest).items():
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            lines += _check_file(Case(name, folder, entry, manifest), adapter_of(name, adapters))
    return lines


def _check_file(case: Case, adapter: Adapter | None) -> list[Line]:
    if not case.path.is_file() and "." in case.name:
        return [Line(case.name, "-", SHORT, "file not in this folder")]
    if adapter is None:
        return [Line(case.name, "-", SHORT, "no adapter for it")]
    lines: list[Line] = []
    try:
        lines.extend(_compare(case, *yielded) for yielded in adapter(case))
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sdtrain"):
            raise
        return [*lines, Line(case.name, "-", SHORT, f"model not here yet ({error.name})")]
    except Exception as error:  # one broken adapter must not hide the other files
        lines.append(Line(case.name, "-", FAILED, f"raised {type(error).__name__}: {error}"))
    if not lines:
        lines.append(Line(case.name, "-", SHORT, "its adapter compared nothing"))
    return lines + [Line(case.name, name, SHORT, "not compared") for name in _missed(case, lines)]


def _missed(case: Case, lines: Sequence[Line]) -> list[str]:
    """Outputs and expected numbers without a line, other tensors that nobody looked at or that are not stored."""
    compared = {line.output for line in lines}
    outputs = {name for name in case.tensors if name.startswith(OUTPUT_PREFIXES)}
    others = {name for name in case.tensors if not name.startswith(OUTPUT_PREFIXES + INPUT_PREFIXES)}
    expected = set(_leaves(case.entry.get("expected", {})))
    listed = set(case.entry.get("tensors", {})) - case.tensors.keys()
    return sorted((outputs | (others - case.tensors.seen) | expected | listed) - compared)


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the numbers and lists of numbers in nested dicts."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif not isinstance(value, str) and not (isinstance(value, list) and value and isinstance(value[0], list)):
        yield name


def _compare(case: Case, output: str, got: Any, reference: Any = None, allowed: float | None = None) -> Line:
    if isinstance(got, Skip):
        return Line(case.name, output, SKIPPED, got.reason)
    got = _tensor(got)
    if reference is None:
        reference = case.tensors[output]
    reference = _tensor(reference)
    allowed = rules.limit(case.entry, reference) if allowed is None else allowed
    if got.shape != reference.shape:
        return Line(case.name, output, FAILED, f"shape {tuple(got.shape)}, expected {tuple(reference.shape)}")
    worst = float((got - reference).abs().max()) if got.numel() else 0.0
    return Line(case.name, output, OK if worst <= allowed else FAILED, f"deviation {worst:.3e} allowed {allowed:.3e}")


def _tensor(value: Any) -> Tensor:
    """Float64 on the host, whatever kind of number it was."""
    return torch.as_tensor(value).detach().cpu().double()


def bad(lines: Sequence[Line]) -> list[str]:
    """The lines that are short or failed."""
    return [str(line) for line in lines if line.verdict in (SHORT, FAILED)]


def summary(lines: Sequence[Line]) -> str:
    kinds = (OK, SHORT, SKIPPED, FAILED)
    return ", ".join(f"{sum(line.verdict == kind for line in lines)} {kind}" for kind in kinds)


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print(f"usage: python {sys.argv[0]} DIR [FILE_PATTERN ...]", file=sys.stderr)
        return 2
    if not (Path(arguments[0]) / "manifest.json").is_file():
        print(f"{arguments[0]} holds no manifest.json; name a folder of golden files", file=sys.stderr)
        return 2
    lines = run(arguments[0], arguments[1:])
    for line in lines:
        print(line)
    print(summary(lines))
    return int(bool(bad(lines)) or not lines)


if __name__ == "__main__":
    sys.modules.setdefault("check", sys.modules["__main__"])
    sys.exit(main(sys.argv[1:]))
