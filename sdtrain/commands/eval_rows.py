"""What evaluations of every task share: rows that are kept, found again and compared."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from sdtrain.errors import ConfigError
from sdtrain.files import read_rows
from sdtrain.metrics.protocol import require_same
from sdtrain.metrics.table import METRICS, merged

DECIMALS = {**merged(dict(metric.shown) for metric in METRICS.values()), "psnr_y": 3, "ssim_y": 4, "lpips": 4}
HUGE = 1e100  # no metric is so large; not-a-number is not less than it


def append(row: dict[str, Any], file: Path | None) -> None:
    """Add a row to a file of rows."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")


def last_row(file: Path | None) -> dict[str, Any] | None:
    """The last evaluation in a --json file or a run's metrics.jsonl. Raises ConfigError when there is none."""
    if file is None:
        return None
    try:
        measured = (row for row in read_rows(file) if row and isinstance(row.get("protocol"), dict))
        return deque(measured, maxlen=1)[0]
    except (OSError, ValueError, IndexError):  # ValueError: a name that no file can have
        raise ConfigError(
            f"--against {file} holds no evaluation; give a file written by `sdtrain evaluate --json`."
        ) from None


def compare(earlier: dict[str, Any] | None, row: dict[str, Any]) -> None:
    """Print the differences from an earlier row, if there is one. Raises ConfigError when the protocols differ."""
    from sdtrain.engine.ranks import is_main

    if earlier is None:
        return
    require_same(earlier["protocol"], row["protocol"])
    both = [name for name in DECIMALS if is_number(row.get(name)) and is_number(earlier.get(name))]
    for name in both if is_main() else ():
        print(f"  {name:12}{earlier[name]:.{DECIMALS[name]}f} -> {row[name]:.{DECIMALS[name]}f}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < HUGE
