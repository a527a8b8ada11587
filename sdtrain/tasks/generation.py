"""What a run that generates images does once in a while: grids of fixed latents, evaluation, the best weights."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import torch

from sdtrain.engine.ranks import barrier, is_main
from sdtrain.files import fault_point, save_tensors, write_bytes
from sdtrain.sampling import generate, grid, sampler, to_uint8

log = logging.getLogger("sdtrain")


def grid_shape(resolution: int) -> tuple[int, int]:
    """(images, columns) of a grid about 1000 pixels wide, 2 x 2 to 8 x 8."""
    columns = max(min(1024 // resolution, 8), 2)
    return columns * columns, columns


class Task:
    """Bound to one run."""

    ends_with_evaluation = False  # `finish` sees to the last weights

    def __init__(self, run: Any) -> None:
        self.run = run
        self._evaluators: dict[str, Any] = {}
        self.style = {"seed": run.config.seed, "class_counts": run.dataset.class_counts, "device": run.device}

    @property
    def eval_img(self) -> int:
        """Images between two evaluations; 0 = never."""
        return self.run.config.eval_img

    def pictures(self) -> None:
        """Grids of G and of its average, on the same latents every time and in every run of the seed."""
        run = self.run
        total, columns = grid_shape(run.kit.resolution)
        for tag, name in (("fakes", run.method.students[0]), ("fakes_ema", run.method.evaluated)) if is_main() else ():
            parts = [range(i, min(i + 16, total)) for i in range(0, total, 16)]
            images = [to_uint8(generate(run.nets[name], part, **self.style)).cpu() for part in parts]
            run.folder.image(tag, grid(torch.cat(images), columns), run.seen_img)
        barrier()

    def evaluate(self, split: str) -> None:
        """Measure the average by the configured metrics, all ranks together; the best so far goes to best/."""
        run = self.run
        sample = sampler(run.nets[run.method.evaluated], batch_size=run.config.metrics.batch_size, **self.style)
        with run.watch.section("evaluate"):
            values, protocol = self.evaluator(split).measure(sample)
        run.folder.row(kind="eval", seen_img=run.seen_img, split=split, weights="ema", **values, protocol=protocol)
        log.info("eval %s  %s", split, "  ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float)))
        if split == "val":
            self.keep_best(values)

    def evaluator(self, split: str) -> Any:
        """The evaluator of a split, made when first needed; statistics of real images are kept in the run folder."""
        if split not in self._evaluators:
            from sdtrain.metrics.evaluate import Evaluator

            c, m = self.run.config, self.run.config.metrics
            weights = {"inception": c.weights.inception or "download"}
            more = {"batch_size": m.batch_size, "workers": c.data.workers, "device": self.run.device}
            self._evaluators[split] = Evaluator(
                self._images(split),
                metrics=m.names,
                num_fake=m.num_fake,
                num_real=m.num_real,
                extractor=m.extractor,
                tap=int(m.tap),
                seeds=m.seeds,
                weights=weights,
                cache=self.run.folder.path / "cache",
                split=split,
                latents_seed=c.seed,
                **more,
            )
        return self._evaluators[split]

    def _images(self, split: str) -> Any:
        """The data set of a split; without one of its own, validation measures against the training images."""
        source = getattr(self.run.config.data, split)
        if source is None:
            return self.run.dataset
        from sdtrain.data.read.dataset import open_dataset

        return open_dataset(source, cache=self.run.config.data.cache)

    def keep_best(self, values: dict[str, Any]) -> None:
        """best/ holds the weights with the lowest `metrics.select_by`, and the metrics that chose them."""
        run = self.run
        key = run.config.metrics.select_by
        if not values.get(key, math.inf) < run.best.get(key, math.inf):
            return
        run.best = {key: values[key], "seen_img": run.seen_img}
        if is_main():
            name = run.method.evaluated
            save_tensors(run.folder.path / "best" / f"{name}.safetensors", run.nets[name].module.state_dict())
            fault_point("best")
            row = json.dumps({"seen_img": run.seen_img, **values}, default=str)
            write_bytes(run.folder.path / "best" / "metrics.json", row.encode())
        barrier()

    def leave_stage(self) -> None:
        """Generation has one stage."""

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
