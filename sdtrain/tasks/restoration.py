"""What a super-resolution run does once in a while: strips, D output histograms, validation, the best of each stage.

best/G_ema.safetensors, .json   the student validation likes best (of the latest stage), and how to rebuild it
best/metrics.json               what chose it
best/STAGE_G.safetensors        the same for each stage; STAGE_last_G, STAGE_last_D: how the stage ended
samples/strips_*.png            LQ | bicubic | student | teacher | HQ, with the busiest part enlarged below
samples/d_outputs_*.png, .json  P(real) of D_T and D_S on images of the student (Figures 2 and 3 of SDAKD);
                                D_T_judge is the judge of Ablations 1 to 3
inputs/SPLIT.safetensors        the fixed low-quality inputs
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sdtrain.contracts import Chunk, Net, Restoration, Task, Tensors
from sdtrain.data.degrade.chain import reflect_to
from sdtrain.data.read.order import order
from sdtrain.data.read.reader import read_image
from sdtrain.engine.agree import main_alone, share_out
from sdtrain.engine.ranks import barrier, from_main, is_main, sum_over_ranks
from sdtrain.files import save_tensors, write_bytes
from sdtrain.rng import Draws
from sdtrain.tasks import sr_pictures
from sdtrain.tasks.validation import HIGHER_IS_BETTER, Upscale, ValidationList

if TYPE_CHECKING:
    from sdtrain.restoration.options import Loaded
    from sdtrain.run import Run

Values = Mapping[str, float]
log = logging.getLogger("sdtrain")


class RestorationTask(Task):
    """Bound to one run."""

    def __init__(self, run: Run) -> None:
        assert isinstance(run.method, Restoration)
        self.run, self.method = run, run.method
        self.config = cast("Loaded", run.config)  # every method of this task has these keys
        self.lists: dict[str, ValidationList] = {}
        self.best: dict[str, Tensors] = {}  # net -> weights that validation liked best in this stage

    @property
    def eval_img(self) -> int:
        """The paper validates after each epoch."""
        c = self.config
        if not c.eval_img or not c.data.val:
            return 0
        steps = round(c.eval_epochs * self.run.builder.steps_per_epoch)
        return max(steps, 1) * c.batch_size if c.eval_epochs else c.eval_img

    @property
    def ends_with_evaluation(self) -> bool:  # type: ignore[override]  # it depends on the configuration
        return bool(self.eval_img)

    @property
    def stage(self) -> str:
        return self.run.stage.name

    @property
    def evaluated(self) -> str:
        """The network that validation is about: the teacher's average while it trains, else the student's."""
        return self.run.stage.evaluated

    def of(self, split: str) -> ValidationList:
        if split not in self.lists:
            run = self.run
            self.lists[split] = ValidationList(self.config, split, self.method.inputs, run.folder.path, run.device)
            self.lists[split].between = run.give_way
        return self.lists[split]

    def evaluate(self, split: str) -> None:
        """Measure the stage's average on the list; remember it when it is the best of the stage so far."""
        if self.evaluated in self.method.given:  # it does not change while only its discriminator trains
            return
        with self.run.nets[self.evaluated].whole() as net:
            values = self._measure(split, self._upscaler(split, net))
        self._row("eval", split, values, weights="ema")
        if split == "val":
            self.keep_best(values)

    def _measure(self, split: str, upscale: Upscale) -> dict[str, float]:
        with self.run.timer.section("evaluate"):
            return self.of(split).measure(upscale)

    def _row(self, kind: str, split: str, values: Values, **more: Any) -> None:
        run = self.run
        row = {"stage": self.stage, **more, **values, "protocol": self.of(split).protocol()}
        run.folder.row(kind, run.seen_img, row, split)
        shown = "  ".join(f"{n} {v:.4g}" for n, v in values.items())
        log.info("%s %s %s  %s", kind, split, more.get("method", self.stage), shown)

    def keep_best(self, values: Values) -> None:
        """The paper's rule: lowest validation FID (or whatever `validation.select_by` says), in each stage."""
        run, key = self.run, self.config.validation.select_by
        stage = self.stage
        sign = -1 if key in HIGHER_IS_BETTER else 1
        before = run.best.get(stage, {}).get(key, sign * math.inf)
        if not sign * values[key] < sign * before:
            return
        run.best = {**run.best, stage: {**values, "seen_img": run.seen_img}}
        names = [self.evaluated, *(["MLP"] if "MLP" in run.nets and stage == "supervised" else [])]
        self.best = {n: {k: v.detach().clone() for k, v in run.nets[n].state().items()} for n in names}
        self.write_best(stage)

    def write_best(self, stage: str) -> None:
        """Files of the best weights of `stage`, for people and for `sdtrain upscale`."""
        run = self.run
        name = next(s.evaluated for s in self.method.stages if s.name == stage)
        self.write_network(f"{stage}_G", name, self.best[name])
        self.write_network("G_ema", name, self.best[name])
        if is_main():
            chosen = json.dumps({"stage": stage, **run.best[stage]}).encode()
            for file in ("metrics.json", f"{stage}_metrics.json"):
                with run.folder.writing(path := run.folder.path / "best" / file):
                    write_bytes(path, chosen)
        barrier()

    def write_network(self, file: str, name: str, tensors: Tensors) -> None:
        """best/FILE.safetensors, tensors [...] by official name, and its card. All ranks together."""
        folder = self.run.folder.path / "best"
        with self.run.nets[name].whole() as net:
            card = self.card(name, net)
        if is_main():
            with self.run.folder.writing(folder / f"{file}.safetensors"):
                save_tensors(folder / f"{file}.safetensors", tensors)
                write_bytes(folder / f"{file}.json", json.dumps(card).encode())

    def card(self, name: str, net: nn.Module) -> dict[str, Any]:
        """How to rebuild a network: kind, player, role and options."""
        model, judge = self.config.model, name.startswith("D")
        options = {k: v for k, v in vars(net.options).items() if k != "kind"}
        who = {"player": "Discriminator", "role": "D"} if judge else {"player": "Generator", "role": "G_ema"}
        card = {"kind": (model.discriminator if judge else model.generator).kind, **who, "options": options}
        return card | ({"resolution": self.run.resolution} if model.generator.kind == "gcfsr" else {})

    def hand_over(self) -> Mapping[str, Tensors]:
        """The best weights of the stage that is over, whose last are kept; the next begins to collect its own."""
        names = [stage.name for stage in self.method.stages]
        at = names.index(self.stage)
        if at:
            self.write_last(names[at - 1])
        best, self.best = self.best, {}
        return best

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold so that the next stage starts the same after a kill: NET/TENSOR."""
        return {f"{net}/{name}": value for net, part in self.best.items() for name, value in part.items()}

    def load_tensors(self, tensors: Tensors) -> None:
        """Take over NET/TENSOR -> [...] from `tensors`, and write best/ anew."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            net, _, tensor = name.partition("/")
            found.setdefault(net, {})[tensor] = value.to(self.run.device)
        self.best = {**found}
        if self.best:
            self.write_best(list(self.run.best)[-1])  # best/ is what this checkpoint knows, whatever came after it

    def write_last(self, stage: str) -> None:
        """How a stage ended, beside its best."""
        ended = next(s for s in self.method.stages if s.name == stage)
        trained = [net for nets in ended.players.values() for net in nets if net != "MLP"]
        for net in trained:
            source = net if net.startswith("D") else ended.evaluated
            self.write_network(f"{stage}_last_{net[0]}", source, self.run.nets[source].state())
        barrier()

    def finish(self) -> None:
        """Pictures of the end, the test list once with the best weights, and the table."""
        run, c = self.run, self.config
        split = "test" if c.data.test else "val"
        if self.tested(split):
            log.info("%s was measured already; see %s", split, run.folder.metrics)
            return
        self.write_last(self.stage)
        if c.sample_img and not run.due(c.sample_img):
            self.pictures()
        if not self.eval_img:
            return
        table: dict[str, Values] = {"bicubic": self._measure(split, self.of(split).bicubic)}
        if "G_T" in run.nets:
            with run.nets["G_T"].whole() as teacher:
                table["teacher"] = self._measure(split, self._upscaler(split, teacher))
        if c.data.test:  # rows come last: what a stop signal cuts short leaves none behind
            best = self.best_network()
            table["student"] = self._measure("test", self._upscaler("test", best))
        for name in [name for name in table if name != "student"]:
            self._row("baseline", split, table[name], method=name)
        if c.data.test:
            self._row("eval", "test", table["student"], weights="ema")
            self.strips("test", best)
        self.report(split, table)

    def tested(self, split: str) -> bool:
        """Whether the run has ended before: its last rows are those of `finish`. The same answer on all ranks."""
        log_file = self.run.folder.metrics
        text = log_file.read_text() if is_main() and log_file.exists() else ""
        kind = "eval" if split == "test" else "baseline"
        rows = [json.loads(line) for line in text.splitlines()]
        found = [r for r in rows if r["kind"] == kind and r["split"] == split and r["seen_img"] == self.run.seen_img]
        return from_main(bool(found))

    def _upscaler(self, split: str, net: nn.Module) -> Upscale:
        return lambda i, setting: self.of(split).upscale(net, i, setting)

    def best_network(self) -> nn.Module:
        """A copy of the average with the best weights of the last stage (its last weights where nothing was chosen)."""
        with self.run.nets[self.evaluated].whole() as net:
            copied = copy.deepcopy(net)
        if self.evaluated in self.best:
            copied.load_state_dict(self.best[self.evaluated])
        return copied

    def report(self, split: str, table: Mapping[str, Values]) -> None:
        """The validation of each stage's best and the test of the last, as one table in the log."""
        rows: dict[str, Values] = {f"{stage} (val)": values for stage, values in self.run.best.items()}
        rows |= {f"{name} ({split})": values for name, values in table.items()}
        names = self.config.validation.names
        log.info("%-24s %s", "", "  ".join(f"{n:>8}" for n in names))
        for row, values in rows.items():
            log.info("%-24s %s", row, "  ".join(f"{values[n]:8.3f}" for n in names))

    def pictures(self) -> None:
        """Strips of fixed validation images, and the histograms of D."""
        if self.config.data.val:
            self.strips()
        self.histograms()

    def strips(self, split: str = "val", student: nn.Module | None = None) -> None:
        """Images spread evenly over a list; of validation with the present student, of the test with the best."""
        run, images = self.run, self.of(split)
        assert images.stored
        with ExitStack() as stack:
            nets = [student or stack.enter_context(run.nets["G_ema"].whole())]
            nets += [stack.enter_context(run.nets["G_T"].whole())] if "G_T" in run.nets else []
            tag = "strips" if split == "val" else f"strips_{split}"
            main_alone(lambda: run.folder.image(tag, sr_pictures.as_hwc(self.sheet(images, nets)), run.seen_img))

    def sheet(self, images: ValidationList, nets: Sequence[nn.Module]) -> Tensor:
        """LQ, bicubic, what each network makes of it, HQ, under their names: one row an image, uint8 [3, H, W].

        Of several degradations the first is shown, of several factors the largest.
        """
        count = min(self.config.validation.strips, len(images))
        setting = [setting for setting in images.settings if setting.lq == images.settings[0].lq][-1]
        rows = []
        for i in range(0, len(images), len(images) // count)[:count]:
            made = [images.bicubic(i, setting), *(images.upscale(net, i, setting) for net in nets)]
            rows.append(sr_pictures.strip([images.lq(i, setting), *(m[0].cpu() for m in made), images.hq(i)]))
        names = [f"LQ 1/{setting.factor}, {setting.lq}", f"bicubic x{setting.factor}", "student", "teacher"]
        return sr_pictures.headed(torch.cat(rows, 1), [*names[: 2 + len(nets)], "HQ"])

    def histograms(self) -> None:
        """P(real) of every discriminator on images of the student from the first training images of a fixed order."""
        run, seen = self.run, self.run.seen_img
        judges = self.method.judges
        found = {judges[name]: self.d_outputs(run.nets[name]) for name in judges if name in run.nets}
        counts = {name: sr_pictures.histogram(values) for name, values in found.items()}
        record = {name: {"probabilities": found[name], "counts": counts[name]} for name in found}
        run.folder.write_json(f"samples/d_outputs_{seen:09d}.json", {"seen_img": seen, **record})
        if is_main():
            about = f"{len(self.training_images())} images of the student"
            title = f"Discriminators on {about}, stage {self.stage}, {seen:,} images seen"
            run.folder.image("d_outputs", sr_pictures.bars(counts, title), seen)
        for name, values in found.items():
            run.folder.histogram(f"d_outputs/{name}", torch.tensor(values), seen)

    def d_outputs(self, net: Net) -> list[float]:
        """Mean of sigmoid(logit) on each student image; D and G_S in eval, inputs fixed by `validation.seed`."""
        images = self.training_images()
        rows = torch.zeros(len(images), dtype=torch.float64, device=self.run.device)
        with net.whole() as D, self.run.nets["G_ema"].whole() as G:

            def judge(row: int) -> None:
                chunk = self.fixed_chunk(row, images[row])
                rows[row] = D(self.method.inputs(G, chunk, chunk.draws)).sigmoid().mean()

            share_out(len(images), judge, self.run.give_way)
        sum_over_ranks([rows])
        return rows.tolist()

    def training_images(self) -> list[int]:
        """The first samples of an order that the validation seed fixes."""
        count = min(self.config.validation.histogram_images, self.run.dataset.num_samples)
        return order(self.config.validation.seed, np.arange(count), self.run.dataset.num_samples).tolist()

    def fixed_chunk(self, row: int, index: int) -> Chunk:
        """One training image as a chunk of its own: top-left crop, degraded without the pool by numbers of `row`."""
        run, method = self.run, self.method
        side = method.feed.crop or run.resolution
        image = reflect_to(read_image(run.dataset, index), side)[:, :side, :side]
        real = method.to_range(image[None].to(run.device))
        draws = Draws(
            seed=self.config.validation.seed, step=0, ghosts=(row,), ghost_batch=1, device=run.device, path="histogram"
        )
        chunk = Chunk(step=0, seen_img=0, real=real, labels=None, draws=draws)
        return method.inputs.fixed(chunk)


TASK = RestorationTask
