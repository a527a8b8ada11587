"""What a run that generates images does once in a while: grids of fixed latents, evaluation, the best weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sdtrain.contracts import Task
from sdtrain.data.read.dataset import Dataset, open_dataset, reading
from sdtrain.engine.agree import main_alone
from sdtrain.engine.writing import on_main
from sdtrain.files import fault_point, save_tensors, write_bytes
from sdtrain.metrics.evaluate import Evaluator
from sdtrain.metrics.protocol import latents_seed
from sdtrain.metrics.table import FILES
from sdtrain.sampling import grid, sampler

if TYPE_CHECKING:
    from sdtrain.run import Run

log = logging.getLogger("sdtrain")


def grid_shape(resolution: int) -> tuple[int, int]:
    """(images, columns) of a grid about 1000 pixels wide, 2 x 2 to 8 x 8."""
    columns = max(min(1024 // resolution, 8), 2)
    return columns * columns, columns


class GenerationTask(Task):
    """Bound to one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._evaluators: dict[str, Evaluator] = {}
        self.seed, self.class_counts, self.device = run.config.seed, run.dataset.class_counts, run.device

    @property
    def eval_img(self) -> int:
        return self.run.config.eval_img

    def pictures(self) -> None:
        """Grids of G and of its average, on the same latents every time and in every run of the seed."""
        run = self.run
        total, columns = grid_shape(run.resolution)
        for tag, name in (("fakes", "G"), ("fakes_ema", self.evaluated)):
            with run.nets[name].whole() as G:
                sample = self.sampler(G, 16)
                main_alone(lambda: run.folder.image(tag, grid(sample(range(total)), columns), run.seen_img))  # noqa: B023

    @property
    def evaluated(self) -> str:
        return self.run.method.stages[-1].evaluated

    def sampler(self, G: nn.Module, batch_size: int, seed: int | None = None) -> Callable[[Sequence[int]], Tensor]:
        """Indices -> uint8 images [N, 3, R, R], of the run's own seed unless another is given."""
        more: Any = {"class_counts": self.class_counts, "device": self.device, "batch_size": batch_size}
        return sampler(G, seed=self.seed if seed is None else seed, **more)

    def evaluate(self, split: str) -> None:
        """Measure the average by the configured metrics, all ranks together; the best so far goes to best/.

        Split test has latents of its own (`latents_seed`): those of validation have chosen the weights.
        """
        run = self.run
        with run.timer.section("evaluate"), run.nets[self.evaluated].whole() as G:
            draw = self.sampler(G, run.config.metrics.batch_size, latents_seed(self.seed, split))
            values, protocol = self.evaluator(split).measure(draw)
        row = {"stage": run.stage.name, "weights": "ema", **values, "protocol": protocol}
        run.folder.row("eval", run.seen_img, row, split)
        log.info("eval %s  %s", split, "  ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float)))
        if split == "val":
            self.keep_best(values)

    def evaluator(self, split: str) -> Evaluator:
        """The evaluator of a split, made when first needed; statistics of real images are kept for the next."""
        if split not in self._evaluators:
            c, m = self.run.config, self.run.config.metrics
            self._evaluators[split] = Evaluator(
                self._images(split),
                metrics=m.names,
                num_fake=m.num_fake,
                num_real=m.num_real,
                extractor=m.extractor,
                tap=int(m.tap),
                seeds=m.seeds,
                pr_features=m.pr_features,
                pr_precision=m.pr_precision,
                weights={name: getattr(c.weights, name) or "download" for name in FILES},
                cache=Path(m.cache).expanduser() if m.cache else self.run.folder.path / "cache",
                split=split,
                latents_seed=latents_seed(c.seed, split),
                batch_size=m.batch_size,
                workers=c.data.workers,
                device=self.device,
                between=self.run.give_way,
            )
        return self._evaluators[split]

    def _images(self, split: str) -> Dataset:
        """The data set of a split; without one of its own, validation measures against the training images."""
        data = self.run.config.data
        source = getattr(data, split)
        if source is None:
            return self.run.dataset
        return open_dataset(source, **reading(data))

    def keep_best(self, values: Mapping[str, Any]) -> None:
        """best/ holds the weights with the lowest `metrics.select_by`, and the metrics that chose them."""
        run, key = self.run, self.run.config.metrics.select_by
        before = run.best.get(run.stage.name, {}).get(key, math.inf)
        if not values.get(key, math.inf) < before:
            return
        tensors, best = run.nets[self.evaluated].state(), run.folder.path / "best"

        def write() -> None:
            save_tensors(best / f"{self.evaluated}.safetensors", tensors)
            fault_point("best")
            row = json.dumps({"seen_img": run.seen_img, **values}, default=str)
            write_bytes(best / "metrics.json", row.encode())

        on_main(write, best / f"{self.evaluated}.safetensors")
        run.best = {run.stage.name: {key: values[key], "seen_img": run.seen_img}}

    def finish(self) -> None:
        """Pictures and metrics of the last weights, unless this position has just had them, and the test list once."""
        run, c = self.run, self.run.config
        if c.sample_img and not run.due(c.sample_img):
            self.pictures()
        due = [split for split in ("val", "test") if c.eval_img and (split == "val" or c.data.test is not None)]
        for split in due:
            just_now = split == "val" and run.due(c.eval_img)
            if not just_now and not run.folder.measured(run.seen_img, split):
                self.evaluate(split)


TASK = GenerationTask
