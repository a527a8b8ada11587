"""`sdtrain report RUN [RUN ...] --out PAGE.md`: curves and tables of the SD-GAN paper from what runs have written.

    PAGE.md                the tables, with the pictures below in it (--out PAGE.png: the first picture alone)
    PAGE.png               metrics and losses against images; runs whose names differ by seed become a mean with a band
    PAGE_interplay_RUN.png with --interplay: Figure 6, extremes of L_SD and D

Numbers of different protocols are not put into one table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import EXIT_OK, ConfigError, RunError

SEED_OF_NAME = re.compile(r"[-_.]?seed[-_=]?\d+", re.IGNORECASE)
METRICS = {"fid": "FID", "rfid": "rFID", "kid": "KID", "precision": "Precision", "recall": "Recall"}
RISING = ("precision", "recall")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or files written by `sdtrain evaluate --json`")
    add("--out", type=Path, required=True, metavar="PAGE", help="PAGE.md for tables and pictures, PAGE.png for curves")
    add("--variation", action="store_true", help="Table 3: how much images still change between checkpoints")
    add("--latents", type=int, default=480, help="latents of --variation (default: 480)")
    add("--pairs", choices=("consecutive", "all_pairs"), default="consecutive", help="checkpoints --variation compares")
    add("--interplay", action="store_true", help="Figure 6: images that L_SD and D like least and most")
    add("--interplay-latents", type=int, default=10_000, metavar="N", help="latents of --interplay (default: 10000)")
    add("--extremes", type=int, default=200, help="images kept at either end of L_SD (default: 200)")
    add("--lpips", metavar="SOURCE", help="VGG16 of LPIPS: a path, `download` or `random` (default: as the run)")
    add("--batch", type=int, default=16, help="images at once (default: 16)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError or RunError before anything is written."""
    check(args)
    from sdtrain.commands import plots

    plots.require_matplotlib()
    runs = [read_run(path) for path in args.runs]
    require_one_protocol(runs)
    groups = grouped(runs)
    sections = [table_of_metrics(runs)]
    if args.variation:
        sections.append(table_of_variation(runs, args))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture = args.out.with_suffix(".png")
    plots.curves(groups, picture)
    pictures = [picture, *(interplays(runs, args) if args.interplay else ())]
    page = "\n\n".join([*sections, *(f"![{file.stem}]({file.name})" for file in pictures)])
    print("\n\n".join(sections))
    if args.out.suffix == ".md":
        write_page(args.out, page)
    print(f"\nwritten: {', '.join(str(p) for p in ([args.out] if args.out.suffix == '.md' else []) + pictures)}")
    return EXIT_OK


def check(args: argparse.Namespace) -> None:
    """Everything that can be wrong with the arguments, before torch is imported."""
    if args.out.suffix not in (".md", ".png"):
        raise ConfigError(f"--out {args.out} ends in neither .md (a page) nor .png (the curves)")
    if args.latents < 2 or args.batch < 1:
        raise ConfigError("--latents must be at least 2, --batch at least 1")
    if args.interplay and (args.extremes < 4 or 2 * args.extremes > args.interplay_latents):
        raise ConfigError(
            f"--extremes {args.extremes}: take at least 4, and at most half of the {args.interplay_latents} latents"
        )


# What runs have written


@dataclass(frozen=True)
class Written:
    """The rows of one run."""

    path: Path
    name: str
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # on the validation images

    @property
    def group(self) -> str:
        return SEED_OF_NAME.sub("", self.name) or self.name


