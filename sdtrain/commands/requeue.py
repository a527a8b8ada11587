"""`sdtrain requeue`: whether a job whose training has ended is worth another attempt. The job scripts ask this.

    RUN/.attempts   {"job", "seen_img", "ends"}: how often in a row this job has ended at the same image

Where a run stands is read from its newest complete checkpoint. Torch is not imported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from sdtrain import main
from sdtrain.engine.positions import saved_img
from sdtrain.errors import EXIT_OK, ConfigError
from sdtrain.exits import tell
from sdtrain.files import read_json, write_json

FILE = ".attempts"
NOT_AGAIN = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--most", type=int, default=3, metavar="N", help="give up after N ends in a row at one image (default: 3)")
    add("--asked", action="store_true", help="the job was told to stop, so this end does not count")
    main.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Note this end; 0 = put the job back into the queue, 1 = leave it. Raises ConfigError as training does."""
    if args.most < 1:
        raise ConfigError(f"--most {args.most}: it is at least 1")
    out = run_folder(args)
    where, ends = count_end(out, os.environ.get("SLURM_JOB_ID", ""), args.asked)
    if ends < args.most:
        return EXIT_OK
    tell(
        f"{out} has ended at {where:,} images {ends} times in a row: not requeued; the log says why it ends there; "
        "submit the job again when that is mended, it goes on"
    )
    return NOT_AGAIN


def run_folder(args: argparse.Namespace) -> Path:
    """Where training with these arguments writes. Raises ConfigError."""
    from sdtrain.config.load import load_config

    return Path(args.out or f"runs/{load_config(args.cfg, args.set).name}")


def count_end(out: Path, job: str, asked: bool) -> tuple[int, int]:
    """The image at which a run has ended, and how often in a row now: it is written down."""
    where, before = saved_img(out), {}
    with contextlib.suppress(OSError, ValueError):  # the first end, or a file that is damaged
        before = read_json(out / FILE)
    same = isinstance(before, dict) and (before.get("job"), before.get("seen_img")) == (job, where)
    earlier = before.get("ends", 0) if same else 0
    ends = (earlier if isinstance(earlier, int) else 0) + (not asked)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, {"job": job, "seen_img": where, "ends": ends})
    return where, ends
