"""Figures of the papers from what runs have written: FID over images (SD-GAN 3 to 5). Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.commands import plots
from sdtrain.commands.material import Configured, Material, missing_seeds
from sdtrain.commands.pages import Figure
from sdtrain.commands.papers import setting, variant
from sdtrain.commands.results import Written, called, heading, printed, protocol_of, series
from sdtrain.commands.tables import Table

DISTILLED = ("", "+SD_L1", "+SD")  # what Figure 3 compares; the others are ablations
COLOURS = {"": "C0", "+SD_L1": "C1", "+SD": "C2", "+SD without T": "C3", "+SD_L2": "C4", "+SD_MS-SSIM": "C5"}
# (data, model) -> share of the baseline's images after which +SD had reached its FID, as printed beside Figure 3
SHARE_PRINTED = {("FFHQ at 256 px", "ProjectedGAN"): "~32%", ("LSUN Church at 256 px", "ProjectedGAN"): "~39%"}


@dataclass(frozen=True)
class Curve:
    """The FID of one variant, of several seeds their mean."""

    data: str
    model: str
    variant: str
    name: str
    """In the legend: the variant, and the run where seeds cannot be told apart."""
    runs: tuple[Written, ...]
    points: plots.Points

    @property
    def place(self) -> tuple[str, str]:
        return self.data, self.model

    @property
    def best(self) -> tuple[int, float]:
        return plots.best_of("fid", self.points)


def figure3(material: Material) -> list[Table | Figure]:
    found = [item for item in trained(material, False) if variant(item[1].sd) in DISTILLED]
    return drawn(material, "Figure 3", "during training", found)


def figure4(material: Material) -> list[Table | Figure]:
    return drawn(material, "Figure 4", "during fine-tuning", trained(material, True))


def figure5(material: Material) -> list[Table | Figure]:
    """Only where an ablated variant was trained."""
    found = trained(material, False)
    ablated = {place(config) for _, config in found if variant(config.sd) not in DISTILLED}
    chosen = [item for item in found if place(item[1]) in ablated]
    return drawn(material, "Figure 5", "of SD-GAN and its ablated variants", chosen)


def trained(material: Material, fine_tuned: bool) -> list[Configured]:
    """Runs of SD-GAN that began from weights, or from scratch."""
    return [(run, c) for run, c in material.of("sdgan") if is_fine_tuned(c) == fine_tuned]


def is_fine_tuned(config: Any) -> bool:
    return any((config.init.source, config.init.G, config.init.G_ema))


def place(config: Any) -> tuple[str, str]:
    """(data set with its side, model)."""
    data, model = setting(config)
    return f"{data} at {config.data.resolution} px" if config.data.resolution else data, model


def drawn(material: Material, number: str, what: str, found: Sequence[Configured]) -> list[Table | Figure]:
    """The curves in panels of their data and models, below a table of the best values. [] without an evaluation."""
    curves = []
    for here in dict.fromkeys(place(config) for _, config in found):
        alike = [item for item in found if place(item[1]) == here]
        curves += curves_of(material, here, material.alike(f"{number}, FID", alike, "val", "fid"))
    if not curves:
        return []
    said = (
        f"{number} of SD-GAN: FID {what} (log scale); dashed: the best of each. A band is one standard deviation over "
        "seeds (n - 1)."
    )
    return [best_values(number, curves), Figure(said, lambda: panels(curves), all_points(curves))]


def curves_of(material: Material, here: tuple[str, str], found: Sequence[Configured]) -> list[Curve]:
    """A curve for each variant; each run has its own where two have one seed and are no repetition of each other."""
    curves, seeds = [], {}
    for name in dict.fromkeys(variant(config.sd) for _, config in found):
        members = [(run, config) for run, config in found if variant(config.sd) == name]
        label = name.removeprefix("+") or "baseline"
        parts: dict[str, list[Written]] = {label: [run for run, _ in members]}
        seeds[f"{' '.join(here)} {label}"] = {config.seed for _, config in members}
        if len({config.seed for _, config in members}) < len(members):
            names = ", ".join(run.name for run, _ in members)
            material.notes.append(f"{names} are all {label} and share seeds: each has a curve of its own")
            parts = {f"{label} ({run.name})": [run] for run, _ in members}
        for title, runs in parts.items():
            if points := [point for point in series(runs, "val", "fid", "") if point[1] > 0]:
                curves.append(Curve(*here, name, title, tuple(runs), points))
    missing_seeds(seeds, material.notes)
    return sorted(curves, key=lambda curve: [*COLOURS, curve.variant].index(curve.variant))


def panels(curves: Sequence[Curve]) -> Any:
    """A row for each data set, a column for each model."""
    data, models = (list(dict.fromkeys(one.place[i] for one in curves)) for i in (0, 1))
    figure = plots.new_figure(4.4 * len(models) + 0.6, 3.2 * len(data) + 0.8)
    axes = figure.subplots(len(data), len(models), squeeze=False)
    colours = colours_of(curves)
    for row, images in zip(axes, data):
        for ax, model in zip(row, models):
            here = [one for one in curves if one.place == (images, model)]
            ax.set_visible(bool(here))
            if not here:
                continue
            plots.dress(ax, ("val", "fid"), [(one.name, "", one.points) for one in here], protocol_of_curves(here))
            ax.set_title(f"{model}, {images}", fontsize=10, parse_math=False)
            for one in here:
                plots.draw(ax, one.points, colours[one.name], "-", 0, 0.2)
                ax.axhline(one.best[1], color=colours[one.name], linewidth=0.9, linestyle="--", alpha=0.7)
    plots.legend(figure, colours, [], plots.names_abreast(list(colours), 4.4 * len(models)))
    return figure


def colours_of(curves: Sequence[Curve]) -> dict[str, Any]:
    """A variant has its colour in every figure; runs that have curves of their own have others."""
    names = dict.fromkeys(one.name for one in curves)
    known = {one.name: COLOURS[one.variant] for one in curves if one.variant in COLOURS and "(" not in one.name}
    others = dict(zip((name for name in names if name not in known), plots.colours_of(len(names))[::-1]))
    return {name: known.get(name) or others[name] for name in names}


def best_values(number: str, curves: Sequence[Curve]) -> Table:
    """Best FID of each curve, and how soon it reaches the baseline's best."""
    lines = []
    for one in curves:
        images, value = one.best
        base = next((other for other in curves if other.place == one.place and not other.variant), None)
        share, printed_share = "-", "-"
        if base and one.variant:
            reached = next((x for x, mean, _ in one.points if mean <= base.best[1]), None)
            share = "never" if reached is None else f"{reached / base.best[0]:.0%}"
        if one.variant == "+SD" and number == "Figure 3":
            printed_share = SHARE_PRINTED.get(one.place, "-")
        seeds = str(len(one.runs))
        lines.append([*one.place, one.name, printed("fid", value), f"{images:,}", seeds, share, printed_share])
    head = [
        "Data",
        "Model",
        "Variant",
        f"best {heading('fid', protocol_of_curves(curves))}",
        "at images",
        "runs",
        "of baseline's images",
        "published",
    ]
    said = (
        f"{number} of SD-GAN: the best FID of each curve, and after which share of the baseline's images it is as good "
    )
    return Table(said + "as the baseline's best.", head, lines, 3)


def all_points(curves: Sequence[Curve]) -> Table:
    lines = [
        [*one.place, one.name, str(images), f"{mean:.6g}", f"{deviation:.6g}", str(len(one.runs))]
        for one in curves
        for images, mean, deviation in one.points
    ]
    name = called("fid", protocol_of_curves(curves))
    head = ["Data", "Model", "Variant", "images seen", name, "standard deviation", "runs"]
    return Table(f"{name} over images seen.", head, lines, 3)


def protocol_of_curves(curves: Iterable[Curve]) -> dict[str, Any]:
    """How their values were measured, which is one way for all."""
    rows = (row for one in curves for run in one.runs for row in run.rows)
    return protocol_of(row for row in rows if row.split == "val" and "fid" in row.values)
