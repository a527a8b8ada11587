"""Table 2 of SD-GAN from what runs have written: seconds per 1000 images and memory, and what L_SD adds. Free of torch.

Numbers stand in one column only where data, device, ranks, precision and batch are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.commands.material import Material, missing_seeds
from sdtrain.commands.papers import setting, variant
from sdtrain.commands.results import Written
from sdtrain.commands.tables import Table
from sdtrain.engine.positions import complete
from sdtrain.engine.starts import starts_of
from sdtrain.errors import RunError
from sdtrain.files import read_json
from sdtrain.terminal import clip

METHODS = {"": "baseline", "+SD_L1": "SD-GAN_L1", "+SD": "SD-GAN"}
# (model, row) -> (s/kimg, memory) as printed
PUBLISHED = {
    ("StyleGAN2-ADA", "baseline"): ("12.56 s", "3.10 GB"),
    ("StyleGAN2-ADA", "SD-GAN_L1"): ("14.09 s", "3.36 GB"),
    ("StyleGAN2-ADA", "SD-GAN"): ("19.93 s", "5.00 GB"),
    ("StyleGAN2-ADA", "SD-GAN_L1 overhead"): ("+12.2%", "+8.4%"),
    ("StyleGAN2-ADA", "SD-GAN overhead"): ("+58.7%", "+61.3%"),
    ("ProjectedGAN", "baseline"): ("18.78 s", "7.45 GB"),
    ("ProjectedGAN", "SD-GAN_L1"): ("22.20 s", "8.81 GB"),
    ("ProjectedGAN", "SD-GAN"): ("28.33 s", "9.38 GB"),
    ("ProjectedGAN", "SD-GAN_L1 overhead"): ("+18.2%", "+18.3%"),
    ("ProjectedGAN", "SD-GAN overhead"): ("+50.9%", "+25.9%"),
    ("StyleNAT", "baseline"): ("213 s", "29.7 GB"),
    ("StyleNAT", "SD-GAN"): ("233 s", "31.8 GB"),
    ("StyleNAT", "SD-GAN overhead"): ("+9.4%", "+7.1%"),
}


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    run: Written
    seed: int
    model: str
    method: str
    where: str
    """Everything that must be the same in two numbers of a column."""
    values: tuple[float | None, float | None]
    """Median s/kimg of the ticks after the first; GB at the last tick before an evaluation."""
    wait: float
    """Median share of the time spent waiting for data."""


def table2(material: Material) -> list[Table]:
    """The table, and which column was measured on what. [] where no run of SD-GAN has ended."""
    costs = []
    for run, config in material.of("sdgan"):
        try:
            costs.append(cost(run, config))
        except RunError as problem:
            material.notes.append(f"{run.name} is left out of Table 2: {problem}")
            continue
        if config.sd.log and not config.sd.alpha:
            material.notes.append(f"{run.name} computes L_SD to log it (sd.log): as a baseline it looks too slow")
    if not costs:
        return []
    columns = {place: chr(97 + i) for i, place in enumerate(dict.fromkeys((one.model, one.where) for one in costs))}
    for place, letter in columns.items():
        here = [one for one in costs if (one.model, one.where) == place]
        seeds = {m: {one.seed for one in here if one.method == m} for m in {one.method for one in here}}
        missing_seeds({f"{letter} {method}": found for method, found in seeds.items()}, material.notes)
    return [filled(costs, columns), measured_on(costs, columns)]


def cost(run: Written, config: Any) -> Cost:
    """Raises RunError for a run that does not say what it took, or on what."""
    ticks = [values for _, values in sorted(run.perf.items())]
    seconds = [values["sec_per_kimg"] for values in ticks if "sec_per_kimg" in values]
    if not seconds:
        raise RunError("it has no timing rows (log_img)")
    before = next((i for i, values in enumerate(ticks) if "sec/evaluate" in values), len(ticks))
    memory = [values["peak_mem_gb"] for values in ticks[:before] if "peak_mem_gb" in values]
    waits = [values["data_wait_frac"] for values in ticks if "data_wait_frac" in values]
    data, model = setting(config)
    images = f"{data} at {config.data.resolution} px" if config.data.resolution else data
    batch = f"batch {config.batch_size} in ghosts of {config.ghost_batch}"
    added = variant(config.sd)
    return Cost(
        run,
        config.seed,
        model,
        METHODS.get(added, f"SD-GAN{added.removeprefix('+SD')}"),
        "; ".join([images, batch, machine(run)]),
        (statistics.median(seconds[1:] or seconds), max(memory, default=None)),
        statistics.median(waits) if waits else 0.0,
    )


def machine(run: Written) -> str:
    """Devices, ranks and arithmetic of a run. Raises RunError where they are unknown, or changed between its starts."""
    try:
        starts = starts_of(run.path)
    except (OSError, ValueError) as error:
        raise RunError(f"its environment.json is damaged ({error})") from None
    found = list(dict.fromkeys(described(start, run) for start in starts))
    if not found:
        raise RunError("without its environment.json nobody knows what it ran on")
    if len(found) > 1:
        raise RunError(f"it was trained in several ways ({found[0]}, then {found[-1]})")
    return found[0]


def described(start: dict[str, Any], run: Written) -> str:
    """One start in words. Raises RunError for one that does not say its device."""
    engine, products = (part if isinstance(part := start.get(key), dict) else {} for key in ("engine", "float32"))
    devices = start.get("devices") or devices_of_checkpoint(run)
    if not (isinstance(devices, list) and devices):
        raise RunError("it does not say which device it ran on")
    words = [f"{start.get('world_size', '?')} rank(s) on {' and '.join(map(str, devices))}"]
    words += [f"{engine.get(key, '?')}" for key in ("name", "precision")] + [f"sums {engine.get('summation', '?')}"]
    words += ["tf32"] if "tf32" in products.values() else []
    words += [f"threads {start.get('threads', '?')}"] if all(str(name).startswith("CPU") for name in devices) else []
    return clip(", ".join(words), 200)


def devices_of_checkpoint(run: Written) -> Any:
    """What the newest checkpoint says; runs of earlier versions have it there alone."""
    saved = complete(run.path / "checkpoints")
    try:
        return read_json(saved[-1] / "state.json")["origin"]["devices"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def filled(costs: Sequence[Cost], columns: dict[tuple[str, str], str]) -> Table:
    """Rows as in the paper, those of other distances after them; a column pair for each model and place."""
    methods = [*METHODS.values(), *sorted({one.method for one in costs} - set(METHODS.values()))]
    names = [*methods, *(f"{method} overhead" for method in methods[1:])]
    unmeasured = dict.fromkeys(model for model, _ in PUBLISHED if model not in {one.model for one in costs})
    places = [*columns, *((model, "") for model in unmeasured)]
    head, lines = ["Method"], {name: [name] for name in names}
    for model, where in places:
        letter = f" [{columns[model, where]}]" if where else ""
        here = [one for one in costs if (one.model, one.where) == (model, where)]
        for quantity, unit in enumerate(("s/kimg", "GB")):
            head += [f"{model}{letter} {unit}", "published"]
            for name in names:
                lines[name] += [shown(here, name, quantity), PUBLISHED.get((model, name), "--")[quantity]]
    said = (
        "Table 2 of SD-GAN: what training takes. Seconds per 1000 images: median over ticks after the first; memory: "
        "the most that a rank has held before the first evaluation (on a CPU: of the whole process), the paper's is "
        "an average. Letters say where it was measured."
    )
    return Table(said, head, list(lines.values()), 1)


def shown(costs: Sequence[Cost], name: str, quantity: int) -> str:
    """A mean over seeds with its deviation, or how much more than the baseline's it is."""
    method = name.removesuffix(" overhead")
    mine = values_of(costs, method, quantity)
    if method == name:
        if len(mine) > 1:
            return f"{statistics.fmean(mine):.2f} +- {statistics.stdev(mine):.2f} ({len(mine)})"
        return f"{mine[0]:.2f}" if mine else "-"
    base = values_of(costs, "baseline", quantity)
    if not mine or not base or not statistics.fmean(base):
        return "-"
    return f"{statistics.fmean(mine) / statistics.fmean(base) - 1:+.1%}"


def values_of(costs: Sequence[Cost], method: str, quantity: int) -> list[float]:
    return [value for one in costs if one.method == method and (value := one.values[quantity]) is not None]


def measured_on(costs: Sequence[Cost], columns: dict[tuple[str, str], str]) -> Table:
    """What the letters mean, a line a run."""
    lines = []
    for one in costs:
        about = [columns[one.model, one.where], one.method, one.run.name, str(one.seed), one.where]
        lines.append([*about, f"{one.wait:.0%}", str(len(one.run.perf))])
    head = ["Letter", "Method", "Run", "seed", "Measured on", "waiting for data", "ticks"]
    return Table("Where the columns of Table 2 were measured.", head, sorted(lines), 5)
