"""What a named table or figure is made from: runs that have ended, with their configurations. Free of torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from sdtrain.commands.results import Written, comparable
from sdtrain.commands.source import config_of
from sdtrain.engine.positions import complete
from sdtrain.errors import ConfigError, RunError, UserError
from sdtrain.metrics.protocol import conflicts, whole

SHARES = "20,40,60,80,100"  # percent of training
T = TypeVar("T")
Configured = tuple[Written, Any]  # a run and its configuration


@dataclass
class Material:
    """The runs that were named, the arguments of the command, and what a reader has to be told."""

    runs: Sequence[Written]
    args: argparse.Namespace
    notes: list[str]
    made: dict[tuple[str, Path], Any] = field(default_factory=dict)  # what takes long is done once a run

    @cached_property
    def configured(self) -> list[Configured]:
        """The runs that have ended; why others are left out is noted."""
        found = ((run, self._configuration(run)) for run in self.runs if not run.speeds)
        return [(run, config) for run, config in found if config is not None]

    def of(self, *methods: str) -> list[Configured]:
        return [(run, config) for run, config in self.configured if config.method in methods]

    def saved(self, *methods: str) -> list[Configured]:
        """Those that have weights, so that it is worth to load torch. Raises RunError where runs have none."""
        found = self.of(*methods)
        kept = [item for item in found if any(has_weights(item[0].path))]
        if found and not kept:
            raise RunError("none of these runs has saved weights")
        return kept

    def _configuration(self, run: Written) -> Any:
        if run.unfinished:
            said = f"it is unfinished ({run.seen_img:,} of {run.total_img:,} images)"
            self.notes.append(f"{run.name} is left out: {said}")
            return None
        try:
            config = config_of(run.path) if run.path.is_dir() else None
        except ConfigError as error:
            self.notes.append(f"{run.name} is left out: {error}")
            return None
        if config is None:
            self.notes.append(f"{run.name} is left out: without its config.yaml nobody knows which row it is")
        return config

    def each(self, found: Sequence[Configured], do: Callable[[Written], T]) -> list[tuple[Written, Any, T]]:
        """(run, configuration, what `do` makes of it), each made once; a run that cannot give it becomes a note."""
        results = []
        for run, config in found:
            key = (do.__name__, run.path)
            if key not in self.made:
                try:
                    self.made[key] = do(run)
                except UserError as problem:
                    self.made[key] = problem
                    self.notes.append(f"{run.name}: {problem}")
            if not isinstance(self.made[key], UserError):
                results.append((run, config, self.made[key]))
        return results

    def alike(self, what: str, found: Sequence[Configured], split: str, key: str) -> list[Configured]:
        """Those that were measured as most of them, each in one way; what was measured otherwise is noted."""
        kept, protocols = [], {}
        for run, config in found:
            rows = [row.protocol for row in run.rows if row.split == split and key in row.values]
            if len(comparable(rows, dict)) > 1:
                self.notes.append(f"{what} of {run.name} is left out: its evaluations were measured in several ways")
            elif rows:
                protocols[run.name] = whole(rows)
                kept.append((run, config))
        parts = sorted(comparable(kept, lambda item: protocols[item[0].name]), key=len, reverse=True)
        for part in parts[1:]:
            ways = [whole(protocols[run.name] for run, _ in one) for one in (parts[0], part)]
            why = "; ".join(conflicts(*ways)[:2])
            names = ", ".join(run.name for run, _ in part)
            self.notes.append(f"{what} of {names} is left out, measured otherwise: {why}")
        return parts[0] if parts else []


def has_weights(run: Path) -> Iterator[bool]:
    yield any((run / "best").glob("*.safetensors"))
    yield from (bool(complete(run / folder)) for folder in ("snapshots", "checkpoints"))


def missing_seeds(seeds: Mapping[str, set[int]], notes: list[str]) -> None:
    """Say which rows lack seeds that others have."""
    every = set().union(*seeds.values())
    for words, found in sorted(seeds.items()):
        if missing := sorted(every - found):
            these = f"seeds {', '.join(map(str, missing))} are" if len(missing) > 1 else f"seed {missing[0]} is"
            notes.append(f"{words}: {these} missing, which other rows have")


def shares_of(text: str) -> list[float]:
    """'20,40' as [20.0, 40.0]. Raises ConfigError unless they are two or more rising shares of the whole."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) < 2 or sorted(set(shares)) != shares or not 0 < shares[0] <= shares[-1] <= 100:
        raise ConfigError(f"--shares {text}: give two or more rising shares of training in percent, such as {SHARES}")
    return shares
