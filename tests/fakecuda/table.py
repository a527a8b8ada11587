"""Launches, waits and copies of one step of every method, on a GPU that computes nothing.

    python tests/fakecuda/table.py                        all of it
    python tests/fakecuda/table.py --only stylegan2       what has this in its name
    python tests/fakecuda/table.py --modes exact          with which sums, or in bf16 (its first step, unwarmed)
    python tests/fakecuda/table.py --where                and the lines of code that wait
    python tests/fakecuda/table.py --json FILE            the figures, for a program

The process starts itself anew under a small library, compiled on first use, which stands for the CUDA runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SAID = "SDTRAIN_FAKE_CUDA"  # set in the process that has the library
MODES = {
    "exact": ["summation=exact"],
    "fast": ["summation=fast"],
    "bf16": ["summation=fast", "precision=bf16"],
}


def library() -> Path:
    """The folder of the compiled library. Raises RuntimeError where there is no compiler, or no CUDA build of torch."""
    from shutil import which

    compiler = which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("needs a C compiler (cc) for a stub of the CUDA runtime")
    folder = Path(tempfile.gettempdir()) / f"sdtrain_fake_cuda_{os.getuid()}_{(HERE / 'stub.c').stat().st_mtime_ns}"
    folder.mkdir(exist_ok=True)
    made = folder / "libcuda.so.1"
    if not made.exists():
        part = folder / f"part{os.getpid()}"
        subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(part), str(HERE / "stub.c")], check=True)
        part.replace(made)
    return folder


def environment() -> dict[str, str]:
    """What a process needs to see the GPU. Raises as `library` does."""
    folder = library()
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    more = {"LD_PRELOAD": str(folder / "libcuda.so.1"), "LD_LIBRARY_PATH": ":".join(paths), SAID: "1"}
    root = str(HERE.parents[1])
    return {**os.environ, **more, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": root}


def measured(only: str, modes: list[str]) -> dict[str, Any]:
    """`NAME/STAGE`, mode -> {launches, waits, copies, where}; an error stands in place of figures."""
    from cases import batch_for, configurations, stages, trainer_of
    from gpu import gpu

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, keys in configurations(Path(place)).items():
            for mode in modes if only in name else []:
                began = time.process_time()
                try:
                    with gpu() as device:
                        trainer = trainer_of(Path(place), keys, *MODES[mode])
                        batch = batch_for(trainer)
                        for stage in stages(trainer):
                            row = f"{name} / {stage}" if len(trainer.method.stages) > 1 else name
                            found.setdefault(row, {})[mode] = steps(trainer, batch, device, warm=mode != "bf16")
                except Exception as error:
                    if "--trace" in sys.argv:
                        raise
                    found.setdefault(name, {})[mode] = {"error": f"{type(error).__name__}: {error}"[:300]}
                print(f"{name} {mode}: {time.process_time() - began:.1f} s", file=sys.stderr)
    return found


def used(only: str) -> dict[str, Any]:
    """What is done with networks beside training: name -> "", or what is wrong."""
    from cases import USES
    from gpu import gpu

    found = {}
    for name, use in USES.items():
        try:
            with gpu():
                use() if only in name else None
            found[name] = ""
        except Exception as error:
            if "--trace" in sys.argv:
                raise
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def steps(trainer: Any, batch: Any, device: Any, warm: bool) -> dict[str, Any]:
    """A step to fill what is kept, where that is wanted, then the one that counts."""
    first = trainer.step
    for _ in range(1 + warm):
        trainer.step = first
        device.clear()
        trainer.advance(trainer.chunks(batch))
    trainer.step = first + 1
    launches, waits, copies = device.launches, device.waits, device.copies
    figures = {"launches": launches.total(), "waits": waits.total(), "copies": copies.total()}
    return {**figures, "where": dict(Counter(waits).most_common(12)), "what": dict(launches.most_common(12))}


def render(found: dict[str, Any], where: bool) -> str:
    modes = list(dict.fromkeys(mode for row in found.values() for mode in row))
    head = f"{'launches / waits / copies a step':<46}" + "".join(f"{mode:>22}" for mode in modes)
    lines = [head]
    for name, row in found.items():
        cells = [row.get(mode, {}) for mode in modes]
        lines.append(f"{name:<46}" + "".join(f"{cell(c):>22}" for c in cells))
        for mode, c in row.items():
            lines += [f"    {mode}: {c['error']}"] if "error" in c else []
            lines += [f"    {mode}: {n:>5} x {what}" for what, n in c.get("where", {}).items() if where]
    return "\n".join(lines)


def cell(c: dict[str, Any]) -> str:
    if "error" in c:
        return "fails"
    return f"{c['launches']} / {c['waits']} / {c['copies']}" if c else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="methods that have this in their name")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--where", action="store_true", help="say which lines wait")
    parser.add_argument("--trace", action="store_true", help="end with the first error, and all of it")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    args = parser.parse_args()
    if SAID not in os.environ:
        return subprocess.run([sys.executable, *sys.argv], env=environment()).returncode
    found = measured(args.only, args.modes.split(","))
    beside = used(args.only)
    if args.json:
        args.json.write_text(json.dumps({"steps": found, "beside": beside}, indent=1))
    print(render(found, args.where))
    print("\n".join(f"{name:<46}{said or 'runs'}" for name, said in beside.items()))
    return int(any(beside.values()) or any("error" in c for row in found.values() for c in row.values()))


if __name__ == "__main__":
    sys.exit(main())
