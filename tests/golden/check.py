"""Compare this repository's networks and formulas with a folder of golden numbers.

    python tests/golden/check.py DIR [FILE_PATTERN ...]

DIR holds `manifest.json` and the files it lists. Everything is driven by the manifest: configurations, seeds, strides
and tolerances are read from its entries, so any folder of this format can be checked. One line is printed per file and
output (deviation, what is allowed, ok or short), then 'N ok, N short, N not here yet'. The exit status is 1 if any is
short.

Adapters. A module `adapters_NAME.py` beside this file knows how to compute the outputs of some files:

    def generator(case):                       # case: check.Case, see its docstring
        from sdtrain.models.fastgan.networks import Generator  # import inside: a missing module reads 'not here yet'
        net = Generator(...case.entry["config"]...)
        net.load_state_dict(case.group("sd."))
        yield "out.img", net(case.tensors["in.z"])                     # reference and tolerance from the file
        yield "grad.sum", total, 3.25, case.norm_limit(7.5)            # or given: reference, allowed |difference|

    ADAPTERS = {"pg_fastgan*.safetensors": generator}       # exact file names win over patterns, longer over shorter

Values may be tensors, numbers or bools. Expectations that the manifest itself holds (calls, expected, sums) and
refusals use the form with a reference: `yield "refused", True, True, 0.0`. Stored outputs (`out.`, `mid.`, `after*`,
`grad.`) that no adapter yields are listed as 'not compared' and counted as not here yet; `yield name, Skip(reason)`
(`from check import Skip`) says why an output cannot be compared. An adapter that raises is short; one whose import of a
sdtrain module fails for want of that module is not here yet. `rules.py` has the seeded inputs and weights.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
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
OK, SHORT, ABSENT = "ok", "short", "not here yet"


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
    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path) if self.path.suffix == ".safetensors" else {}

    @cached_property
    def json(self) -> Any:
        return json.loads(self.path.read_text())

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix`, without it ('sd.' gives the state dict)."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def other(self, name: str) -> Case:
        """Another file of the same folder."""
        return Case(name, self.folder, self.manifest["files"].get(name, {}), self.manifest)

    @property
    def base_seed(self) -> int:
        return rules.base_seed(self.manifest)

    def rnd(self, key: str, *shape: int, scale: float = 1.0, seed: int | None = None) -> Tensor:
        """The manifest's rnd_rule; `seed` defaults to its base seed."""
        return rules.rnd(key, *shape, scale=scale, seed=self.base_seed if seed is None else seed)

    def rnd_in_text(self, text: str) -> dict[str, Tensor]:
        """Inputs that a manifest text spells as rnd('key',1,3,8,8)."""
        return rules.rnd_in_text(text, self.base_seed)

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
    """One result: verdict is ok, short or not here yet."""

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
        return [Line(case.name, "-", ABSENT, "file not in this folder")]
    if adapter is None:
        return [Line(case.name, "-", ABSENT, "model not here yet")]
    lines: list[Line] = []
    try:
        lines.extend(_compare(case, *yielded) for yielded in adapter(case))
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sdtrain"):
            raise
        return [*lines, Line(case.name, "-", ABSENT, f"model not here yet ({error.name})")]
    except Exception as error:  # one broken adapter must not hide the other files
        lines.append(Line(case.name, "-", SHORT, f"raised {type(error).__name__}: {error}"))
    seen = {line.output for line in lines}
    missing = [name for name in case.tensors if name.startswith(OUTPUT_PREFIXES) and name not in seen]
    return lines + [Line(case.name, name, ABSENT, "not compared") for name in sorted(missing)]


def _compare(case: Case, output: str, got: Any, reference: Any = None, allowed: float | None = None) -> Line:
    if isinstance(got, Skip):
        return Line(case.name, output, ABSENT, f"not comparable: {got.reason}")
    got = _tensor(got)
    if reference is None:
        reference = case.tensors[output]
    reference = _tensor(reference)
    allowed = rules.limit(case.entry, reference) if allowed is None else allowed
    if got.shape != reference.shape:
        return Line(case.name, output, SHORT, f"shape {tuple(got.shape)}, expected {tuple(reference.shape)}")
    worst = float((got - reference).abs().max()) if got.numel() else 0.0
    return Line(case.name, output, OK if worst <= allowed else SHORT, f"deviation {worst:.3e} allowed {allowed:.3e}")


def _tensor(value: Any) -> Tensor:
    """Float64 on the host, whatever kind of number it was."""
    return torch.as_tensor(value).detach().cpu().double()


def summary(lines: Sequence[Line]) -> str:
    return ", ".join(f"{sum(line.verdict == kind for line in lines)} {kind}" for kind in (OK, SHORT, ABSENT))


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
    return int(any(line.verdict == SHORT for line in lines))


if __name__ == "__main__":
    sys.modules.setdefault("check", sys.modules["__main__"])
    sys.exit(main(sys.argv[1:]))
