"""What `sdtrain speed` is asked and what it writes, and the table of it. Free of torch."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain import __version__
from sdtrain.commands.tables import Table
from sdtrain.errors import ConfigError

MAX_SIDE = 1 << 14
CONDITION = ("size", "precision", "backend", "threads")  # of a case; numbers of others are not compared


@dataclass(frozen=True)
class Asked:
    """What every network is measured under."""

    sizes: tuple[tuple[int, int], ...] = ((256, 256),)
    batch: int = 1
    threads: tuple[int, ...] = ()
    """() = as they are."""
    precisions: tuple[str, ...] = ("fp32",)
    backends: tuple[str, ...] = ("eager",)
    warmup: int = 10
    passes: int = 50
    device: str = "auto"


def sizes_of(text: str) -> tuple[tuple[int, int], ...]:
    """'256x256,64x96' as ((256, 256), (64, 96)), height first. Raises ConfigError."""
    found = [re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", part.strip()) for part in text.split(",")]
    sizes = [(int(one[1]), int(one[2])) for one in found if one]
    if len(sizes) < len(found) or not all(1 <= side <= MAX_SIDE for size in sizes for side in size):
        raise ConfigError(f"--size {text}: give height x width in pixels, at most {MAX_SIDE}, such as 256x256,512x512")
    return tuple(dict.fromkeys(sizes))


def new_row(asked: Asked, device: str, torch_version: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """What --json appends."""
    setup = {"device": device, "torch": torch_version, "sdtrain": __version__, "batch": asked.batch}
    setup |= {"warmup": asked.warmup, "passes": asked.passes}
    return {"kind": "speed", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "setup": setup, "cases": cases}


def speed_up(case: dict[str, Any], base: dict[str, Any]) -> float:
    """Median of the ratios of the same round."""
    return statistics.median(b / a for a, b in zip(case["seconds"], base["seconds"]))


def base_of(case: dict[str, Any], cases: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first network's case under the same condition."""
    alike = (one for one in cases if all(one[key] == case[key] for key in CONDITION))
    return next((one for one in alike if one["kind"] == case["kind"]), None)


def table(row: dict[str, Any], how: str) -> Table:
    """A line a case; speed-up and FLOPs ratio are against the first network of its kind under the same condition."""
    cases, setup = row["cases"], row["setup"]
    head = ["Network", "input", "precision", "backend", "threads", "ms", "quartiles", "images/s", "speed-up"]
    head += ["GFLOP", "FLOPs ratio", "M parameters", "MB", "difference"]
    lines = []
    for case in cases:
        base = base_of(case, cases)
        assert base is not None  # at least the case itself
        low, middle, high = statistics.quantiles(case["seconds"], n=4)
        line = [case["name"], case["size"], case["precision"], case["backend"], str(case["threads"])]
        line += [f"{1000 * middle:.3f}", f"{1000 * low:.3f} to {1000 * high:.3f}"]
        line += [f"{setup['batch'] / middle:.2f}", f"{speed_up(case, base):.2f}x"]
        line += [f"{case['flops'] / 1e9:.3f}", ratio(base["flops"], case["flops"]), f"{case['parameters'] / 1e6:.3f}"]
        line += ["-" if case["memory"] is None else f"{case['memory'] / 1e6:.1f}", f"{case['difference']:.1e}"]
        lines.append(line)
    clocks = " and ".join(dict.fromkeys(case["clock"] for case in cases))
    said = (
        f"{setup['device']}, torch {setup['torch']}, batch {setup['batch']}, {clocks}; {how} A FLOP is an addition or "
        "a multiplication; MB: weights and the most that one pass holds; difference: the largest from eager fp32, "
        "beside the largest number; speed-up: median over rounds, against the first network of the same kind."
    )
    return Table(said, head, lines, 4)


def ratio(base: float, value: float) -> str:
    return f"{base / value:.2f}x" if value else "-"
