"""Figures 2 and 3 of SDAKD: what discriminators say of the student's images at the end of runs. Free of torch.

Runs write it with their pictures (samples/d_outputs_IMAGES.json, see tasks/restoration.py): P(real) of each image.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.commands import plots
from sdtrain.commands.material import Configured, Material, missing_seeds
from sdtrain.commands.pages import Figure
from sdtrain.commands.papers import BACKBONES, method_of
from sdtrain.commands.results import Written
from sdtrain.commands.tables import Table
from sdtrain.errors import RunError
from sdtrain.files import read_json
from sdtrain.models.width import fraction

BINS = 20
NAME = re.compile(r"d_outputs_([0-9]{1,18})\.json")


@dataclass(frozen=True)
class Outputs:
    """P(real) of the images of one student."""

    run: Written
    seed: int
    place: str
    """Backbone and C of the student."""
    name: str
    """Method and judge."""
    seen_img: int
    probabilities: tuple[float, ...]


def figure2(material: Material) -> list[Table | Figure]:
    """DCD and DCD with modified adversarial training, judged by the teacher's discriminator."""
    return drawn(material, "Figure 2", list(material.of("dcd")), lambda config: (method_of(config) or "DCD", ("D_T",)))


def figure3(material: Material) -> list[Table | Figure]:
    """SDAKD judged by its own discriminator, and by the teacher's (Ablation 3)."""
    whole = [(run, c) for run, c in material.of("sdakd") if "adversarial" in c.stages and "supervised" in c.stages]
    return drawn(material, "Figure 3", [(run, c) for run, c in whole if c.lambda_1 > 0 and not c.sd.alpha], arm)


def arm(config: Any) -> tuple[str, tuple[str, ...]]:
    """Name of a curve, and which of the discriminators it is about."""
    if config.adversary == "student":
        return "SDAKD: student discriminator", ("D_S",)
    return f"Ablation 3: teacher discriminator{', frozen' * (config.teacher_d == 'frozen')}", ("D_T_judge", "D_T")


def drawn(
    material: Material, number: str, found: Sequence[Configured], arm: Callable[[Any], tuple[str, tuple[str, ...]]]
) -> list[Table | Figure]:
    outputs = []
    for run, config in found:
        try:
            outputs.append(outputs_of(run, config, *arm(config)))
        except RunError as problem:
            material.notes.append(f"{number}: {run.name} is left out: {problem}")
    places = dict.fromkeys(one.place for one in outputs)
    kept = [one for here in places for one in even(number, outputs, here, material.notes)]
    if not kept:
        return []
    said = f"{number} of SDAKD: outputs of discriminators on images of the student, at the end of training."
    return [summary(said, kept), Figure(said, lambda: histograms(kept), values(kept))]


def outputs_of(run: Written, config: Any, name: str, judges: Sequence[str]) -> Outputs:
    """Raises RunError for a run that has not written them, or damaged ones."""
    file = newest(run.path / "samples")
    if file is None:
        raise RunError("it has written no outputs of D (samples/d_outputs_*.json; sample_img is 0)")
    try:
        said = read_json(file)
        values = next(said[judge]["probabilities"] for judge in judges if judge in said)
        if not values or not all(type(x) in (int, float) and 0 <= x <= 1 for x in values):
            raise ValueError("no probabilities")
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        raise RunError(f"{file.name} does not say what {' or '.join(judges)} thinks") from None
    kind = config.model.generator.kind
    place = f"{BACKBONES.get(kind, kind)}, C = {fraction(config.student.C)}"
    return Outputs(run, config.seed, place, name, int(NAME.fullmatch(file.name)[1]), tuple(values))  # type: ignore[index]


def newest(folder: Path) -> Path | None:
    found = [(int(name[1]), file) for file in folder.glob("d_outputs_*.json") if (name := NAME.fullmatch(file.name))]
    return max(found)[1] if found else None


def even(number: str, outputs: Sequence[Outputs], here: str, notes: list[str]) -> list[Outputs]:
    """Those of one place on as many images as most; others are no estimate of the same kind, and are noted."""
    alike = [one for one in outputs if one.place == here]
    count = statistics.mode(len(one.probabilities) for one in alike)
    for one in alike:
        if len(one.probabilities) != count:
            said = f"its outputs are of {len(one.probabilities)} images, of most {count} (validation.histogram_images)"
            notes.append(f"{number}: {one.run.name} is left out: {said}")
    kept = [one for one in alike if len(one.probabilities) == count]
    seeds = {f"{number}, {here}, {name}": {one.seed for one in kept if one.name == name} for name in names_of(kept)}
    missing_seeds(seeds, notes)
    return kept


def names_of(outputs: Sequence[Outputs]) -> list[str]:
    return list(dict.fromkeys(one.name for one in outputs))


def histograms(outputs: Sequence[Outputs]) -> Any:
    """A panel for each backbone and C, GCFSR above; each run an outline, those of one method in one colour."""
    places = sorted({one.place for one in outputs}, key=lambda place: (not place.startswith("GCFSR"), place))
    colours = dict(zip(names_of(outputs), plots.colours_of(len(names_of(outputs)))))
    styles = dict(zip(colours, itertools.cycle(("-", (0, (5, 2)), ":"))))  # outlines may lie on each other
    figure = plots.new_figure(6.4, 2.6 * len(places) + 0.4 + 0.25 * len(colours))
    axes = figure.subplots(len(places), 1, sharex=True, squeeze=False)[:, 0]
    edges = [i / BINS for i in range(BINS + 1)]
    for ax, place in zip(axes, places):
        for one in (one for one in outputs if one.place == place):
            weights = [1 / len(one.probabilities)] * len(one.probabilities)
            ax.hist(one.probabilities, edges, weights=weights, color=colours[one.name], alpha=0.25)
            style = {"histtype": "step", "linewidth": 1.5, "linestyle": styles[one.name]}
            ax.hist(one.probabilities, edges, weights=weights, color=colours[one.name], **style)
        ax.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
        ax.set_title(place, fontsize=10, parse_math=False)
        ax.set(xlim=(0, 1), ylabel="share of images")
        ax.grid(alpha=0.3, linewidth=0.6)
    axes[-1].set_xlabel("output of the discriminator, P(real)")
    plots.legend(figure, colours, [], 1)
    return figure


def summary(said: str, outputs: Sequence[Outputs]) -> Table:
    head = ["Student", "Method and judge", "Run", "seed", "images seen", "images", "mean P(real)", "quartiles"]
    lines = []
    for one in outputs:
        p = one.probabilities
        quarters = statistics.quantiles(p, n=4) if len(p) > 1 else [p[0]] * 3
        about = [one.place, one.name, one.run.name, str(one.seed), f"{one.seen_img:,}", str(len(p))]
        lines.append([*about, f"{statistics.fmean(p):.3f}", f"{quarters[0]:.3f}, {quarters[1]:.3f}, {quarters[2]:.3f}"])
    return Table(said, head, lines, 3)


def values(outputs: Sequence[Outputs]) -> Table:
    lines = [[one.place, one.name, one.run.name, f"{p:.6g}"] for one in outputs for p in one.probabilities]
    return Table("P(real) of each image.", ["Student", "Method and judge", "Run", "P(real)"], lines, 3)
