"""Beginning again in a folder that holds a run: only when asked (--restart), and nothing is deleted even then."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from sdtrain.engine.checkpoint import verify
from sdtrain.engine.positions import positions
from sdtrain.engine.ranks import from_main, is_main
from sdtrain.engine.writing import together
from sdtrain.errors import RunError

# What a run writes, in the order in which it is moved aside: a move that is interrupted leaves rows without
# checkpoints, which no start takes for a fresh folder.
OWN = (
    *("checkpoints", "snapshots", "best", "samples", "inputs", "tensorboard", "wandb"),
    *("config.yaml", "plan.json", "environment.json", "metrics.jsonl"),
)


def refuse_to_start_over(folder: Path, refused: list[str]) -> None:
    """Raise `RunError` on every rank when `folder` holds a run; `refused`: why no checkpoint of it can be taken up."""
    held = from_main(held_in(folder) if is_main() else "")
    if not held and not refused:
        return
    found = "".join(f"\n  {reason}" for reason in refused or ["there is no checkpoint"])
    raise RunError(
        f"{folder} holds {held or 'a run'}, and nothing to go on from:{found}\n"
        "nothing was changed; put a complete checkpoint back, choose another folder with --out, or begin again with "
        "--restart, which moves this run into a folder of its own inside"
    )


def held_in(folder: Path) -> str:
    """What a fresh start in `folder` would cut or overwrite, in words; "" when there is nothing."""
    rows = [line for line in lines_of(folder / "metrics.jsonl") if line.strip()]
    last = max(last_row(folder), 0)
    snapshots = sum(verify(path) is None for path in positions(folder / "snapshots"))
    best = len(list((folder / "best").glob("*.safetensors")))
    found = {f"rows of metrics.jsonl up to image {last:.0f}": len(rows), "snapshots": snapshots, "best weights": best}
    return ", ".join(f"{number} {what}" for what, number in found.items() if number)


def last_row(folder: Path) -> float:
    """The image of the last row of metrics.jsonl; -1 where there is none."""
    return max((at for line in lines_of(folder / "metrics.jsonl") if (at := position(line)) < math.inf), default=-1)


def lines_of(metrics: Path) -> list[str]:
    return metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []


def position(line: str, redo_evaluation: bool = False) -> float:
    """Where a row of metrics.jsonl belongs; one that a crash cut short, or that is no row at all, belongs nowhere.

    `redo_evaluation` puts evaluations a little later than their step: that of the newest step is done again.
    """
    try:
        row = json.loads(line)
        return float(row["seen_img"]) + 0.5 * (redo_evaluation and row["kind"] == "eval")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf


def is_row(found: object) -> bool:
    """Whether a value that a file holds is a row of metrics.jsonl: what it is, of which list, and where it belongs."""
    if not isinstance(found, dict) or position(json.dumps(found)) == math.inf:
        return False
    return isinstance(found.get("kind"), str) and isinstance(found.get("split", ""), str)


def set_aside(folder: Path) -> Path | None:
    """Move the run in `folder` into FOLDER/before-DATE-TIME, all ranks together; None when there is none.

    Raises `RankFailed` on every rank when that fails.
    """
    aside = folder / time.strftime("before-%Y%m%d-%H%M%S")
    moved: Path | None = together(lambda: _move(folder, aside), aside, folder)
    return moved


def _move(folder: Path, aside: Path) -> Path | None:
    own = [folder / name for name in OWN if os.path.lexists(folder / name)]
    if not own:
        return None
    aside.mkdir()
    for path in own:
        os.rename(path, aside / path.name)
    return aside
