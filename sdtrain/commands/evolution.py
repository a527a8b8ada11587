"""What the weights of SD-GAN runs show, for named tables and figures: Table 3, Figures 6, 7, 9 to 12 of SD-GAN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdtrain.commands import image_sheets, plots, snapshots
from sdtrain.commands.figures import is_fine_tuned, place
from sdtrain.commands.image_sheets import ImageRow
from sdtrain.commands.material import Configured, Material, shares_of
from sdtrain.commands.pages import Figure
from sdtrain.commands.paper_tables import paper_table
from sdtrain.commands.papers import PAPERS, setting, variant
from sdtrain.commands.results import Row, Written
from sdtrain.commands.snapshots import Variation
from sdtrain.commands.source import Source
from sdtrain.commands.tables import Table
from sdtrain.engine.ranks import pick_device
from sdtrain.sampling import to_uint8

Item = TypeVar("Item", bound=tuple[Any, ...])
ROWS = 3  # latents of each run in Figures 10 and 11
SIDE_BY_SIDE, COLUMNS = 12, 4  # images of each run in Figure 12


def table3(material: Material) -> list[Table]:
    """Average variation between weights, measured here; [] where no run has what it takes."""
    found = variations(material)
    if not found:
        return []
    runs, args = [measured(run, v) for run, _, v in found], material.args
    table, origins = paper_table(PAPERS["sdgan-table3"], replace(material, runs=runs))
    how = (
        f" {snapshots.distances(v for _, _, v in found)} between {args.pairs.replace('_', ' ')} weights"
        f" at {args.shares} % of training, {args.latents} latents;"
    )
    return [replace(table, caption=f"{table.caption}{how} of one run +- over latents (n)."), origins]


def measured(run: Written, found: Variation) -> Written:
    """The run with its variation as an evaluation."""
    values = {"variation": found.mean, "variation_std": found.deviation}
    protocol = {**found.protocol, "num_fake": len(found.per_latent)}
    return replace(run, rows=[Row("weights", "G_ema", "", run.seen_img, values, protocol)])


def variations(material: Material) -> list[tuple[Written, Any, Variation]]:
    args, notes = material.args, material.notes

    def variation(run: Written) -> Variation:
        return snapshots.variation(run, shares_of(args.shares), args, notes)

    return material.each(material.of("sdgan"), variation)


# Figures 7, 10 and 11


def figure7(material: Material) -> list[Figure]:
    """One latent of each run, a figure for each model."""
    return figures_of_evolution(material, 1, lambda model: True, "Figure 7")


def figure10(material: Material) -> list[Figure]:
    return figures_of_evolution(material, ROWS, lambda model: model == "StyleGAN2-ADA", "Figure 10")


def figure11(material: Material) -> list[Figure]:
    """As Figure 10, of every other model; the paper shows ProjectedGAN."""
    return figures_of_evolution(material, ROWS, lambda model: model != "StyleGAN2-ADA", "Figure 11")


def figures_of_evolution(material: Material, count: int, wanted: Callable[[str], bool], number: str) -> list[Figure]:
    """A figure for each model and shares: baselines above what is distilled, `count` latents each."""
    found = [item for item in first_seeds(variations(material)) if wanted(setting(item[1])[1])]
    found.sort(key=lambda item: (item[1].sd.alpha > 0, *place(item[1])))
    figures = []
    for model, shares in dict.fromkeys((place(config)[1], v.at_shares) for _, config, v in found):
        here = [item for item in found if (place(item[1])[1], item[2].at_shares) == (model, shares)]
        figures.append(figure_of_evolution(material, here, count, f"{number} of SD-GAN: {model}"))
    return figures


def first_seeds(found: Iterable[Item]) -> list[Item]:
    """Of runs (run, configuration, ...) that differ by seed the one of the smallest."""
    kept: dict[tuple[str, ...], Item] = {}
    for item in sorted(found, key=lambda item: item[1].seed):
        kept.setdefault((*place(item[1]), variant(item[1].sd), str(is_fine_tuned(item[1]))), item)
    return list(kept.values())


def figure_of_evolution(
    material: Material, found: Sequence[tuple[Written, Any, Variation]], count: int, title: str
) -> Figure:
    """Rows of images at shares of training: of each run the latents whose variation is nearest to its mean."""
    rows, lines = [], []
    for run, config, v in found:
        chosen = (v.per_latent - v.mean).abs().argsort(stable=True)[:count].tolist()
        data, model = place(config)
        name = f"{data}, {model}{variant(config.sd)}"
        images = evolving(material, run, v, chosen)
        for latent, sequence in zip(chosen, images):
            rows.append(ImageRow(name, sequence))
            lines.append([run.name, name, str(latent), f"{v.per_latent[latent]:.6f}", f"{v.mean:.6f}", v.at_images])
    columns = "consecutive columns" if material.args.pairs == "consecutive" else "all pairs of columns"
    distance = snapshots.distances(v for _, _, v in found)
    said = f"{title}, images of fixed latents along training. Of each run the latents whose mean {distance} between "
    said += f"{columns} is nearest to the mean over {len(found[0][2].per_latent)} (Table 3)."
    head = ["Run", "Data and model", "latent", "its variation", "mean", "at images"]
    heads = [f"{share:g}%" for share in found[0][2].folders]
    return Figure(said, partial(image_sheets.rows_of_images, rows, heads), Table(said, head, lines, 2))


def evolving(material: Material, run: Written, v: Variation, chosen: Sequence[int]) -> list[Any]:
    """uint8 [shares, R, R, 3] of each of the latents."""
    args = material.args
    device = pick_device(args.device)
    made = []
    for folder in v.folders.values():
        source = Source(folder, device, data=args.data)
        made.append(to_uint8(snapshots.images_of(source, chosen, args.batch)).permute(0, 2, 3, 1))
    return list(torch.stack(made, 1).numpy())


# Figures 6, 9 and 12


def figure6(material: Material) -> list[Figure]:
    return figures_of_interplay(material, "Figure 6", False)


def figure9(material: Material) -> list[Figure]:
    return figures_of_interplay(material, "Figure 9", True)


def figures_of_interplay(material: Material, number: str, values: bool) -> list[Figure]:
    """Extremes of L_SD and D, a figure for each distilled run."""
    distilled = first_seeds((run, config) for run, config in material.of("sdgan") if config.sd.alpha)

    def interplay(run: Written) -> dict[str, Any]:
        return snapshots.interplay(run.path, material.args)

    figures = []
    for run, config, found in material.each(distilled, interplay):
        data, model = place(config)
        said = (
            f"{number} of SD-GAN: {model}{variant(config.sd)}, {data} ({run.name}). Left to right: D(x) rises; above: "
            f"largest L_SD, below: smallest ({found['distance']}).{' Under each image: D(x), L_SD.' * values}"
        )
        points = Table(said, ["L_SD is", "latent", "D(x)", "L_SD"], lines_of(found), 1)
        figures.append(Figure(said, partial(plots.quadrants, found, run.name, values), points))
    return figures


def lines_of(found: dict[str, Any]) -> list[list[str]]:
    each = {part: zip(*(found[part][key] for key in ("indices", "logits", "distances"))) for part in ("worst", "best")}
    return [[part, str(k), f"{d:.6g}", f"{s:.6g}"] for part, items in each.items() for k, d, s in items]


def figure12(material: Material) -> list[Figure]:
    """A baseline, or what stands for it, and each other variant on the same latents: fine-tuned, or from scratch."""
    found = first_seeds(material.of("sdgan"))
    figures = []
    for here in dict.fromkeys((*place(config), is_fine_tuned(config)) for _, config in found):
        alike = [item for item in found if (*place(item[1]), is_fine_tuned(item[1])) == here]
        base, *others = sorted(alike, key=lambda item: item[1].sd.alpha > 0)
        figures += [pair(material, base, other) for other in others]
    return [figure for figure in figures if figure]


def pair(material: Material, base: Configured, other: Configured) -> Figure | None:
    """None where one of the two has no weights, or where they do not draw from the same latents, which is noted."""
    seed, args = base[1].seed, material.args
    data, model = place(base[1])

    def side_by_side(run: Written) -> tuple[ImageRow, Tensor]:
        source = Source(run.path, pick_device(args.device), seed=seed, data=args.data, batch_size=args.batch)
        added = variant(base[1].sd if run is base[0] else other[1].sd)
        chosen = range(SIDE_BY_SIDE)
        return ImageRow(f"{model}{added} ({run.name})", source(chosen)), source.latents(chosen)[0]

    found = [made for _, _, made in material.each([base, other], side_by_side)]
    if len(found) < 2:
        return None
    sheets, latents = zip(*found, strict=True)
    if latents[0].shape != latents[1].shape:
        said = f"{base[0].name} and {other[0].name} draw from unlike latents, and are not shown beside each other"
        material.notes.append(f"Figure 12 of SD-GAN: {said}")
        return None
    how = "fine-tuned" if is_fine_tuned(base[1]) else "trained from scratch"
    said = f"Figure 12 of SD-GAN: {data}, {how}: the same {SIDE_BY_SIDE} latents (seed {seed}) in both runs."
    return Figure(said, partial(image_sheets.side_by_side, sheets, COLUMNS))