def read_run(path: Path) -> Written:
    """Raises RunError when there is nothing to report."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"{path} is no run: it has no metrics.jsonl; give run folders, or files of `evaluate --json`")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise RunError(f"{file}:{number} is not a JSON row; a run that resumes mends its own file") from None
    evaluations = [row for row in rows if row.get("kind") == "eval" and row.get("split", "val") != "test"]
    train = [row for row in rows if row.get("kind") == "train"]
    if not evaluations and not train:
        raise RunError(f"{file} has no losses and no evaluations yet; wait for the first tick (log_img)")
    return Written(path, path.name if path.is_dir() else path.stem, train, evaluations)


def require_one_protocol(runs: list[Written]) -> None:
    """Raises ConfigError naming two runs whose numbers do not compare. Other latents are no other protocol."""
    from sdtrain.metrics.protocol import differences

    rows = [(run, row) for run in runs for row in run.evaluations]
    for run, row in rows[1:]:
        first_run, first = rows[0]
        found = differences(*({**r.get("protocol", {}), "latents_seed": 0} for r in (first, row)))
        if found:
            raise ConfigError(
                f"{first_run.path} and {run.path} were measured in different ways ({'; '.join(found)}), so their "
                "numbers do not belong in one table; evaluate both with the same settings, or report them one by one"
            )


def grouped(runs: list[Written]) -> dict[str, list[Written]]:
    groups: dict[str, list[Written]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    return dict(groups)


def series(runs: list[Written], key: str, kind: str) -> list[tuple[float, float, float]]:
    """(images, mean, standard deviation over runs with n - 1) where every run of the group has a value."""
    values: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        rows = run.evaluations if kind == "eval" else run.train
        for images, value in {row.get("seen_img", 0): row[key] for row in rows if key in row}.items():
            values[images].append(value)
    full = {images: found for images, found in sorted(values.items()) if len(found) == len(runs)}
    return [(x, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for x, v in full.items()]


# Tables


def best_row(run: Written) -> dict[str, Any] | None:
    """The evaluation with the lowest FID, or the lowest first metric it has; None without evaluations."""
    rows = run.evaluations
    key = next((key for key in METRICS if rows and key in rows[0]), None)
    if key is None:
        return None
    choose = max if key in RISING else min
    return choose((row for row in rows if key in row), key=lambda row: row[key])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_metrics(runs: list[Written]) -> str:
    """Table 1: the best evaluation of each run."""
    best = [(run, best_row(run)) for run in runs]
    found = [(run, row) for run, row in best if row is not None]
    if not found:
        return "No run has been evaluated (eval_img is 0, or the first evaluation is still to come)."
    keys = [key for key in METRICS if any(key in row for _, row in found)]
    head = ["Run", "images", *(f"{METRICS[key]} {'up' if key in RISING else 'down'}" for key in keys)]
    rows = [[run.name, f"{row.get('seen_img', 0):,}", *(cell(row, key) for key in keys)] for run, row in found]
    p = found[0][1].get("protocol", {})
    measured = f"{p.get('num_fake', '?')} generated against {p.get('num_real', '?')} real images"
    return f"Best evaluation of each run, {measured}.\n\n{markdown(head, rows)}"


def cell(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    digits = 5 if key == "kid" else 3
    spread = f" +- {row[f'{key}_std']:.{digits}f}" if row.get(f"{key}_std") else ""
    return f"{row[key]:.{digits}f}{spread}"


def table_of_variation(runs: list[Written], args: argparse.Namespace) -> str:
    """Table 3: perceptual variation of each run."""
    from sdtrain.commands.snapshots import variation

    rows = []
    for run in runs:
        mean, deviation, positions = variation(run.path, args)
        rows.append([run.name, f"{mean:.3f} +- {deviation:.3f}", ", ".join(f"{p:,}" for p in positions)])
    text = f"LPIPS between {args.pairs.replace('_', ' ')} checkpoints, {args.latents} latents: mean over latents +- "
    text += "standard deviation with n."
    return f"{text}\n\n{markdown(['Run', 'variation', 'checkpoints'], rows)}"


def interplays(runs: list[Written], args: argparse.Namespace) -> list[Path]:
    from sdtrain.commands import plots
    from sdtrain.commands.snapshots import interplay

    files = []
    for run in runs:
        file = args.out.with_name(f"{args.out.stem}_interplay_{run.name}.png")
        plots.quadrants(interplay(run.path, args), run.name, file)
        files.append(file)
    return files


def write_page(path: Path, page: str) -> None:
    from sdtrain.files import write_bytes

    write_bytes(path, (page + "\n").encode())
