"""`sdtrain speed FILE|RUN ...`: what networks take to run: latency, throughput, FLOPs, parameters and memory.

Every case (network, size, arithmetic, backend, threads) does one pass a round, in turn, so that whatever else the
machine does hits all alike. Of a run of super-resolution its best student and, once, its teacher are measured.

    FILE.jsonl    with --json: one row a call, with the seconds of every pass, for `sdtrain report sdakd-table3`
    PAGE          with --out: table and chart, as those of `sdtrain report`
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtrain.commands import plots, tables
from sdtrain.commands.eval_rows import append
from sdtrain.commands.pages import Figure, Part, check_out, publish
from sdtrain.commands.speed_rows import Asked, sizes_of, table
from sdtrain.errors import EXIT_OK, ConfigError
from sdtrain.files import why_unwritable
from sdtrain.release.names import BACKENDS, PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "runs (their best weights), .safetensors, .pth, official files; the first is what others are compared with"
    add("sources", nargs="+", type=Path, metavar="FILE|RUN", help=what)
    what = "input, height x width, several with commas; faces and drawn images have their own (default: 256x256)"
    add("--size", default="256x256", help=what)
    add("--batch", type=int, default=1, metavar="N", help="images a pass (default: 1)")
    add("--threads", help="threads of a CPU, several with commas (default: as OMP_NUM_THREADS says, else all cores)")
    add("--precision", default="fp32", help=f"several with commas, of {', '.join(PRECISIONS)} (default: fp32)")
    add("--backend", default="eager", help=f"several with commas, of {', '.join(BACKENDS)} (default: eager)")
    add("--warmup", type=int, default=10, metavar="N", help="passes that are not counted (default: 10)")
    add("--passes", type=int, default=50, metavar="N", help="passes that are (default: 50)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--json", type=Path, metavar="FILE", help="append everything as one row")
    add("--out", type=Path, metavar="PAGE", help="PAGE.md, .html, .tex, .csv: table and chart; .png, .svg: the chart")


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError or WeightsError before anything is measured."""
    asked = read(args)
    from sdtrain.commands.speed_cases import measure, subjects_of

    notes: list[str] = []
    row = measure(subjects_of(args.sources), asked, notes)
    found = table(row, f"{asked.passes} passes in turn, {asked.warmup} before them.")
    print(tables.markdown([found], ()))
    for note in notes:
        print(f"sdtrain: note: {tables.one_line(note)}", file=sys.stderr)
    append(row, args.json)
    if args.out:
        files = publish([Part("chart", "Speed", [found, Figure("", lambda: chart(row))])], notes, args.out)
        print(f"\nwritten: {', '.join(map(str, files))}")
    return EXIT_OK


def read(args: argparse.Namespace) -> Asked:
    """Raises ConfigError for everything that can be wrong with the arguments, before torch is imported."""
    for option in ("json", "out"):
        file = getattr(args, option)
        if file and (file.is_dir() or (why := why_unwritable(file.parent))):
            raise ConfigError(f"--{option} {file}: {'it is a folder' if file.is_dir() else why}; name another file")
    if args.out:
        check_out(args.out)
    if args.batch < 1 or args.passes < 2 or args.warmup < 0:
        raise ConfigError("--batch must be at least 1, --passes 2, --warmup 0")
    return Asked(
        sizes_of(args.size),
        args.batch,
        threads_of(args.threads),
        chosen("--precision", args.precision, PRECISIONS),
        chosen("--backend", args.backend, BACKENDS),
        args.warmup,
        args.passes,
        args.device,
    )


def threads_of(text: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 1024 for part in parts):
        raise ConfigError(f"--threads {text}: give whole numbers from 1 on, such as 1 or 1,4")
    return tuple(dict.fromkeys(map(int, parts)))


def chosen(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{option} has {', '.join(unknown) or 'no name'}; choose from {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def chart(row: dict[str, Any]) -> Any:
    """Milliseconds a pass of every case, with their quartiles; a colour for each condition."""
    cases = row["cases"]
    conditions = list(dict.fromkeys(condition(case) for case in cases))
    colours = dict(zip(conditions, plots.colours_of(len(conditions))))
    names = tables.shortened(list(dict.fromkeys(case["name"] for case in cases)), 40)
    figure = plots.new_figure(8.5, 0.32 * len(cases) + 1.2 + 0.2 * len(conditions))
    ax = figure.subplots()
    for place, case in enumerate(cases):
        low, middle, high = (1000 * value for value in statistics.quantiles(case["seconds"], n=4))
        spread = [[middle - low], [high - middle]]
        ax.barh(place, middle, xerr=spread, color=colours[condition(case)], error_kw={"linewidth": 0.8})
        ax.text(high, place, f" {middle:.3g} ms", va="center", fontsize=8)
    before = [None, *(case["name"] for case in cases)]
    labels = ["" if case["name"] == last else names[case["name"]] for case, last in zip(cases, before)]
    ax.set_yticks(range(len(cases)), labels, parse_math=False)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel(f"ms a pass of {row['setup']['batch']} image(s): median and quartiles")
    ax.set_title(row["setup"]["device"], fontsize=10, parse_math=False)
    ax.grid(axis="x", alpha=0.3, linewidth=0.6)
    plots.legend(figure, colours, [], 1)
    return figure


def condition(case: dict[str, Any]) -> str:
    return f"{case['size']}, {case['precision']}, {case['backend']}, {case['threads']} thread(s)"
