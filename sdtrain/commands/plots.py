"""Pictures of `sdtrain report`, with matplotlib (extra `quickstart`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtrain.errors import ConfigError

COLUMNS = 3
SMOOTH_FROM = 100  # from so many points on a running mean is drawn, with the points faintly behind it


def require_matplotlib(what: str = "the curves need") -> None:
    """Raises ConfigError when it is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError(f"{what} matplotlib, which is not installed: pip install 'sdtrain[quickstart]'")


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def curves(groups: dict[str, list[Any]], file: Path) -> None:
    """One panel a metric (logarithmic where a distance) and a loss, one line a group of runs."""
    from matplotlib.ticker import LogFormatter

    from sdtrain.commands.report import METRICS, RISING, series

    runs = [run for members in groups.values() for run in members]
    metrics = [(key, "eval") for key in METRICS if any(key in row for run in runs for row in run.evaluations)]
    losses = dict.fromkeys(key for run in runs for row in run.train for key in row if is_loss(key))
    panels = metrics + [(key, "train") for key in losses]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = new_figure(4.6 * COLUMNS, 3.1 * rows + 0.5)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for ax, (key, kind) in zip(axes, panels):
        for number, (name, members) in enumerate(groups.items()):
            line(ax, series(members, key, kind), name, f"C{number % 10}", kind == "eval")
        is_distance = kind == "eval" and key not in (*RISING, "kid")
        ax.set(title=METRICS.get(key, key), xlabel="images seen", yscale="log" if is_distance else "linear")
        ax.grid(alpha=0.3, linewidth=0.6, which="both" if is_distance else "major")
        ax.xaxis.set_major_formatter(lambda x, _: count(x))
        if is_distance:
            ax.yaxis.set_major_formatter(LogFormatter())
            ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.8)))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=110)


def is_loss(key: str) -> bool:
    """Terms of a player such as G/adv; totals and the inner numbers of controllers are left out."""
    return key[:2] in ("G/", "D/") and not key.endswith(("/loss", "_sign"))


def line(ax: Any, points: list[tuple[float, float, float]], name: str, colour: str, with_best: bool) -> None:
    """The mean, a band of one standard deviation, and the best value as a dashed line (Figures 3 and 5)."""
    if not points:
        return
    x, mean, deviation = (list(part) for part in zip(*points))
    if len(x) >= SMOOTH_FROM:
        ax.plot(x, mean, color=colour, linewidth=0.5, alpha=0.12)
        mean, deviation = smoothed(mean), smoothed(deviation)
    ax.plot(x, mean, color=colour, label=name, linewidth=1.5, marker="o" if len(x) < 12 else None, markersize=3)
    if any(deviation):
        low, high = ([m + sign * d for m, d in zip(mean, deviation)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    if with_best and len(x) > 1:
        ax.axhline(min(mean), color=colour, linewidth=0.8, linestyle="--", alpha=0.6)


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of the thirtieth of the curve around each point, of half of it at the ends."""
    reach, total = len(values) // 60, len(values)
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(i - reach, 0), min(i + reach + 1, total)) for i in range(total)]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def count(images: float) -> str:
    for unit, size in (("Mi", 1e6), ("ki", 1e3)):
        if images >= size:
            return f"{images / size:g}{unit}"
    return f"{images:g}"


def quadrants(found: dict[str, Any], name: str, file: Path) -> None:
    """Figure 6 and 9: worst L_SD above, best below; lowest D to the left, highest to the right."""
    figure = new_figure(14, 4.6)
    axes = figure.subplots(2, 8)
    for row, part in zip(axes, ("worst", "best")):
        for ax, image, logit, distance in zip(row, *(found[part][key] for key in ("images", "logits", "distances"))):
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[], xlabel=f"D {logit:.3g}\nL_SD {distance:.3g}")
        row[0].set_ylabel(f"{part} L_SD", fontsize=12)
    axes[0][1].set_title("min D(x)", loc="right")
    axes[0][5].set_title("max D(x)", loc="right")
    figure.suptitle(f"{name} at {count(found['seen_img'])} images: {found['num_latents']} latents")
    figure.savefig(file, dpi=110)
