"""A table of a paper filled with what runs have measured: rows are means over seeds, beside the printed values."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.commands.material import Material, missing_seeds
from sdtrain.commands.papers import LAST, Paper, Words
from sdtrain.commands.results import Row, Written, chosen, comparable, heading, printed
from sdtrain.commands.tables import Table
from sdtrain.metrics.protocol import conflicts, fingerprint, whole

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


def paper_table(paper: Paper, material: Material) -> list[Table]:
    """The table, and below it how its numbers were made; notes say what was left out. [] where no run belongs to it."""
    notes = material.notes
    lacking: dict[str, list[str]] = defaultdict(list)
    numbers = [one for run, config in material.configured for one in measured(paper, run, config, lacking)]
    for names in dict.fromkeys(map(tuple, lacking.values())):
        columns = [column for column in lacking if tuple(lacking[column]) == names]
        notes.append(f"not measured in {', '.join(names)}: {', '.join(columns)}; evaluate with these metrics")
    if not numbers:
        return []
    kept = alike(paper, numbers, notes)
    repeated(paper, kept, notes)
    seeds = {words: {one.seed for one in kept if one.words == words} for words in {one.words for one in kept}}
    missing_seeds({" ".join(words): found for words, found in seeds.items() if words != paper.teacher}, notes)
    return [table(paper, kept), origins(kept)]


def measured(paper: Paper, run: Written, config: Any, lacking: dict[str, list[str]]) -> Iterator[Measured]:
    """What a run has for this table; `lacking` takes its name for each column that it has not."""
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
            lacking[column].append(run.name)


def alike(paper: Paper, numbers: list[Measured], notes: list[str]) -> list[Measured]:
    """Those of each column that were measured as most of them; a number that was made otherwise is not in the table."""
    kept = []
    for place in dict.fromkeys((one.column, one.words[: paper.apart]) for one in numbers):
        column = [one for one in numbers if (one.column, one.words[: paper.apart]) == place]
        parts = sorted(comparable(column, lambda one: one.row.protocol), key=len, reverse=True)
        kept += parts[0]
        for part in parts[1:]:
            why = conflicts(*(whole(one.row.protocol for one in ways) for ways in (parts[0], part)))
            notes.append(f"{place[0]} of {names_of(part)} is left out, measured otherwise: {'; '.join(why[:2])}")
    return kept


def repeated(paper: Paper, numbers: Sequence[Measured], notes: list[str]) -> None:
    """Say which rows are means over runs that share a seed: they may differ in more than chance."""
    for words in dict.fromkeys(one.words for one in numbers):
        runs = {one.run.name: one.seed for one in numbers if one.words == words}
        if words != paper.teacher and len(set(runs.values())) < len(runs):
            notes.append(f"{' '.join(words)} is a mean over {', '.join(runs)}, of which some share a seed")


def names_of(numbers: Sequence[Measured]) -> str:
    return ", ".join(dict.fromkeys(one.run.name for one in numbers))


def table(paper: Paper, numbers: Sequence[Measured]) -> Table:
    """Ours and the printed values side by side, rows as in the paper and after them those that it has not."""
    head = [*paper.words]
    for column in paper.columns:
        split, key = column.split("/")
        protocol = next((one.row.protocol for one in numbers if one.column == column), {})
        head += [heading(key, protocol, f" ({split})"), "published"]
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
