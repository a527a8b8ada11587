"""`sdtrain report RUN [RUN ...]`: curves and tables from what runs have written.

`sdtrain report table1 fig3 --runs RUN ...`: tables and figures of the papers, filled (`exhibits.py`, `pages.py`).

    PAGE.md, .html, .tex, .csv  the tables, with the pictures below in it (--out PAGE.png: the curves alone); report.md
    PAGE.png, .svg         metrics and losses against images; runs whose names differ by seed become a mean with a band
    PAGE_interplay_RUN.png with --interplay: Figure 6 of SD-GAN, extremes of L_SD and D

A table holds numbers of one split and one protocol, a row those of one evaluation.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands import exhibits, pages, plots, tables
from sdtrain.commands.arms import seed_of, table_of_values, tables_of_arms
from sdtrain.commands.material import SHARES, Material, shares_of
from sdtrain.commands.results import (
    FACTOR,
    METRICS,
    Row,
    Written,
    called,
    chosen,
    comparable,
    heading,
    judge,
    printed,
    protocol_of,
    read_runs,
)
from sdtrain.commands.roughness import tables_of_roughness
from sdtrain.commands.speed_rows import sizes_of
from sdtrain.commands.tables import Table
from sdtrain.errors import EXIT_OK, ConfigError, UserError
from sdtrain.metrics.protocol import conflicts, whole

if TYPE_CHECKING:
    from sdtrain.commands.snapshots import Variation

NAME_IN_FILE = 100  # characters of a run's name in the name of its picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "run folders, or files of `sdtrain evaluate --json`; with --runs: tables and figures of the papers, such as "
    add("what", nargs="+", metavar="RUN|NAME", help=what + "table1, sdgan-fig3, or all that these runs can fill")
    what = "the runs, or files of `sdtrain speed --json`, that fill the tables and figures named before"
    add("--runs", nargs="+", type=Path, metavar="RUN", help=what)
    what = "PAGE.md (or PAGE), .html, .tex, .csv: a page; .png, .svg: pictures alone (default: report.md, of all .html)"
    add("--out", type=Path, metavar="PAGE", help=what)
    add("--smooth", type=int, metavar="POINTS", help="points of the running mean drawn over a curve; 0 = none")
    add("--no-smooth", action="store_const", const=0, dest="smooth", help="no running mean")
    add("--variation", action="store_true", help="Table 3: how much images still change between saved weights")
    add("--shares", default=SHARES, metavar="PERCENT", help=f"of training, where --variation looks (default: {SHARES})")
    add("--latents", type=int, default=480, help="latents of --variation (default: 480)")
    add("--pairs", choices=("consecutive", "all_pairs"), default="consecutive", help="weights --variation compares")
    add("--roughness", action="store_true", help="how unsteady losses are: variance of steps / variance of values")
    add("--interplay", action="store_true", help="Figure 6: images that L_SD and D like least and most")
    add("--interplay-latents", type=int, default=10_000, metavar="N", help="latents of --interplay (default: 10000)")
    add("--extremes", type=int, default=200, help="images kept at either end of L_SD (default: 200)")
    what = "training set, for the classes of the runs; images of Figure 4 of SDAKD (default: as each config.yaml says)"
    add("--data", metavar="DATA", help=what)
    add("--size", default="64x64", help="input of photographs in Table 3 of SDAKD, height x width (default: 64x64)")
    add("--passes", type=int, default=50, help="timed passes of Table 3 of SDAKD (default: 50)")
    add("--lpips", metavar="SOURCE", help="VGG16 of LPIPS: a path, `download` or `random` (default: as the run)")
    add("--batch", type=int, default=16, help="images at once (default: 16)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError or RunError before anything is written."""
    check(args)
    runs, notes = read_runs(args.runs or [Path(run) for run in args.what])
    if args.runs:
        parts = exhibits.fill(args.what, Material(runs, args, notes))
        files = pages.publish(parts, notes, args.out)
        found = [block for part in parts for block in part.blocks if isinstance(block, Table)]
    else:
        found = tables_of_arms(runs, notes) + tables_of_metrics(runs, notes)
        found += tables_of_variation(runs, args, notes) if args.variation else []
        found += tables_of_roughness(runs, notes) if args.roughness else []
        extremes = of_each(runs, lambda run: interplay(run, args), notes) if args.interplay else []
        files = draw(runs, extremes, args, notes)
        if args.out.suffix in tables.PAGES:
            pages.write(args.out, tables.PAGES[args.out.suffix](found, notes, files))
            files = [args.out, *files]
    print(tables.markdown(found, ()))
    for note in notes:
        print(f"sdtrain: note: {tables.one_line(note)}", file=sys.stderr)
    print(f"\nwritten: {', '.join(map(str, files))}")
    return EXIT_OK


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for everything that can be wrong with the arguments, before torch is imported."""
    for name in args.what:
        if args.runs:
            exhibits.wanted(name)
        elif exhibits.is_exhibit(name) and not os.path.exists(name):
            raise ConfigError(f"{name} is of a paper: say which runs fill it with --runs RUN ...")
    args.out = args.out or Path("report.html" if args.runs and exhibits.ALL in args.what else "report.md")
    if not args.out.suffix:
        args.out = args.out / "report.md" if os.path.isdir(args.out) else args.out.with_suffix(".md")
    pages.check_out(args.out)
    if args.latents < 2 or args.batch < 1:
        raise ConfigError("--latents must be at least 2, --batch at least 1")
    sizes_of(args.size)
    if args.passes < 2:
        raise ConfigError("--passes must be at least 2")
    if args.smooth is not None and args.smooth < 0:
        raise ConfigError(f"--smooth {args.smooth}: a running mean takes 2 points or more; 0 = none")
    shares_of(args.shares)
    if args.interplay and (args.extremes < 4 or 2 * args.extremes > args.interplay_latents):
        raise ConfigError(
            f"--extremes {args.extremes}: take at least 4, and at most half of the {args.interplay_latents} latents"
        )


# Tables


@dataclass(frozen=True)
class Entry:
    """A line of a table before it is text."""

    run: Written
    row: Row


def tables_of_metrics(runs: Sequence[Written], notes: list[str]) -> list[Table]:
    """Tables 1 and 2: of each split the rows that `chosen` takes; lines of unlike protocols in tables of their own."""
    splits = list(dict.fromkeys(row.split for run in runs for row in run.rows if row.values))
    found = []
    for split in sorted(splits, key=lambda split: (split != "val", split)):
        entries = without_repeats([Entry(run, row) for run in runs for row in chosen(run, split)])
        parts = comparable(entries, lambda entry: entry.row.protocol)
        note_conflicts([(part[0].run.name, whole(entry.row.protocol for entry in part)) for part in parts], notes)
        found += [table_of_metrics(split, part) for part in parts]
    if not found:
        notes.append("No run has been evaluated (eval_img is 0, or the first evaluation is still to come).")
    return found


def note_conflicts(firsts: Sequence[tuple[str, dict[str, Any]]], notes: list[str]) -> None:
    """Why there is more than one table: a sentence for each, against the first."""
    for name, protocol in firsts[1:]:
        found = conflicts(firsts[0][1], protocol)
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        notes.append(f"{firsts[0][0]} and {name}: {'; '.join(found[:3])}{more}")


def without_repeats(entries: list[Entry]) -> list[Entry]:
    """Bicubic enlargement, or one teacher, on the same images is the same in every run: one line is enough."""
    kept: list[Entry] = []
    for entry in entries:
        same = entry.row.network if entry.row.seen_img is None else ""  # what the run has not trained
        known = (other.row for other in kept if other.row.network == same and other.row.seen_img is None)
        if not any((row.values, row.protocol) == (entry.row.values, entry.row.protocol) for row in known):
            kept.append(entry)
    return kept


def table_of_metrics(split: str, entries: list[Entry]) -> Table:
    rows = [entry.row for entry in entries]
    factors = {int(found[1]): key for row in rows for key in row.values if (found := FACTOR.fullmatch(key))}
    keys = [key for key in METRICS if any(key in row.values for row in rows)]
    at = keys.index("fid") + 1 if "fid" in keys else 0
    keys[at:at] = [factors[number] for number in sorted(factors)]
    words = ["Run"]
    if any(row.stage or row.network not in ("G", "G_ema") for row in rows) or len({row.network for row in rows}) > 1:
        words += ["Network", "Stage"]
    about = {"Run": lambda e: title(e.run), "Network": lambda e: e.row.network, "Stage": lambda e: e.row.stage or "-"}
    protocol = protocol_of(rows)
    lines = [[*(about[w](e) for w in words), images(e.row), *(cell(e.row, key) for key in keys)] for e in entries]
    head = [*words, "images", *(heading(key, protocol) for key in keys)]
    return Table(caption(split, entries), head, lines, len(words))


def title(run: Written) -> str:
    part = f"{run.seen_img:,} of {run.total_img:,} images" if run.total_img else ""
    return f"{run.name} (unfinished: {part})" if run.unfinished else run.name


def images(row: Row) -> str:
    return "-" if row.seen_img is None else f"{row.seen_img:,}"


def cell(row: Row, key: str) -> str:
    return printed(key, row.values[key], row.values.get(f"{key}_std")) if key in row.values else "-"


def caption(split: str, entries: Sequence[Entry]) -> str:
    """Which rows these are, and of how many images."""
    rows = [entry.row for entry in entries]
    p = protocol_of(rows)
    if "num_images" in p:
        measured = f"{p['num_images']} images, low quality: {p.get('lq', '?')}"
    else:
        measured = f"{p.get('num_fake', '?')} generated against {p.get('num_real', '?')} real images"
    if split != "val":
        return f"Split {split}: last evaluation of each run, {measured}."
    keys = dict.fromkeys(judge([entry.row], entry.run.select_by) for entry in entries)
    by = " or ".join(called(key, p) for key in keys if key)
    by += ", whichever chose the run's weights" if len(keys) > 1 else ""
    each = "each stage of each run" if any(row.stage for row in rows) else "each run"
    return f"Split val: best evaluation of {each} by {by}, {measured}."


def of_each(runs: Sequence[Written], do: Callable[[Written], Any], notes: list[str]) -> list[tuple[Written, Any]]:
    """What `do` makes of each run; a run that cannot give it becomes a note. Raises its UserError when no run can."""
    found, problems = [], []
    for one in runs:
        try:
            found.append((one, do(one)))
        except UserError as problem:
            problems.append(problem)
    if not found:
        raise problems[0]
    notes.extend(map(str, problems))
    return found


def tables_of_variation(runs: Sequence[Written], args: argparse.Namespace, notes: list[str]) -> list[Table]:
    """Table 3: perceptual variation of each run between weights at the same shares of training."""
    from sdtrain.commands.snapshots import variation

    shares = shares_of(args.shares)
    found = of_each(runs, lambda run: variation(run, shares, args, notes), notes)
    parts = comparable(found, lambda item: item[1].protocol)
    note_conflicts([(part[0][0].name, whole(v.protocol for _, v in part)) for part in parts], notes)
    text = f"between {args.pairs.replace('_', ' ')} weights, {args.latents} latents: mean over latents +- "
    text += "standard deviation with n."
    head = ["Run", "at % of training", "at images", "variation down"]
    line = lambda run, v: [title(run), v.at_shares, v.at_images, f"{v.mean:.3f} +- {v.deviation:.3f}"]  # noqa: E731
    made = [Table(f"{part[0][1].distance} {text}", head, [line(*item) for item in part], 3) for part in parts]
    return [*made, *filter(None, (arms_of_variation(part) for part in parts))]


def arms_of_variation(measured: Sequence[tuple[Written, Variation]]) -> Table | None:
    from sdtrain.commands.snapshots import distances

    arms: dict[str, dict[int, float]] = defaultdict(dict)
    for run, found in measured:
        if (seed := seed_of(run)) is not None:
            arms[run.group][seed] = found.mean
    return table_of_values(f"Arms over seeds, {distances(v for _, v in measured)}.", {"variation": arms})


# Files


def interplay(run: Written, args: argparse.Namespace) -> dict[str, Any]:
    from sdtrain.commands import snapshots

    return snapshots.interplay(run.path, args)


def draw(runs: list[Written], extremes: list[tuple[Written, Any]], args: Any, notes: list[str]) -> list[Path]:
    """The pictures that were written. Tables do without them where matplotlib cannot be imported.

    Raises ConfigError when they cannot be written.
    """
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        curves = args.out if args.out.suffix in pages.PICTURES else args.out.with_suffix(".png")
        files = [curves] if plots.curves(runs, curves, args.smooth, notes) else []
        names = tables.shortened([run.name for run, _ in extremes], NAME_IN_FILE)
        for run, found in extremes:
            name = re.sub(r"[^\w.-]+", "_", names[run.name], flags=re.ASCII)
            files.append(args.out.with_name(f"{args.out.stem}_interplay_{name}.png"))
            plots.save(plots.quadrants(found, run.name), files[-1])
        return files
    except ImportError as error:
        notes.append(f"there are no pictures: {error}; install matplotlib")
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be written ({error.strerror}); name another file") from None
    return []
