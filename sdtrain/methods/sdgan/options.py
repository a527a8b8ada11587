"""The keys of SD-GAN, and what cannot work among them. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdtrain.config.declare import MethodDeclaration
from sdtrain.config.options import (
    R1,
    AdversarialLoss,
    Augment,
    Fraction,
    Init,
    NonNegative,
    PathLength,
    SelfDistillation,
)
from sdtrain.config.schedule import Schedule

if TYPE_CHECKING:
    from sdtrain.config.keys import Config
    from sdtrain.data.read.dataset import Dataset

POLICIES = {
    "diffaug": ("color", "translation", "cutout"),
    "ada": ("blit", "geom", "color", "filter", "noise", "cutout", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc", "r3gan"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    init: Init = Init()
    """Fine-tuning: what G, G_ema and D start from."""
    sd: SelfDistillation = SelfDistillation()
    """Self-distillation: G learns from its own average."""
    adversarial: AdversarialLoss = "hinge"
    """The game of G and D."""
    order: Literal["G first", "D first"] = "G first"
    """Who moves first in a step; R3GAN lets D."""
    augment: Augment = Augment()
    """What D sees instead of the plain image, in every pass."""
    r1: R1 = R1()
    """Gradient penalty of D."""
    path_length: PathLength = PathLength()
    """Path-length regularisation (StyleGAN2 only)."""
    style_mixing: Fraction = 0.0
    """Probability that a ghost's generator mixes two styles (StyleGAN2 only)."""
    bcr: NonNegative = 0.0
    """Weight of balanced consistency of D under augmentation (StyleNAT); 0 = off."""
    d_passes: Literal["separate", "together"] = "separate"
    """Real and fake through D in two calls, or in one."""
    fake_labels: Literal["drawn", "real"] = "drawn"
    """Classes of fakes: drawn in the training set's proportions (official), or those of the real batch."""
    snapshots: tuple[Fraction, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    """Shares of total_img after which the weights of G and G_ema are kept for good (Table 3); an empty list = none."""


if TYPE_CHECKING:

    class Loaded(Options, Config):  # type: ignore[misc]  # a method may narrow a common key
        """A loaded configuration of this method."""


def problems(config: Loaded) -> list[tuple[str, str]]:
    """Combinations that cannot work, as (key, sentence)."""
    found = []
    styled = {"path_length.weight": config.path_length.weight, "style_mixing": config.style_mixing}
    for key, value in styled.items() if config.model.generator.kind != "stylegan2" else ():
        if value:
            found.append((key, f"{key} {value:g} needs model.generator.kind: stylegan2; set it to 0"))
    if config.bcr and config.augment.kind != "none":
        found.append(("bcr", "balanced consistency augments by itself; set augment.kind: none"))
    policy, known = config.augment.policy, POLICIES.get(config.augment.kind, ())
    parts = [policy] if config.augment.kind == "ada" else (policy or "").split(",")
    if policy and known and not set(parts) <= set(known):
        kind, some = config.augment.kind, "one" if config.augment.kind == "ada" else "some, joined by commas,"
        take = f"take {some} of {', '.join(known)}"
        found.append(("augment.policy", f"augment.policy '{policy}' is none of {kind}: {take}"))
    starts = {role: getattr(config.init, role) or config.init.source for role in ("G", "G_ema", "D")}
    if starts["G_ema"] not in (None, "fresh") and config.ema.rampup is not None and config.ema.decay is None:
        found.append(
            (
                "ema.rampup",
                f"ema.rampup {config.ema.rampup:g} makes the first step copy G over the G_ema that init loads; "
                "set ema.rampup: null, as official resuming does",
            )
        )
    if isinstance(config.augment.p, Schedule) and config.augment.kind == "ada" and config.augment.target:
        found.append(("augment.p", "augment.p is a schedule and augment.target tunes p: set augment.target: null"))
    if config.init.ada_p == "keep" and (config.augment.kind != "ada" or not config.init.source):
        found.append(("init.ada_p", "init.ada_p: keep needs augment.kind: ada and an init.source that has a p"))
    return found


def data_problems(config: Loaded, dataset: Dataset) -> list[str]:
    """What the opened shards cannot do: a generator learns from images of its own size, ADA from many of them."""
    found = []
    wanted, there = config.data.resolution, dataset.resolution
    if wanted is not None and there not in (None, wanted):
        found.append(
            f"{dataset.source} holds images of {there} px and data.resolution is {wanted}: leave the key out, "
            f"or pack them again with --resolution {wanted}"
        )
    a, seen = config.augment, config.augment.interval * config.batch_size
    if a.kind == "ada" and a.target and dataset.num_samples < seen:
        found.append(
            f"{dataset.source} has {dataset.num_samples} images, too few to tune ADA: it moves p by the signs of D on "
            f"{seen} (augment.interval {a.interval} x batch_size {config.batch_size}), which holds some images twice; "
            "lower one of the two, or set augment.target: null to keep augment.p as it is"
        )
    if config.adversarial == "relativistic" and config.fake_labels == "drawn" and dataset.num_classes:
        found.append(
            f"{dataset.source} has classes, and adversarial: relativistic compares real image i with fake i, which "
            "must be of one class; set fake_labels: real"
        )
    return found


def weights_needed(config: Loaded) -> dict[str, str]:
    """Frozen networks in use: file -> key of `weights`."""
    distils = config.sd.alpha or config.sd.log
    return {"lpips_vgg": "lpips"} if distils and config.sd.loss == "lpips-vgg" else {}


METHOD = MethodDeclaration(
    options=Options,
    problems=problems,
    data_problems=data_problems,
    weights_needed=weights_needed,
)
