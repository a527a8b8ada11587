"""Measure a sampler against real images, all ranks together; the values are the same bits for any number of ranks.

    CACHE/real-<hash>.safetensors   sums (and features) of the real images, one file a data set and protocol

Samples are cut into blocks of `batch_size` consecutive indices. In each round every rank turns one block into features;
the rows of all ranks are exchanged and added up in the order of the blocks. Nothing is padded, repeated or averaged
twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtrain.engine.agree import raise_together
from sdtrain.engine.ranks import agree_max, is_main, rank, sum_over_ranks, tensors_from_main, world
from sdtrain.engine.writing import on_main
from sdtrain.metrics import rfid
from sdtrain.metrics.collected import Progress, Statistics, warn_if_collapsed
from sdtrain.metrics.images import batches
from sdtrain.metrics.protocol import fingerprint
from sdtrain.metrics.table import Settings
from sdtrain.rng import generator

if TYPE_CHECKING:
    from sdtrain.metrics.features import Extractor

log = logging.getLogger("sdtrain")

SampleFn = Callable[[list[int]], Tensor]


class Evaluator:
    """Everything fixed about an evaluation; `measure` may be called again and again.

    real           an open data set (`sdtrain.metrics.images.open_images`)
    metrics        some of `sdtrain.metrics.table.METRICS`; there also: extractor, tap, pr_features, pr_precision
    weights        where frozen networks come from, by name (`sdtrain.weights`)
    num_real       a fixed random subset of that size; None = all
    seeds          how many random networks rfid averages, seeds 0, 1, ...
    batch_size     samples in a block; part of the protocol because the last bits of features depend on it

    Raises ConfigError for metrics that do not exist and for fewer than two images.
    """

    def __init__(
        self,
        real: Any,
        *,
        metrics: Sequence[str] = ("fid",),
        num_fake: int = 50_000,
        num_real: int | None = None,
        extractor: str = "inception",
        tap: int = 2048,
        pr_features: str = "inception",
        pr_precision: str = "fp32",
        seeds: int = 5,
        batch_size: int = 32,
        weights: dict[str, str] | None = None,
        device: torch.device | str = "cpu",
        cache: Path | str | None = None,
        split: str = "val",
        latents_seed: int | None = 0,
        workers: int = 2,
        between: Callable[[], None] = lambda: None,
    ):
        """`between` is called by all ranks before each block; what it raises, on all of them, ends the measuring."""
        self.weights, self.device = dict(weights or {}), torch.device(device)
        self.indices = subset(real.num_samples, num_real)
        self.settings = Settings(
            metrics=tuple(metrics),
            num_fake=num_fake,
            num_real=len(self.indices),
            extractor="random-inception" if self.weights.get("inception") == "random" else extractor,
            tap=tap,
            pr_features=pr_features,
            pr_precision=pr_precision,
            seeds=tuple(range(seeds)),
        )
        self.real, self.batch_size, self.cache, self.split = real, batch_size, cache, split
        self.latents_seed, self.workers, self.between = latents_seed, workers, between
        self._extractors: dict[str, Extractor] | None = None
        self._real: Statistics | None = None

    def evaluate(self, sample_fn: SampleFn) -> dict[str, Any]:
        """`measure` as one row: the values and, under `protocol`, how they came about."""
        values, protocol = self.measure(sample_fn)
        return {**values, "protocol": protocol}

    def measure(self, sample_fn: SampleFn) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values and protocol of the samples 0 ... num_fake - 1.

        `sample_fn` maps sample indices to uint8 images [n, 3, H, W] and must be a function of the indices alone.
        Collective: every rank calls it.
        """
        real = self.real_statistics()
        samples = range(self.settings.num_fake)
        fake = self._collect(f"evaluate {self.split}", samples, lambda blocks: map(sample_fn, blocks))
        self.between()
        warn_if_collapsed(real, fake)
        return self.settings.values(real, fake), self.protocol()

    def real_statistics(self) -> Statistics:
        """Statistics of the real images, from memory, the cache, or the images. Collective."""
        if self._real is None:
            path = self._cache_path()
            self._real = self._kept(path) if path is not None else None
            if self._real is None:
                found = self._real = self._collect(f"real {self.split}", self.indices, self._read)
                if path is not None:
                    on_main(lambda: self._save(path, found), path)
        return self._real

    def protocol(self) -> dict[str, Any]:
        """How the values are measured: JSON data, kept beside them."""
        nets = {name: net.identity for name, net in self.extractors().items() if not name.startswith("rfid")}
        return {
            "metrics": list(self.settings.metrics),
            "num_fake": self.settings.num_fake,
            "num_real": self.settings.num_real,
            "real_hash": self.real.hash,
            "real_source": str(self.real.source),
            "real_resolution": self.real.resolution,
            "split": self.split,
            "latents_seed": self.latents_seed,
            "batch_size": self.batch_size,
            "covariance": "n - 1 (fid, rfid), n (fid_biased)",
            **nets,
            **self.settings.protocol(),
        }

    def extractors(self) -> dict[str, Extractor]:
        """The networks this evaluation needs, built once, by their names in the protocol."""
        if self._extractors is None:
            self._extractors = {name: self._extractor(*net) for name, net in self.settings.nets().items()}
        return self._extractors

    def _extractor(self, kind: str, seed: int) -> Extractor:
        from sdtrain.metrics import features

        if kind == "random-inception":
            return self._random(seed)
        source = self.weights.get(kind, "download")
        if kind == "inception":
            return features.inception(source, self.settings.tap, self.device)
        made: Callable[..., Extractor] = getattr(features, kind)
        return made(source, self.device)

    def _random(self, seed: int) -> Extractor:
        from sdtrain.metrics import features

        made = features.random_inception(seed, self.settings.tap, self._calibration, self.device)
        if world() > 1:  # ranks on unlike processors must not end up with unlike networks
            tensors = list(made.net.state_dict().values())
            if not is_main():
                torch._foreach_zero_(tensors)
            sum_over_ranks(tensors)
        return made

    def _calibration(self) -> list[Tensor]:
        picked = subset(self.real.num_samples, rfid.CALIBRATION_IMAGES)
        return list(batches(self.real, picked, rfid.CALIBRATION_BATCH, self.workers))

    def _read(self, blocks: list[list[int]]) -> Iterator[Tensor]:
        return batches(self.real, [i for block in blocks for i in block], self.batch_size, self.workers)

    def _collect(
        self, title: str, indices: Sequence[int], produce: Callable[[list[list[int]]], Iterator[Tensor]]
    ) -> Statistics:
        nets = self.extractors()
        found = Statistics({name: net.width for name, net in nets.items()}, self.settings.kept(), self.device)
        blocks = [list(indices[at : at + self.batch_size]) for at in range(0, len(indices), self.batch_size)]
        images = iter(produce(blocks[rank() :: world()]))
        progress = Progress(title, len(indices))
        for first in range(0, len(blocks), world()):
            self.between()
            sizes = [len(block) for block in blocks[first : first + world()]]
            for name, parts in self._round(nets, images, sizes).items():
                for part in parts:
                    found.add(name, part)
            progress.advance(sum(sizes))
        return found

    def _round(self, nets: dict[str, Extractor], images: Iterator[Tensor], sizes: list[int]) -> dict[str, list[Tensor]]:
        """One block on every rank: for each extractor the rows of all of them, in the order of the blocks."""
        shared = {
            name: torch.zeros(len(sizes), self.batch_size, net.width, device=self.device) for name, net in nets.items()
        }
        fault: Exception | None = None
        if rank() < len(sizes):
            try:
                block = next(images).to(self.device, non_blocking=True)
                for name, net in nets.items():
                    shared[name][rank(), : len(block)] = net(block)
            except Exception as error:  # told to the other ranks below, then raised
                fault = error
        if agree_max(int(fault is not None), self.device):
            raise_together(fault)
        sum_over_ranks(list(shared.values()))
        return {name: [rows[slot, :n] for slot, n in enumerate(sizes)] for name, rows in shared.items()}

    def _cache_path(self) -> Path | None:
        if self.cache is None:
            return None
        nets = {name: net.identity for name, net in self.extractors().items()}
        what = {
            "real": self.real.hash,
            "num": len(self.indices),
            "block": self.batch_size,
            "keep": self.settings.kept(),
            **nets,
        }
        return Path(self.cache) / f"real-{fingerprint(what)}.safetensors"

    def _kept(self, path: Path) -> Statistics | None:
        """What the file holds, which the main rank reads. Collective."""
        state = tensors_from_main(self._load(path) if is_main() and path.is_file() else None)
        widths = {name: net.width for name, net in self.extractors().items()}
        return None if state is None else Statistics(widths, self.settings.kept()).load(state, self.device)

    def _load(self, path: Path) -> dict[str, Tensor] | None:
        """What was kept; None for a damaged file, which is then made again."""
        from safetensors.torch import load_file

        widths = {name: net.width for name, net in self.extractors().items()}
        try:
            state = load_file(path)
            Statistics(widths, self.settings.kept()).load(state, "cpu").check(widths, len(self.indices))
            return state
        except Exception as error:  # the reader raises many types; none of them is worth a run
            log.warning("%s is damaged (%s) and made again", path, str(error)[:100])
            return None

    def _save(self, path: Path, found: Statistics) -> None:
        from safetensors.torch import save

        from sdtrain.files import write_bytes

        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(found.state(), {"protocol": json.dumps(self.protocol())}))


def subset(num_samples: int, wanted: int | None) -> list[int]:
    """All sample numbers, or a fixed random choice of `wanted` of them, in ascending order."""
    if wanted is None or wanted >= num_samples:
        return list(range(num_samples))
    picked = torch.randperm(num_samples, generator=generator("evaluation subset", num_samples))[:wanted]
    return sorted(picked.tolist())
