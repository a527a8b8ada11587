"""Arms of a comparison over their seeds: means with intervals, and differences to the first arm, paired by seed.

Free of torch. Intervals are Student's, of 95 %: with few seeds they are wide, and that is what few seeds can say.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence

from sdtrain.commands.material import missing_seeds
from sdtrain.commands.results import METRICS, Row, Written, chosen, comparable, grouped, heading, printed
from sdtrain.commands.tables import Table
from sdtrain.metrics.protocol import conflicts, whole

# quantiles 0.975 and 0.8 of Student's t, by degrees of freedom from 1; beyond them the normal ones
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
T_POWER = (
    *(1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.876, 0.873, 0.870, 0.868, 0.866),
    *(0.865, 0.863, 0.862, 0.861, 0.860, 0.859, 0.858, 0.858, 0.857, 0.856, 0.856, 0.855, 0.855, 0.854, 0.854),
)
NORMAL, NORMAL_POWER = 1.96, 0.842
NO_EFFECT = 0.1  # of a deviation: what it takes 788 seeds to show is not worth their number
SEED = re.compile(r"seed[-_=]?(\d+)", re.IGNORECASE)
HEAD = ["Arm", "Metric", "seeds", "mean", "deviation", "less the first arm", "told apart", "seeds for 80 %"]
READING = (
    "Mean and difference with intervals of 95 % (Student's t), not corrected for their number; differences are paired "
    "by seed with {first}. Seeds for 80 %: how many would show a difference of this size with that chance."
)
Values = dict[int, float]  # of each seed


def tables_of_arms(runs: Sequence[Written], notes: list[str]) -> list[Table]:
    """A table for each split. [] unless two arms or more have two seeds or more each."""
    arms = {name: by_seed(members) for name, members in grouped([run for run in runs if not run.unfinished]).items()}
    arms = {name: members for name, members in arms.items() if len(members) > 1}
    splits = sorted({row.split for members in arms.values() for run in members.values() for row in run.rows})
    return [table for split in splits if (table := table_of_arms(split, arms, notes))] if len(arms) > 1 else []


def by_seed(runs: Sequence[Written]) -> dict[int, Written]:
    return {seed: run for run in runs if (seed := seed_of(run)) is not None}


def seed_of(run: Written) -> int | None:
    """As its name says."""
    found = SEED.search(run.name)
    return int(found[1]) if found else None


def table_of_arms(split: str, arms: dict[str, dict[int, Written]], notes: list[str]) -> Table | None:
    """None where fewer than two arms were measured on the split in one way."""
    rows: dict[str, dict[int, Row]] = {}
    for name, members in arms.items():
        found = {seed: row for seed, run in members.items() if (row := result(run, split))}
        rows |= {name: found} if len(found) > 1 else {}
    every = [(name, row.protocol) for name, found in rows.items() for row in found.values()]
    alike, *others = comparable(every, lambda one: one[1]) or [[]]
    first, way = next(iter(rows), ""), whole(protocol for _, protocol in alike)
    for name, protocol in dict(one for part in others for one in part).items():
        said = "is left out, its seeds are unlike" if name in dict(alike) else f"is not compared with {first}"
        notes.append(f"{name} {said}: {conflicts(way, protocol)[0]}")
        del rows[name]
    measured: dict[str, dict[str, Values]] = {key: {} for key in METRICS}
    columns: dict[str, str] = {}
    for key, arms_of_key in measured.items():
        for name, found in rows.items():
            if all(key in row.values for row in found.values()):
                arms_of_key[name] = {seed: row.values[key] for seed, row in found.items()}
                columns.setdefault(key, heading(key, next(iter(found.values())).protocol))
    table = table_of_values(
        f"Split {split}: arms over seeds, each run by the weights it has chosen.", measured, columns
    )
    if table is not None:
        missing_seeds({f"{split} {name}": set(found) for name, found in rows.items()}, notes)
    return table


def table_of_values(
    said: str, measured: Mapping[str, Mapping[str, Values]], columns: Mapping[str, str] | None = None
) -> Table | None:
    """Measurements of arms, of each those that have it; None unless two arms have two seeds or more of one.

    `columns`: the headings of measurements that have another than their names.
    """
    every = {key: {name: of for name, of in arms.items() if len(of) > 1} for key, arms in measured.items()}
    every = {key: arms for key, arms in every.items() if len(arms) > 1}
    firsts = list(dict.fromkeys(next(iter(arms)) for arms in every.values()))
    lines = [
        line(name, key, (columns or {}).get(key) or heading(key, {}), mine, next(iter(arms.values())))
        for key, arms in every.items()
        for name, mine in arms.items()
    ]
    return Table(f"{said} {READING.format(first=' or '.join(firsts))}", HEAD, lines, 2) if lines else None


def result(run: Written, split: str) -> Row | None:
    """The evaluation of what a run is there for: its last stage, not its teacher."""
    rows = [row for row in chosen(run, split) if row.seen_img is not None and row.network != "teacher"]
    return max(rows, key=lambda row: row.seen_img or 0, default=None)


def line(name: str, key: str, column: str, mine: Values, base: Values) -> list[str]:
    values = list(mine.values())
    about = [name, column, str(len(values)), mean_of(key, values), printed(key, statistics.stdev(values))]
    both = [mine[seed] - base[seed] for seed in mine.keys() & base.keys()]
    if mine is base or len(both) < 2:
        return [*about, "-", "-", "-"]
    difference, spread = statistics.fmean(both), statistics.stdev(both)
    apart = abs(difference) > half_width(both)
    effect = abs(difference) / spread if spread else 0.0
    needed = str(seeds_needed(effect)) if effect > NO_EFFECT else "-"
    return [*about, mean_of(key, both, "+"), "yes" if apart else "no", needed]


def mean_of(key: str, values: Sequence[float], sign: str = "") -> str:
    mean = statistics.fmean(values)
    return f"{sign if mean > 0 else ''}{printed(key, mean, half_width(values))}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean."""
    return quantile(T, NORMAL, len(values)) * statistics.stdev(values) / math.sqrt(len(values))


def seeds_needed(effect: float) -> int:
    """How many show, with a chance of 80 %, a difference of `effect` of its deviations."""
    enough = range(2, len(T) + 2)
    found = (n for n in enough if math.sqrt(n) * effect >= quantile(T, NORMAL, n) + quantile(T_POWER, NORMAL_POWER, n))
    return next(found, math.ceil(((NORMAL + NORMAL_POWER) / effect) ** 2 + NORMAL**2 / 2))


def quantile(of_few: Sequence[float], normal: float, seeds: int) -> float:
    return of_few[seeds - 2] if seeds - 2 < len(of_few) else normal
