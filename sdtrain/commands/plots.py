"""Pictures of `sdtrain report`, with matplotlib."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrain.commands.results import METRICS, RISING, Written, better, called, grouped, protocol_of, series
from sdtrain.commands.tables import Table, one_line, shortened
from sdtrain.files import write_bytes

COLUMNS = 3
PANELS = 60
SMOOTH_FROM = 100  # from so many points on a running mean is drawn, with the points faintly behind it
FEW = 6  # so many lines have their best value written out
STYLES = {"teacher": ":", "supervised": "--"}  # by the beginning of a stage's name; the student's last stage is solid
LEGEND = 45  # characters of a name
Panel = tuple[str, str]  # split ("" for losses), name
Points = list[tuple[int, float, float]]  # images, mean, standard deviation
Line = tuple[str, str, Points]  # group, stage, points


def new_figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # a matplotlibrc in the working folder could hand every text to LaTeX
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, file: Path) -> None:
    """Write a PNG or SVG whole; a link in its place is replaced, not followed. Raises OSError."""
    data, form = io.BytesIO(), file.suffix.removeprefix(".")
    figure.savefig(data, dpi=110, format=form, metadata={"Date": None} if form == "svg" else None)
    write_bytes(file, data.getbuffer())


def sheet(table: Table) -> Any:
    """A table as a picture."""
    cells = [[one_line(cell) for cell in line] for line in (table.head, *table.rows)]
    widths = [max(len(line[i]) for line in cells) + 2 for i in range(len(cells[0]))]
    wide = max(0.085 * sum(widths), 4.0)
    said = textwrap.wrap(one_line(table.caption), int(12 * wide))
    figure = new_figure(wide, 0.26 * (len(cells) + len(said)) + 0.2)
    ax = figure.subplots()
    ax.axis("off")
    ax.set_title("\n".join(said), fontsize=9, loc="left", parse_math=False)
    shares = [width / sum(widths) for width in widths]
    made = ax.table(cells, colWidths=shares, bbox=(0, 0, 1, 1), edges="horizontal", cellLoc="left")
    made.auto_set_font_size(False)
    made.set_fontsize(8)
    for (row, column), cell in made.get_celld().items():
        text = cell.get_text()
        text.set_parse_math(False)
        text.set(ha="left" if column < table.words else "right", weight="bold" if row == 0 else "normal")
    return figure


def curves(runs: Sequence[Written], file: Path, smooth: int | None, notes: list[str]) -> bool:
    """One panel a metric (logarithmic where a distance) and a loss, one line a stage of a group; False: no points."""
    groups = grouped(runs)
    panels = panels_of(groups)
    if len(panels) > PANELS:
        notes.append(f"of {len(panels)} losses and metrics the first {PANELS} are drawn")
    panels = dict(itertools.islice(panels.items(), PANELS))
    if not panels:
        return False
    drawn = {group for lines in panels.values() for group, _, _ in lines}
    groups = {name: members for name, members in groups.items() if name in drawn}  # no name without a line
    colours = dict(zip(groups, colours_of(len(groups))))
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    abreast = names_abreast(list(groups), 4.6 * columns)
    figure = new_figure(4.6 * columns + 0.6, 3.1 * rows + 0.7 + 0.2 * math.ceil(len(groups) / abreast))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    measured = [row for runs in groups.values() for run in runs for row in run.rows]
    for ax, (panel, lines) in zip(axes, panels.items()):
        of_panel = (row for row in measured if row.split == panel[0] and panel[1] in row.values)
        dress(ax, panel, lines, protocol_of(of_panel))
        for group, stage, points in lines:
            draw(ax, points, colours[group], style_of(stage), smooth, min(0.25, 2 / len(lines)))
        if panel[0]:
            mark_best(ax, panel[1], [(points, colours[group], style_of(stage)) for group, stage, points in lines])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    legend(figure, colours, list(dict.fromkeys(stage for lines in panels.values() for _, stage, _ in lines)), abreast)
    save(figure, file)
    return True


def panels_of(groups: dict[str, list[Written]]) -> dict[Panel, list[Line]]:
    """The lines of each panel: metrics on the validation images first, then on others where they make a curve."""
    keys = dict.fromkeys(key for members in groups.values() for run in members for key in run.curves)
    splits = sorted({split for split, _, _ in keys if split}, key=lambda split: (split != "val", split))
    wanted = [(split, key) for split in splits for key in METRICS]
    wanted += dict.fromkeys((split, key) for split, key, _ in keys if not split and is_loss(key))
    stages: dict[Panel, list[str]] = {}
    for split, key, stage in keys:
        stages.setdefault((split, key), []).append(stage)
    found = {}
    for panel in wanted:
        made = [(g, s, series(runs, *panel, s)) for s in stages.get(panel, ()) for g, runs in groups.items()]
        lines = [line for line in made if line[2]]
        if lines and (panel[0] in ("", "val") or any(len(points) > 1 for _, _, points in lines)):
            found[panel] = lines
    return found


def is_loss(key: str) -> bool:
    """Terms of a player such as G/adv; totals and the inner numbers of controllers are left out."""
    return key[:2] in ("G/", "D/") and not key.endswith(("/loss", "_sign"))


def colours_of(number: int) -> list[Any]:
    """As many colours as there are groups, far apart."""
    if number <= 10:
        return [f"C{i}" for i in range(number)]
    import matplotlib

    wheel = matplotlib.colormaps["turbo"]
    return [wheel(0.04 + 0.92 * i / (number - 1)) for i in range(number)]


def style_of(stage: str) -> Any:
    return next((style for start, style in STYLES.items() if stage.startswith(start)), "-")


def dress(ax: Any, panel: Panel, lines: list[Line], protocol: Mapping[str, Any]) -> None:
    """Titles, axes with their units, and a grid."""
    from matplotlib.ticker import MaxNLocator

    split, key = panel
    values = [mean for _, _, points in lines for _, mean, _ in points]
    logarithmic = bool(split) and key not in (*RISING, "kid", "lpips") and min(values) > 0
    name = called(key, protocol)
    kind = f"{name}, {'higher' if key in RISING else 'lower'} is better" if split else "mean over a tick"
    title = f"{name.split(' [')[0]} ({split})" if split else key
    ax.set_title(shortened([title], LEGEND)[title], parse_math=False)
    ax.set(xlabel="images seen", yscale="log" if logarithmic else "linear")
    ax.set_ylabel(kind, fontsize=8)
    ax.grid(alpha=0.3, linewidth=0.6, which="both" if logarithmic else "major")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(lambda x, _: count(x))
    if logarithmic:
        ax.yaxis.set_major_formatter(plain_numbers())
        ax.yaxis.set_minor_formatter(plain_numbers(minor_thresholds=(1.5, 0.8)))


def plain_numbers(**options: Any) -> Any:
    """What labels a logarithmic axis: matplotlib's choice of numbers, written 0.5 and not 5e-01."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return super().__call__(x, pos) and f"{x:g}"

    return Plain(**options)


