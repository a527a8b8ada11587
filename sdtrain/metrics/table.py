"""Every metric of generated images is one row of METRICS: features, what is kept of them, values, and protocol.

Importing this needs no torch, so commands can list and check metrics before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtrain.errors import ConfigError
from sdtrain.metrics import rfid

if TYPE_CHECKING:
    from sdtrain.metrics.collected import Statistics

Nets = dict[str, tuple[str, int]]  # extractors by their name in protocol and statistics: kind of network, its seed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the values of an evaluation, apart from the images and the weights.

    extractor      features of fid, kid and pr: inception or random-inception; `tap` is the width of the layer
    pr_features    vgg16 for precision and recall in the features of the reference code; `inception`: as `extractor`
    pr_precision   fp32 for exact distances; fp16 rounds features and distances as the reference code does
    seeds          random networks that rfid averages
    """

    metrics: tuple[str, ...] = ("fid",)
    num_fake: int = 50_000
    num_real: int = 50_000
    extractor: str = "inception"
    tap: int = 2048
    pr_features: str = "inception"
    pr_precision: str = "fp32"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        """Raises ConfigError for metrics that do not exist and for fewer than two images."""
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise ConfigError(f"The metrics {unknown or 'list'} cannot be measured; choose from {', '.join(METRICS)}.")
        for count, what in ((self.num_fake, "generated"), (self.num_real, "real")):
            if count < 2:
                raise ConfigError(f"An evaluation needs at least 2 {what} images, got {count}.")

    @property
    def chosen(self) -> list[Metric]:
        return [METRICS[name] for name in self.metrics]

    def nets(self) -> Nets:
        """The extractors these metrics need, each once."""
        found: Nets = {}
        for metric in self.chosen:
            found |= metric.nets(self)
        return dict(sorted(found.items()))

    def kept(self) -> list[str]:
        """Extractors whose rows are needed, not only their sums."""
        return sorted({name for metric in self.chosen if metric.keeps_rows for name in metric.nets(self)})

    def values(self, real: Statistics, fake: Statistics) -> dict[str, Any]:
        return merged(metric.values(self, real, fake) for metric in self.chosen)

    def protocol(self) -> dict[str, Any]:
        return merged(metric.protocol(self) for metric in self.chosen)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`shown` are the numbers it gives and the decimals they are printed with; `keeps_rows`: sums do not suffice.

    `labels` are the numbers that tables and curves show, and their names there; `rising` those better when higher.
    `network` names in words what a protocol says of the features.
    """

    shown: Mapping[str, int]
    nets: Callable[[Settings], Nets]
    values: Callable[[Settings, Statistics, Statistics], dict[str, Any]]  # of real and fake
    labels: Mapping[str, str]
    rising: tuple[str, ...] = ()
    keeps_rows: bool = False
    protocol: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    network: Callable[[dict[str, Any]], str] = lambda protocol: words(protocol["features"])


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


# networks with weights files of their own, under their names in `sdtrain.weights`
FILES = ("inception", "vgg16", "dinov2", "clip", "lite0")


def words(identity: dict[str, Any]) -> str:
    return f"{identity['extractor']} {identity['tap']}"


def shared(settings: Settings) -> Nets:
    return {"features": (settings.extractor, 0)}


def of_pr(settings: Settings) -> Nets:
    return shared(settings) if settings.pr_features == "inception" else {"pr_features": (settings.pr_features, 0)}


def of_rfid(settings: Settings) -> Nets:
    return {f"rfid{seed}": ("random-inception", seed) for seed in settings.seeds}


def of(network: str) -> Callable[[Settings], Nets]:
    return lambda settings: {network: (network, 0)}


def fid_values(settings: Settings, real: Statistics, fake: Statistics) -> dict[str, Any]:
    from sdtrain.metrics.fid import both_fids

    unbiased, biased = both_fids(real.sums["features"], fake.sums["features"])
    return {"fid": unbiased, "fid_biased": biased}


def distance_in(network: str, label: str) -> Metric:
    """A Frechet distance in the features of one network."""
    name = f"fd_{network}"

    def values(settings: Settings, real: Statistics, fake: Statistics) -> dict[str, Any]:
        from sdtrain.metrics.fid import fid_of_sums

        return {name: fid_of_sums(real.sums[network], fake.sums[network])}

    more: dict[str, Any] = {"shown": {name: 4}, "labels": {name: label}, "nets": of(network), "values": values}
    return Metric(**more, network=lambda protocol: words(protocol[network]))


def rfid_values(settings: Settings, real: Statistics, fake: Statistics) -> dict[str, Any]:
    from sdtrain.metrics.fid import fid_of_sums

    return rfid.summary([fid_of_sums(real.sums[n], fake.sums[n]) for n in of_rfid(settings)], settings.seeds)


def rfid_protocol(settings: Settings) -> dict[str, Any]:
    return {"rfid": {"seeds": list(settings.seeds), "tap": settings.tap, "rule": rfid.RULE_HASH, "std_ddof": 1}}


def kid_values(settings: Settings, real: Statistics, fake: Statistics) -> dict[str, Any]:
    from sdtrain.metrics.kid import kid

    mean, std = kid(real.features("features"), fake.features("features"))
    return {"kid": mean, "kid_std": std}


def kernel_distance_in(network: str, label: str) -> Metric:
    """KID in the features of one network."""
    name = f"kid_{network}"

    def values(settings: Settings, real: Statistics, fake: Statistics) -> dict[str, Any]:
        from sdtrain.metrics.kid import kid

        mean, std = kid(real.features(network), fake.features(network))
        return {name: mean, f"{name}_std": std}

    more: dict[str, Any] = {"shown": {name: 6, f"{name}_std": 6}, "labels": {name: label}, "nets": of(network)}
    more |= {"values": values, "keeps_rows": True, "protocol": kid_protocol}
    return Metric(**more, network=lambda protocol: words(protocol[network]))


def kid_protocol(settings: Settings) -> dict[str, Any]:
    from sdtrain.metrics.kid import NUM_SUBSETS, SUBSET_SIZE

    size = min(SUBSET_SIZE, settings.num_fake, settings.num_real)
    return {"kid": {"subsets": NUM_SUBSETS, "subset_size": size, "kernel": "(x.y/d + 1)^3"}}


def pr_values(settings: Settings, real: Statistics, fake: Statistics) -> dict[str, Any]:
    from sdtrain.metrics.prc import precision_recall

    (name,) = of_pr(settings)
    rows = [found.features(name).to(found.sums[name].sum.device) for found in (real, fake)]
    precision, recall = precision_recall(rows[0], rows[1], half=settings.pr_precision == "fp16")
    return {"precision": precision, "recall": recall}


def pr_protocol(settings: Settings) -> dict[str, Any]:
    from sdtrain.metrics.prc import K

    return {"pr_k": K, "pr_precision": settings.pr_precision}


def pr_network(protocol: dict[str, Any]) -> str:
    return f"{words(protocol.get('pr_features') or protocol['features'])} {protocol['pr_precision']}"


METRICS: dict[str, Metric] = {
    "fid": Metric(shown={"fid": 4, "fid_biased": 4}, labels={"fid": "FID"}, nets=shared, values=fid_values),
    "rfid": Metric(
        shown={"rfid": 4, "rfid_std": 4},
        labels={"rfid": "rFID"},
        nets=of_rfid,
        values=rfid_values,
        protocol=rfid_protocol,
        network=lambda protocol: f"random-inception {protocol['rfid']['tap']}",
    ),
    "kid": Metric(
        shown={"kid": 6, "kid_std": 6},
        labels={"kid": "KID"},
        nets=shared,
        values=kid_values,
        keeps_rows=True,
        protocol=kid_protocol,
    ),
    "pr": Metric(
        shown={"precision": 4, "recall": 4},
        labels={"precision": "Precision", "recall": "Recall"},
        rising=("precision", "recall"),
        nets=of_pr,
        values=pr_values,
        keeps_rows=True,
        protocol=pr_protocol,
        network=pr_network,
    ),
    "fd_dinov2": distance_in("dinov2", "FD-DINOv2"),
    "fd_clip": distance_in("clip", "FD-CLIP"),
    "kid_clip": kernel_distance_in("clip", "KID-CLIP"),
    "fd_lite0": distance_in("lite0", "FD-Lite0"),
    "kid_lite0": kernel_distance_in("lite0", "KID-Lite0"),
}
