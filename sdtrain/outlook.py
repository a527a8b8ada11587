"""What `--plan` foresees: how long a run takes, and what somebody would rather have known before it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from sdtrain.engine.launcher import wants_cpu
from sdtrain.engine.threads import warning
from sdtrain.files import read_rows

if TYPE_CHECKING:
    from sdtrain.config.keys import Config
    from sdtrain.data.read.dataset import Dataset

MOST = 1 << 53  # images or seconds that anybody will wait for
CENTURY = 3.15e9
NEWEST = 8  # ticks whose speed is taken for that of the rest
FEW_FAKES, FEW_SEEDS = 1_000, 3  # below these, rFID of the same network moves as much as training moves it
WIDTHS = {"fd_lite0": 1280, "fd_clip": 512}  # features of a network that comes in one width
MISSED = {
    "log_img": "no loss and no speed is logged",
    "sample_img": "no image is drawn",
    "eval_img": "nothing is evaluated, so no weights are chosen",
    "save_img": "nothing is saved, so a crash loses everything",
}


def forecast(out: Path | None, end_img: Mapping[str, int]) -> dict[str, Any]:
    """Seconds to the end of the present stage by its newest perf rows in a run folder; {} without one.

    `end_img` has the stages in order. `sec_per_kimg` is training alone; `seconds` has the evaluations as they came.
    `then` are the stages that follow, whose speed nobody knows yet.
    """
    rows = _perf_rows(out / "metrics.jsonl") if out else []
    if not rows:
        return {}
    stage = rows[-1].get("stage")
    rows = [row for row in rows if row.get("stage") == stage]
    # by comparison, since the stage of a damaged row may be no name
    end = next((end for name, end in end_img.items() if name == stage), max(end_img.values(), default=0))
    speed = median(row["sec_per_kimg"] for row in rows)
    whole = speed + mean(row.get("sec/evaluate", 0.0) for row in rows)
    left = max(end - rows[-1]["seen_img"], 0)
    then = [name for name, later in end_img.items() if later > end]
    found = {"left_img": left, "sec_per_kimg": speed, "seconds": left / 1000 * whole, "ticks": len(rows)}
    return found | {"stage": stage, "then": then}


def _perf_rows(file: Path) -> list[dict[str, Any]]:
    """The newest rows that say how fast a run was; lines that a crash cut short are left out."""
    try:
        return list(deque((row for row in read_rows(file) if row and _tells_speed(row)), maxlen=NEWEST))
    except OSError:
        return []


def _tells_speed(row: dict[str, Any]) -> bool:
    numbers = (row.get("sec_per_kimg"), row.get("seen_img"), row.get("sec/evaluate", 0.0))
    return row.get("kind") == "perf" and all(isinstance(n, (int, float)) and 0 <= n < MOST for n in numbers)


def render_forecast(found: dict[str, Any], name: str) -> str:
    from sdtrain.loop import duration

    if not found:
        return f"unknown until the first tick; `sdtrain bench --cfg {name}` measures it"
    if found["seconds"] > CENTURY:
        return f"more than a century, at {found['sec_per_kimg']:.3g} s/kimg"
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + found["seconds"]))
    measured = f"{found['sec_per_kimg']:.3g} s/kimg in the last {found['ticks']} ticks of this run"
    of = f" of {found['stage']}" if found["then"] else ""
    then = f"; then {', '.join(found['then'])}, each at a speed of its own" if found["then"] else ""
    return f"{duration(found['seconds'])} for {found['left_img']} images more{of}, until {end} ({measured}){then}"


def warnings(config: Config, dataset: Dataset, total_img: int) -> list[str]:
    """Sentences; none of them keeps a run from working."""
    from sdtrain.data.read.dataset import open_dataset, reading

    photographs, own = dataset, config.data
    if config.eval_img and own.val:
        photographs = open_dataset(own.val, keep_index=False, **reading(own))
    return [*_never(config, total_img), *_few(config, photographs.num_samples), *_arithmetic(config), *_threads()]


def _never(config: Config, total_img: int) -> Iterator[str]:
    for key, missed in MISSED.items():
        interval = getattr(config, key)
        if interval and key == "eval_img" and getattr(config, "eval_epochs", None):
            continue  # evaluated by another clock
        if not interval or interval >= total_img:
            yield f"{missed} before the end: {key} is {interval or '0 (never)'}, the run has {total_img} images"


def _few(config: Config, num_photographs: int) -> Iterator[str]:
    """Evaluations that would choose `best/` by chance."""
    if not config.eval_img:
        return
    m, of_list = config.metrics, getattr(config, "validation", None)
    names = of_list.names if of_list else m.names
    real = num_photographs if of_list else min(m.num_real or num_photographs, num_photographs)
    few = min(real, real if of_list else m.num_fake)
    for name, width in {"fid": m.tap, **WIDTHS}.items():
        if name in names and few < width:
            yield (
                f"{name} of {few} images in {width} features: the covariance of fewer images than features is "
                "singular, so most of the value is bias that depends on the number; take "
                f"{width} real and generated images or more, or compare only values of the same number"
            )
    lottery = m.num_fake < FEW_FAKES or m.seeds < FEW_SEEDS
    if not of_list and "rfid" in names and lottery:
        yield (
            f"rfid of {m.num_fake} generated images in {m.seeds} random networks: its spread makes choosing weights a "
            f"lottery; take metrics.num_fake {FEW_FAKES} and metrics.seeds {FEW_SEEDS} or more"
        )


def _threads() -> Iterator[str]:
    if sentence := warning():
        yield sentence


def _arithmetic(config: Config) -> Iterator[str]:
    import torch

    from sdtrain.precision import exact_sums

    on_cpu = wants_cpu() or not torch.cuda.is_available()
    for role, section in vars(config.model).items():
        levels = getattr(section, "num_low_precision_res", 0)
        if on_cpu and levels and getattr(section, "low_precision", None) == "fp16":
            yield f"model.{role}: {levels} levels in float16 compute in float32 on this CPU, which emulates float16"
    if (config.ghosts_at_once or 1) > 1 and exact_sums(config, "cpu" if on_cpu else "cuda"):
        yield f"ghosts_at_once: {config.ghosts_at_once} changes nothing here, where summation: auto is exact: set fast"
    if config.tf32 and on_cpu:
        yield "tf32: true changes nothing on a CPU: figures from here are of full float32"
    elif config.tf32:
        yield "tf32: true rounds the factors of float32 products to 10 bits: compare with runs of tf32: true alone"
