"""What evaluations of every task share: how ranks join, and rows that are kept, found again and compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sdtrain.errors import ConfigError
from sdtrain.metrics.protocol import require_same
from sdtrain.metrics.table import METRICS, merged

DECIMALS = {**merged(dict(metric.shown) for metric in METRICS.values()), "psnr_y": 3, "ssim_y": 4, "lpips": 4}


def start_ranks(device: str) -> Any:
    """Join the other processes of a launch, if there are any; the device of this one. Raises as `device_of`."""
    from sdtrain.commands.source import device_of
    from sdtrain.engine import ranks

    place = device_of(device)
    return place if os.environ.get("WORLD_SIZE", "1") == "1" else ranks.start_ranks(place.type)


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
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        return [row for row in rows if "protocol" in row][-1]
    except (OSError, ValueError, IndexError, TypeError):
        raise ConfigError(
            f"--against {file} holds no evaluation; give a file written by `sdtrain evaluate --json`."
        ) from None


def compare(earlier: dict[str, Any] | None, row: dict[str, Any]) -> None:
    """Print the differences from an earlier row, if there is one. Raises ConfigError when the protocols differ."""
    from sdtrain.engine.ranks import is_main

    if earlier is None:
        return
    require_same(earlier["protocol"], row["protocol"])
    for name in [name for name in DECIMALS if name in row and name in earlier] if is_main() else ():
        print(f"  {name:12}{earlier[name]:.{DECIMALS[name]}f} -> {row[name]:.{DECIMALS[name]}f}")
