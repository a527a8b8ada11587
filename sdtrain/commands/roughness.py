"""How unsteady the losses of runs are. Free of torch.

roughness = variance of the differences of successive values / variance of the values, whatever their scale: 2 for noise
that remembers nothing, near 0 for a smooth curve.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from sdtrain.commands.arms import Values, seed_of, table_of_values
from sdtrain.commands.plots import is_loss
from sdtrain.commands.results import Written
from sdtrain.commands.tables import Table

LEAST = 10  # values of a loss that say something


def tables_of_roughness(runs: Sequence[Written], notes: list[str]) -> list[Table]:
    """A line a run, and arms over seeds."""
    found = {run.name: roughness(run) for run in runs}
    names = dict.fromkeys(key for losses in found.values() for key in losses)
    if not names:
        notes.append(f"no run has the {LEAST} rows of losses that their roughness takes")
        return []
    said = (
        "Roughness of losses in the last stage of each run: variance of differences of successive values / variance "
        "of values; 2 for noise that remembers nothing, near 0 for a smooth curve."
    )
    lines = [[run, *(f"{of[name]:.3f}" if name in of else "-" for name in names)] for run, of in found.items()]
    arms: dict[str, dict[str, Values]] = {f"roughness of {name}": defaultdict(dict) for name in names}
    for run in runs:
        if (seed := seed_of(run)) is not None and not run.unfinished:
            for name, value in found[run.name].items():
                arms[f"roughness of {name}"][run.group][seed] = value
    compared = table_of_values("Arms over seeds.", arms)
    return [Table(said, ["Run", *names], lines, 1), *([compared] if compared else [])]


def roughness(run: Written) -> dict[str, float]:
    """That of each term of the losses in the stage that the run ends in."""
    losses = {key: values for key, values in run.curves.items() if not key[0] and is_loss(key[1])}
    last = max((max(values) for values in losses.values()), default=0)
    found = {}
    for (_, name, _), at in losses.items():
        values = [at[images] for images in sorted(at)]
        if max(at) == last and len(values) >= LEAST and (spread := statistics.variance(values)):
            steps = [after - before for before, after in zip(values, values[1:])]
            found[name] = statistics.variance(steps) / spread
    return found