def draw(ax: Any, points: Points, colour: Any, style: Any, smooth: int | None, faint: float) -> None:
    """The mean and a band of one standard deviation; a running mean stands over the faint values it is made of."""
    x, mean, deviation = (list(part) for part in zip(*points))
    window = smooth if smooth is not None else len(x) // 30 if len(x) >= SMOOTH_FROM else 0
    if window > 1:
        ax.plot(x, mean, color=colour, linewidth=0.6, alpha=faint, zorder=1, antialiased=False)
        mean, deviation = smoothed(mean, window), smoothed(deviation, window) if any(deviation) else deviation
    marker = "o" if len(x) < 12 else None
    ax.plot(x, mean, color=colour, linewidth=1.5, linestyle=style, marker=marker, markersize=3)
    if any(deviation):
        low, high = ([m + sign * d for m, d in zip(mean, deviation)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def best_of(key: str, points: Points) -> tuple[int, float]:
    """(images, value) of the best mean: of the values themselves, never of the running mean."""
    images, value, _ = better(key)(points, key=lambda point: point[1])
    return images, value


def mark_best(ax: Any, key: str, lines: Sequence[tuple[Points, Any, Any]]) -> None:
    """A star at the best of each line, a dotted line at its height (Figures 3 and 5); of a few, the numbers."""
    from matplotlib.lines import Line2D

    found = [(*best_of(key, points), colour, style) for points, colour, style in lines]
    star: dict[str, Any] = {"marker": "*", "markersize": 9, "markeredgecolor": "white", "markeredgewidth": 0.5}
    for images, value, colour, _ in found:
        ax.plot([images], [value], color=colour, zorder=5, **star)
    if len(found) <= FEW:
        for _, value, colour, _ in found:
            ax.axhline(value, color=colour, linewidth=0.8, linestyle=(0, (1, 3)), alpha=0.6)
        handles = [Line2D([], [], color=colour, linestyle=style, **star) for _, _, colour, style in found]
        numbers = [f"{value:.4g}" for _, value, _, _ in found]
        ax.legend(handles, numbers, title="best", loc="best", fontsize=8, handlelength=3)


def names_abreast(names: Sequence[str], inches: float) -> int:
    """How many names of the legend fit beside each other."""
    longest = max(len(name) for name in shortened(names, LEGEND).values())
    return max(int(inches / (0.75 + 0.09 * max(longest, 8))), 1)


def legend(figure: Any, colours: dict[str, Any], stages: list[str], abreast: int) -> None:
    """A colour for each group of runs; where there are several stages also what their strokes mean."""
    from matplotlib.lines import Line2D

    names = shortened(list(colours), LEGEND)
    handles = [Line2D([], [], color=colour) for colour in colours.values()]
    labels = [names[name] for name in colours]
    strokes = {style_of(stage): stage for stage in reversed(stages)}
    if len(strokes) > 1:
        texts = {style: ", ".join(s for s in stages if style_of(s) == style and s) or "one stage" for style in strokes}
        handles += [Line2D([], [], color="grey", linestyle=style) for style in strokes]
        labels += [shortened([texts[style]], LEGEND)[texts[style]] for style in strokes]
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": abreast, "frameon": False, "fontsize": 9}
    made = figure.legend(handles, [""] * len(labels), **place)
    for text, label in zip(made.get_texts(), labels):
        text.set_parse_math(False)
        text.set_text(label)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` values around each, of fewer at the ends."""
    reach, total = window // 2, len(values)
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(i - reach, 0), min(i + reach + 1, total)) for i in range(total)]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def count(images: float) -> str:
    for unit, size in (("Mi", 1e6), ("ki", 1e3)):
        if images >= size:
            return f"{images / size:g}{unit}"
    return f"{images:g}"


def quadrants(found: dict[str, Any], name: str, values: bool = True) -> Any:
    """Figure 9, without `values` Figure 6: worst L_SD above, best below; lowest D to the left, highest to the right."""
    figure = new_figure(14, 4.6)
    axes = figure.subplots(2, 9, width_ratios=[1] * 4 + [0.1] + [1] * 4)
    for ax in axes[:, 4]:  # a gap between the low and the high
        ax.set_visible(False)
    axes = axes[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    for row, part in zip(axes, ("worst", "best")):
        for ax, image, logit, distance in zip(row, *(found[part][key] for key in ("images", "logits", "distances"))):
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[], xlabel=f"D {logit:.3g}\nL_SD {distance:.3g}" if values else "")
        row[0].set_ylabel(f"{part} L_SD", fontsize=12)
    axes[0][1].set_title("min D(x)", loc="right")
    axes[0][5].set_title("max D(x)", loc="right")
    text = figure.suptitle("")
    text.set_parse_math(False)
    how = f"{found['num_latents']} latents, L_SD is {found['distance']}"
    text.set_text(f"{shortened([name], 80)[name]} at {count(found['seen_img'])} images: {how}")
    return figure
