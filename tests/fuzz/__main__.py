"""`python tests/fuzz --seed 0 --count 5000`: the table of all classes of inputs; exit code 1 when one has failed."""

from __future__ import annotations

import argparse
import importlib
import math
import pkgutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from fuzz.harness import Inputs, Result, run_class  # noqa: E402

QUICK = Inputs._field_defaults["seconds"]


def collect() -> dict[str, Inputs]:
    """CLASSES of every module of this folder."""
    found: dict[str, Inputs] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules([str(HERE)])):
        if module not in ("harness", "__main__"):
            found |= getattr(importlib.import_module(f"fuzz.{module}"), "CLASSES", {})
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--count", type=int, default=500, help="inputs of all classes together (default: 500)")
    add("--only", nargs="+", default=[], metavar="CLASS", help="these classes alone")
    add("--number", type=int, help="the input with this number alone, kept with --keep even when it holds")
    add("--keep", type=Path, metavar="DIR", help="copy inputs that fail into this folder")
    return parser.parse_args()


def weight(inputs: Inputs) -> float:
    """Readers that may take longer than usual get a tenth of the inputs of the others."""
    return 1.0 if inputs.seconds <= QUICK else 0.1


def line(result: Result) -> str:
    failed = len(result.failed)
    counts = f"{result.tried:>7} {result.tried - failed:>7} {failed:>7}"
    return f"{result.name:<28} {counts} {result.seconds:>8.1f} {result.peak_mb:>8.0f}"


def main() -> int:
    args = arguments()
    classes = collect()
    unknown = [name for name in args.only if name not in classes]
    if unknown:
        print(f"there is no class {unknown[0]!r}; the classes are {', '.join(classes)}", file=sys.stderr)
        return 2
    chosen = {name: inputs for name, inputs in classes.items() if not args.only or name in args.only}
    share = args.count / sum(map(weight, chosen.values()))
    if args.keep and args.number is not None:
        write(chosen, args)
    print(f"{'class of input':<28}   tried    held  failed  seconds  peak MB", flush=True)
    total = Result("all")
    for name, inputs in chosen.items():
        numbers = range(math.ceil(share * weight(inputs))) if args.number is None else [args.number]
        result = run_class(name, inputs, numbers, args.seed, args.keep)
        print(line(result), flush=True)
        for number, why in result.failed.items():
            total.failed[len(total.failed)] = f"--seed {args.seed} --only '{name}' --number {number}: {why}"
        total.tried, total.seconds = total.tried + result.tried, total.seconds + result.seconds
        total.peak_mb = max(total.peak_mb, result.peak_mb)
    print(line(total))
    print("\n".join(total.failed.values()))
    return int(bool(total.failed))


def write(chosen: dict[str, Inputs], args: argparse.Namespace) -> None:
    """Make the inputs without reading them."""
    from random import Random

    for name, inputs in chosen.items():
        folder = args.keep / f"{name.replace(' ', '_')}-{args.number}"
        folder.mkdir(parents=True)
        print("made", inputs.make(Random(f"{args.seed} {name} {args.number}"), folder))


if __name__ == "__main__":
    sys.exit(main())
