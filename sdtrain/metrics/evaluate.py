"""Measure a sampler against real images, all ranks together; the values are the same bits for any number of ranks.

    CACHE/real-<hash>.safetensors   sums (and features) of the real images, one file a data set and protocol

Samples are cut into blocks of `batch_size` consecutive indices. In each round every rank turns one block into features;
the rows of all ranks are exchanged and added up in the order of the blocks. Nothing is padded, repeated or averaged
twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.engine.ranks import agree_max, barrier, is_main, rank, sum_over_ranks, world
from sdtrain.errors import ConfigError, RunError
from sdtrain.metrics import features, rfid
from sdtrain.metrics.collected import Progress, Statistics, warn_if_collapsed
from sdtrain.metrics.features import Extractor
from sdtrain.metrics.fid import fid_of_sums
from sdtrain.metrics.images import batches
from sdtrain.metrics.kid import NUM_SUBSETS, SUBSET_SIZE, kid
from sdtrain.metrics.prc import K, precision_recall
from sdtrain.metrics.protocol import fingerprint
from sdtrain.rng import generator

METRICS = ("fid", "rfid", "kid", "pr")

SampleFn = Callable[[list[int]], Tensor]


class Evaluator:
    """Everything fixed about an evaluation; `measure` may be called again and again.

    real           an open data set (`sdtrain.metrics.images.open_images`)
    metrics        some of fid, rfid, kid, pr
    extractor      features of fid, kid and pr: inception or random-inception; `tap` is the width of the layer
    pr_extractor   vgg16 for precision and recall in the features of the reference code; None takes `extractor`
    weights        where frozen networks come from, by name (`sdtrain.weights`)
    num_real       a fixed random subset of that size; None = all
    seeds          how many random networks rfid averages, seeds 0, 1, ...
    batch_size     samples in a block; part of the protocol because the last bits of features depend on it
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
        pr_extractor: str | None = None,
        seeds: int = 5,
        batch_size: int = 32,
        weights: dict[str, str] | None = None,
        device: torch.device | str = "cpu",
        cache: Path | str | None = None,
        split: str = "val",
        latents_seed: int | None = 0,
        workers: int = 2,
    ):
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ConfigError(f"The metrics {unknown or 'list'} cannot be measured; choose from {', '.join(METRICS)}.")
        self.real, self.metrics, self.num_fake, self.tap = real, tuple(metrics), num_fake, tap
        self.extractor, self.pr_extractor, self.seeds = extractor, pr_extractor, tuple(range(seeds))
        self.batch_size, self.weights, self.device = batch_size, dict(weights or {}), torch.device(device)
        self.cache, self.split, self.latents_seed, self.workers = cache, split, latents_seed, workers
        self.indices = subset(real.num_samples, num_real)
        self._extractors: dict[str, Extractor] | None = None
        self._real: Statistics | None = None
        for count, what in ((num_fake, "generated"), (len(self.indices), "real")):
            if count < 2:
                raise ConfigError(f"An evaluation needs at least 2 {what} images, got {count}.")

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
        fake = self._collect(f"evaluate {self.split}", range(self.num_fake), lambda blocks: map(sample_fn, blocks))
        return self._values(real, fake), self.protocol()

    def real_statistics(self) -> Statistics:
        """Statistics of the real images, from memory, the cache, or the images. Collective."""
        if self._real is None:
            path = self._cache_path()
            have = path is not None and path.is_file()
            if agree_max(int(not have), self.device) == 0:
                self._real = self._load(path)  # type: ignore[arg-type]
            else:
                self._real = self._collect(f"real {self.split}", self.indices, self._read)
                if path is not None and is_main():
                    self._save(path, self._real)
                barrier()
        return self._real

    def protocol(self) -> dict[str, Any]:
        """How the values are measured: JSON data, kept beside them."""
        nets = {name: net.identity for name, net in self.extractors().items() if not name.startswith("rfid")}
        protocol: dict[str, Any] = {
            "metrics": list(self.metrics),
            "num_fake": self.num_fake,
            "num_real": len(self.indices),
            "real_hash": self.real.hash,
            "real_source": str(self.real.source),
            "real_resolution": self.real.resolution,
            "split": self.split,
            "latents_seed": self.latents_seed,
            "batch_size": self.batch_size,
            "covariance": "n - 1 (fid, rfid), n (fid_biased)",
            **nets,
        }
        if "kid" in self.metrics:
            protocol["kid"] = {"subsets": NUM_SUBSETS, "subset_size": self._subset_size(), "kernel": "(x.y/d + 1)^3"}
        if "pr" in self.metrics:
            protocol["pr_k"] = K
        if "rfid" in self.metrics:
            protocol["rfid"] = {"seeds": list(self.seeds), "tap": self.tap, "rule": rfid.RULE_HASH, "std_ddof": 1}
        return protocol

    def extractors(self) -> dict[str, Extractor]:
        """The networks this evaluation needs, built once: `features` (fid, kid, pr), `pr_features`, `rfid<seed>`."""
        if self._extractors is None:
            self._extractors = dict(self._build())
        return self._extractors

    def _build(self) -> Iterator[tuple[str, Extractor]]:
        own_pr = self.pr_extractor is not None and "pr" in self.metrics
        shared = {"fid", "kid"} if own_pr else {"fid", "kid", "pr"}
        if shared & set(self.metrics):
            yield "features", self._main_extractor()
        if own_pr:
            yield "pr_features", features.vgg16(self.weights.get("vgg16", "download"), self.device)
        for seed in self.seeds if "rfid" in self.metrics else ():
            yield f"rfid{seed}", self._random(seed)

    def _main_extractor(self) -> Extractor:
        source = self.weights.get("inception", "download")
        if self.extractor == "random-inception" or source == "random":
            return self._random(0)
        return features.inception(source, self.tap, self.device)

    def _random(self, seed: int) -> Extractor:
        made = features.random_inception(seed, self.tap, self._calibration, self.device)
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

    def _keep(self) -> list[str]:
        """Extractors whose rows are needed, not only their sums."""
        kept = {"features"} if "kid" in self.metrics else set()
        if "pr" in self.metrics:
            kept.add("pr_features" if self.pr_extractor else "features")
        return sorted(kept)

    def _collect(
        self, title: str, indices: Sequence[int], produce: Callable[[list[list[int]]], Iterator[Tensor]]
    ) -> Statistics:
        nets = self.extractors()
        found = Statistics({name: net.width for name, net in nets.items()}, self._keep(), self.device)
        blocks = [list(indices[at : at + self.batch_size]) for at in range(0, len(indices), self.batch_size)]
        images = iter(produce(blocks[rank() :: world()]))
        progress = Progress(title, len(indices))
        for first in range(0, len(blocks), world()):
            sizes = [len(block) for block in blocks[first : first + world()]]
            for name, parts in self._round(nets, images, sizes).items():
                for part in parts:
                    found.add(name, part)
            progress.advance(sum(sizes))
        return found

    def _round(self, nets: dict[str, Extractor], images: Iterator[Tensor], sizes: list[int]) -> dict[str, list[Tensor]]:
        """One block on every rank: for each extractor the rows of all of them, in the order of the blocks."""
        shared = {
            name: torch.zeros(world(), self.batch_size, net.width, device=self.device) for name, net in nets.items()
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
            raise fault or RunError("Another rank failed while evaluating; its message says why.")
        sum_over_ranks(list(shared.values()))
        return {name: [rows[slot, :n] for slot, n in enumerate(sizes)] for name, rows in shared.items()}

    def _values(self, real: Statistics, fake: Statistics) -> dict[str, Any]:
        warn_if_collapsed(real, fake)
        values: dict[str, Any] = {}
        if "fid" in self.metrics:
            pair = real.sums["features"], fake.sums["features"]
            values |= {"fid": fid_of_sums(*pair, ddof=1), "fid_biased": fid_of_sums(*pair, ddof=0)}
        if "kid" in self.metrics:
            mean, std = kid(real.features("features"), fake.features("features"))
            values |= {"kid": mean, "kid_std": std}
        if "pr" in self.metrics:
            name = "pr_features" if self.pr_extractor else "features"
            rows = [found.features(name).to(self.device) for found in (real, fake)]
            values |= dict(zip(("precision", "recall"), precision_recall(*rows), strict=True))
        if "rfid" in self.metrics:
            names = [f"rfid{seed}" for seed in self.seeds]
            values |= rfid.summary([fid_of_sums(real.sums[n], fake.sums[n]) for n in names], self.seeds)
        return values

    def _subset_size(self) -> int:
        return min(SUBSET_SIZE, self.num_fake, len(self.indices))

    def _cache_path(self) -> Path | None:
        if self.cache is None:
            return None
        nets = {name: net.identity for name, net in self.extractors().items()}
        what = {
            "real": self.real.hash,
            "num": len(self.indices),
            "block": self.batch_size,
            "keep": self._keep(),
            **nets,
        }
        return Path(self.cache) / f"real-{fingerprint(what)}.safetensors"

    def _load(self, path: Path) -> Statistics:
        from safetensors.torch import load_file

        widths = {name: net.width for name, net in self.extractors().items()}
        return Statistics(widths, self._keep()).load(load_file(path), self.device)

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
