"""`sdtrain verify`: find every damaged shard and sample before a run does. Opens nothing that could run code."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="packed folder, glob or brace pattern of tars, or an address of either")
    add("--report", metavar="FILE", help="write all findings as JSON")
    add("--resolution", type=int, default=0, metavar="N", help="expected side (default: the manifest's)")
    add("--quick", action="store_true", help="check structure and digests, decode no image")
    add("--allow-pipe", action="store_true", help="run the commands of pipe: sources")
    large = "memory that one picture may cost, as data.max_image_mb of the run (default: %(default)s)"
    add("--max-image-mb", type=int, default=512, metavar="MB", help=large)
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core, here %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print a table of damage, worst shard first; exit 0 when clean, 2 when not. Raises DataError without shards."""
    from sdtrain.data.pack.checking import check_source, totals
    from sdtrain.data.read.budget import PictureLimits
    from sdtrain.files import write_json

    how = {"resolution": args.resolution, "decode": not args.quick, "workers": args.workers}
    limits = PictureLimits(megabytes=args.max_image_mb)
    findings, about = check_source(args.source, allow_pipe=args.allow_pipe, limits=limits, **how)
    if args.report:
        rows = [{"shard": shard, "member": member, "reason": reason} for shard, member, reason in findings]
        write_json(Path(args.report), about | {"damage": rows, "damage_per_shard": dict(totals(findings))})
    print(f"{args.source}: {about['num_samples']} samples in {about['num_shards']} shards checked")
    if not findings:
        print("no damage found")
        return EXIT_OK
    _print_table(findings)
    return EXIT_USER_ERROR


def _print_table(findings: list[tuple[str, str, str]]) -> None:
    from sdtrain.data.pack.checking import totals
    from sdtrain.terminal import printable

    print(f"{len(findings)} damaged places\n{'damage':>7}  {'shard':<24} first finding")
    for shard, count in totals(findings)[:SHOWN]:
        member, reason = next((m, r) for s, m, r in findings if s == shard)
        print(printable(f"{count:>7}  {shard:<24} {f'{member}: ' if member else ''}{reason}"))
    if len(totals(findings)) > SHOWN:
        print(f"... and {len(totals(findings)) - SHOWN} more shards (--report FILE lists all)")
