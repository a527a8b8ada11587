"""What is kept of a set of images while it is measured, and the line that says how long it still takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from sdtrain.engine.ranks import is_main
from sdtrain.metrics.sums import FeatureSums

log = logging.getLogger("sdtrain")

PROGRESS_SEC = 10.0
COLLAPSED = 1e-6


class Statistics:
    """Features of one set of images: sums for every extractor, the rows themselves for those that need them."""

    def __init__(self, widths: dict[str, int], keep: Sequence[str], device: torch.device | str = "cpu"):
        self.sums = {name: FeatureSums(width, device) for name, width in widths.items()}
        self.rows: dict[str, list[Tensor]] = {name: [] for name in keep}

    def add(self, name: str, rows: Tensor) -> None:
        """Rows [n, width] of one extractor."""
        self.sums[name].add(rows)
        if name in self.rows:
            self.rows[name].append(rows.cpu())

    def features(self, name: str) -> Tensor:
        """All rows [n, width] of an extractor that keeps them, on the CPU."""
        return torch.cat(self.rows[name])

    def state(self) -> dict[str, Tensor]:
        tensors = {f"rows.{name}": self.features(name) for name in self.rows}
        for name, sums in self.sums.items():
            tensors |= sums.state(f"{name}.")
        return tensors

    def load(self, state: dict[str, Tensor], device: torch.device | str) -> Statistics:
        """Take over what `state` gave: rows [n, width] and sums."""
        self.sums = {name: FeatureSums.of_state(state, f"{name}.", device) for name in self.sums}
        self.rows = {name: [state[f"rows.{name}"]] for name in self.rows}
        return self


def warn_if_collapsed(real: Statistics, fake: Statistics) -> None:
    """Identical samples have no spread: the distances are then finite but mean little."""
    for name, sums in fake.sums.items():
        spread, usual = (torch.trace(s.moments()[1]).item() for s in (sums, real.sums[name]))
        if spread <= COLLAPSED * usual and is_main():
            log.warning(
                "the generated images are all alike in %s features (spread %.3g, real %.3g)", name, spread, usual
            )


class Progress:
    """A line on the main rank every so often: how far, how fast, how long still."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done = title, total, 0
        self.start = self.shown = time.monotonic()

    def advance(self, num: int) -> None:
        self.done += num
        now = time.monotonic()
        if not is_main() or now - self.shown < PROGRESS_SEC:
            return
        self.shown = now
        speed = self.done / (now - self.start)
        left = (self.total - self.done) / speed
        log.info("%s: %d of %d images, %.3g a second, %.0f s left", self.title, self.done, self.total, speed, left)
