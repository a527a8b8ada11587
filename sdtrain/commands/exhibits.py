"""The tables and figures of the two papers by name, and what fills them. Free of torch until networks are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from sdtrain.commands import costs, d_outputs, figures, speed_table
from sdtrain.commands.material import Material
from sdtrain.commands.pages import Figure, Part
from sdtrain.commands.paper_tables import paper_table
from sdtrain.commands.papers import PAPERS
from sdtrain.commands.tables import Table, one_line
from sdtrain.errors import ConfigError, RunError, UserError

ALL = "all"


@dataclass(frozen=True)
class Exhibit:
    """One table or figure of a paper."""

    title: str
    make: Callable[[Material], Iterable[Table | Figure]]
    """Nothing where no run belongs to it; raises a UserError that says what else is missing."""


def from_weights(name: str) -> Callable[[Material], Iterable[Table | Figure]]:
    """A function of `evolution.py`, for whose runs it is worth to load torch."""

    def make(material: Material) -> Iterable[Table | Figure]:
        if not material.saved("sdgan"):
            return []
        from sdtrain.commands import evolution

        return getattr(evolution, name)(material)

    return make


def sdakd_figure4(material: Material) -> Iterable[Table | Figure]:
    if not material.saved("sdakd"):
        return []
    from sdtrain.commands import strip_sheet

    return strip_sheet.figure4(material)


EXHIBITS = {
    "sdgan-table1": Exhibit("Table 1 of SD-GAN: final metrics", partial(paper_table, PAPERS["sdgan-table1"])),
    "sdgan-table2": Exhibit("Table 2 of SD-GAN: time and memory", costs.table2),
    "sdgan-table3": Exhibit("Table 3 of SD-GAN: variation between weights", from_weights("table3")),
    "sdgan-fig3": Exhibit("Figure 3 of SD-GAN: FID during training", figures.figure3),
    "sdgan-fig4": Exhibit("Figure 4 of SD-GAN: FID during fine-tuning", figures.figure4),
    "sdgan-fig5": Exhibit("Figure 5 of SD-GAN: ablated variants", figures.figure5),
    "sdgan-fig6": Exhibit("Figure 6 of SD-GAN: interplay of the objectives", from_weights("figure6")),
    "sdgan-fig7": Exhibit("Figure 7 of SD-GAN: fixed latents along training", from_weights("figure7")),
    "sdgan-fig9": Exhibit("Figure 9 of SD-GAN: interplay with values", from_weights("figure9")),
    "sdgan-fig10": Exhibit("Figure 10 of SD-GAN: fixed latents of StyleGAN2-ADA", from_weights("figure10")),
    "sdgan-fig11": Exhibit("Figure 11 of SD-GAN: fixed latents of other models", from_weights("figure11")),
    "sdgan-fig12": Exhibit("Figure 12 of SD-GAN: the same latents in two runs", from_weights("figure12")),
    "sdakd-table1": Exhibit("Table 1 of SDAKD: GCFSR", partial(paper_table, PAPERS["sdakd-table1"])),
    "sdakd-table2": Exhibit("Table 2 of SDAKD: Real-ESRGAN", partial(paper_table, PAPERS["sdakd-table2"])),
    "sdakd-table3": Exhibit("Table 3 of SDAKD: speed-up by width", speed_table.table3),
    "sdakd-table4": Exhibit("Table 4 of SDAKD: ablations", partial(paper_table, PAPERS["sdakd-table4"])),
    "sdakd-fig2": Exhibit("Figure 2 of SDAKD: outputs of D under DCD", d_outputs.figure2),
    "sdakd-fig3": Exhibit("Figure 3 of SDAKD: outputs of either discriminator", d_outputs.figure3),
    "sdakd-fig4": Exhibit("Figure 4 of SDAKD: students of several widths", sdakd_figure4),
}


def wanted(name: str) -> list[str]:
    """What a name stands for: sdakd-table1, table1 for both papers, or all. Raises ConfigError for one there is not."""
    found = [key for key in EXHIBITS if name in (key, key.split("-")[1], ALL)]
    if not found:
        raise ConfigError(f"there is no table or figure {name!r}: use {', '.join(EXHIBITS)}, table1 for both, or all")
    return found


def is_exhibit(name: str) -> bool:
    return name == ALL or any(name in (key, key.split("-")[1]) for key in EXHIBITS)


def fill(names: Sequence[str], material: Material) -> list[Part]:
    """Everything of these names that the runs can fill; of what they cannot the notes say why.

    Raises RunError where they can fill nothing.
    """
    keys = list(dict.fromkeys(key for name in names for key in wanted(name)))
    parts, missing, empty = [], [], []
    for key in keys:
        try:
            blocks = list(EXHIBITS[key].make(material))
        except UserError as problem:
            missing.append(f"{key}: {problem}")
            continue
        if blocks:
            parts.append(Part(key, EXHIBITS[key].title, blocks))
        else:
            empty.append(key)
    if empty:
        missing.append(f"none of these runs belongs to {', '.join(empty)}, or none is finished and evaluated")
    material.notes[:] = dict.fromkeys([*missing, *material.notes])
    if not parts:
        raise RunError("; ".join(map(one_line, material.notes)))  # names of runs may hold line ends
    return parts
