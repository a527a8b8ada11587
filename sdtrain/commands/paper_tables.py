"""A table of a paper filled with what runs have measured: rows are means over seeds, beside the printed values."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.commands.papers import LAST, PAPERS, Paper, Words, wanted
from sdtrain.commands.results import Row, Written, chosen, comparable, heading, printed
from sdtrain.commands.source import config_of
from sdtrain.commands.tables import Table
from sdtrain.errors import ConfigError, RunError
from sdtrain.metrics.protocol import conflicts, fingerprint

RESULTS = ("G_ema", "student")


@dataclass(frozen=True)
class Measured:
    """One evaluation of one run, for one column of one row."""

    words: Words
    column: str
    run: Written
    seed: int
    row: Row

    @property
    def key(self) -> str:
        return self.column.split("/")[1]

    @property
    def value(self) -> float:
        return self.row.values[self.key]


def paper_tables(names: Sequence[str], runs: Sequence[Written], notes: list[str]) -> list[Table]:
    """The tables of these names, each followed by how its numbers were made; notes say what was left out.

    Raises ConfigError for a table that there is not, RunError where no run belongs to any.
    """
    papers = [PAPERS[key] for name in names for key in wanted(name)]
    configured = [(run, config) for run in runs if (config := configuration(run, notes)) is not None]
    found = []
    for paper in papers:
        numbers = [one for run, config in configured for one in measured(paper, run, config, notes)]
        if numbers:
            kept = alike(paper, numbers, notes)
            found += [table(paper, kept), origins(kept)]
            uneven(paper, kept, notes)
    if not found:
        said = f"none of these runs belongs to {', '.join(names)}, or none is finished and evaluated"
        raise RunError("; ".join([said, *notes]))
    return found


def configuration(run: Written, notes: list[str]) -> Any:
    """The configuration of a run that has ended, else None and a note."""
    if run.unfinished:
        notes.append(f"{run.name} is left out: it is unfinished ({run.seen_img:,} of {run.total_img:,} images)")
        return None
    try:
        config = config_of(run.path) if run.path.is_dir() else None
    except ConfigError as error:
        notes.append(f"{run.name} is left out: {error}")
        return None
    if config is None:
        notes.append(f"{run.name} is left out: without its config.yaml nobody knows which row it is")
    return config


def measured(paper: Paper, run: Written, config: Any, notes: list[str]) -> Iterator[Measured]:
    """What a run has for this table."""
    words = paper.row_of(config)
    if words is None:
        return
    for column in paper.columns:
        split, key = column.split("/")
        rows = [row for row in chosen(run, split) if key in row.values]
        for row in rows:
            if row.network in RESULTS and row.stage in LAST:
                yield Measured(words, column, run, config.seed, row)
            elif row.network == "teacher" and paper.teacher:
                yield Measured(paper.teacher, column, run, config.seed, row)
        if not rows:
            notes.append(f"{run.name} has no {key} on {split}; evaluate it with this metric")


def alike(paper: Paper, numbers: list[Measured], notes: list[str]) -> list[Measured]:
    """Those of each column that were measured as most of them; a number that was made otherwise is not in the table."""
    kept = []
    for place in dict.fromkeys((one.column, one.words[: paper.apart]) for one in numbers):
        column = [one for one in numbers if (one.column, one.words[: paper.apart]) == place]
        parts = sorted(comparable(column, lambda one: one.row.protocol), key=len, reverse=True)
        kept += parts[0]
        for part in parts[1:]:
            why = conflicts(parts[0][0].row.protocol, part[0].row.protocol)
            notes.append(f"{place[0]} of {names_of(part)} is left out, measured otherwise: {'; '.join(why[:2])}")
    return kept


def names_of(numbers: Sequence[Measured]) -> str:
    return ", ".join(dict.fromkeys(one.run.name for one in numbers))


def uneven(paper: Paper, numbers: Sequence[Measured], notes: list[str]) -> None:
    """Say which rows lack seeds that others have."""
    seeds = {words: {one.seed for one in numbers if one.words == words} for words in {one.words for one in numbers}}
    seeds.pop(paper.teacher or (), None)
    every = set().union(*seeds.values())
    for words, found in sorted(seeds.items()):
        if missing := sorted(every - found):
            notes.append(f"{' '.join(words)}: seeds {', '.join(map(str, missing))} are missing, which other rows have")


def table(paper: Paper, numbers: Sequence[Measured]) -> Table:
    """Ours and the printed values side by side, rows as in the paper and after them those that it has not."""
    head = [*paper.words]
    for column in paper.columns:
        split, key = column.split("/")
        head += [heading(key, f" ({split})"), "published"]
    lines = []
    for words in dict.fromkeys([*paper.published, *(one.words for one in numbers)]):
        line = [*words]
        for column in paper.columns:
            mine = [one for one in numbers if (one.words, one.column) == (words, column)]
            line += [shown(mine), paper.published.get(words, {}).get(column, "-")]
        lines.append(line)
    said = f"{paper.title} Published values as printed; ours by the protocols below, +- over seeds (n - 1)."
    return Table(said, head, lines, len(paper.words))


def shown(numbers: Sequence[Measured]) -> str:
    """The mean over seeds; of one number the spread that it was measured with. A shared teacher counts once."""
    values = list(dict.fromkeys(one.value for one in numbers))
    if not values:
        return "-"
    key = numbers[0].key
    if len(values) == 1:
        return printed(key, values[0], numbers[0].row.values.get(f"{key}_std"))
    return f"{printed(key, statistics.fmean(values), statistics.stdev(values))} ({len(values)})"


def origins(numbers: Sequence[Measured]) -> Table:
    """Which run, seed and evaluation each number is of, and a hash of how it was measured."""
    head = ["Row", "Run", "split", "protocol", "seed", "images seen", "images measured"]
    lines = dict.fromkeys(
        (
            " ".join(one.words),
            one.run.name,
            one.column.split("/")[0],
            fingerprint(one.row.protocol),
            str(one.seed),
            "-" if one.row.seen_img is None else f"{one.row.seen_img:,}",
            str(one.row.protocol.get("num_images", one.row.protocol.get("num_fake", "?"))),
        )
        for one in numbers
    )
    return Table("How each number was made.", head, [list(line) for line in lines], 4)
