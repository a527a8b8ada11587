"""What cannot work in a configuration of super-resolution, said before torch is imported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sdtrain.data.degrade.check import USM_MARGIN, check_options, pool_problem, smallest_side
from sdtrain.errors import ConfigError, DataError
from sdtrain.models.width import fraction, narrowed

if TYPE_CHECKING:
    from sdtrain.data.read.dataset import Dataset
    from sdtrain.restoration.options import Loaded

GENERATORS = ("rrdbnet", "srvgg", "gcfsr")
DISCRIMINATORS = ("unet_sn", "gcfsr")
FACTORS = (4, 64)
NEEDS = (  # pixels
    "the second-order degradation needs {} pixels; lower the upper end of degradation.kernel_size, raise the lower end "
    "of degradation.resize_range1, or use larger images"
)
UNET_SIDES = 8  # a unet_sn discriminator halves and doubles three times
WIDTHS = ("num_feat", "num_grow_ch", "num_style_feat")


def problems(config: Loaded, by_recipe: bool = True) -> list[tuple[str, str]]:
    """Combinations that cannot work, as (keys, sentence). `by_recipe`: something trains as the original work does."""
    checks = (_kinds, _widths, _penalty, _inputs, _crop, _validation)
    found = [problem for check in checks for problem in check(config)]
    return found + list(_target(config)) if by_recipe else found


def _kinds(config: Loaded) -> Iterator[tuple[str, str]]:
    G, D = config.model.generator.kind, config.model.discriminator.kind
    if G not in GENERATORS:
        said = f"{config.method} distils super-resolution, and {G} does not enlarge"
        yield "model.generator.kind", f"{said}: use {_or(GENERATORS)}"
    if D not in DISCRIMINATORS:
        yield "model.discriminator.kind", f"there is no {D} for super-resolution: use {_or(DISCRIMINATORS)}"
    elif (G == "gcfsr") != (D == "gcfsr") and G in GENERATORS:
        other = "gcfsr" if G == "gcfsr" else "unet_sn"
        yield "model.discriminator.kind", f"a {D} discriminator does not belong to a {G} generator: use {other}"


def _widths(config: Loaded) -> Iterator[tuple[str, str]]:
    student = config.student
    D_C = getattr(student, "D_C", 1)  # of a method without narrow discriminators
    D = (student.C, "student.C") if D_C is None else (D_C, "student.D_C")
    scaled = {"num_grow_ch": student.growth, "num_style_feat": student.style}
    for role, C, key in (("generator", student.C, "student.C"), ("discriminator", *D)):
        section = getattr(config.model, role)
        try:
            fraction(C)
            for name in WIDTHS:
                if hasattr(section, name) and scaled.get(name) != "fixed":
                    narrowed(name, getattr(section, name), C)
        except ConfigError as error:
            yield key, f"{role}: {error}"


def _penalty(config: Loaded) -> Iterator[tuple[str, str]]:
    """GCFSR's: R1 on ground truth, within D's step."""
    if config.r1.gamma and not config.r1.joint:
        yield "r1.joint", "R1 of super-resolution belongs to D's own step, as GCFSR trains: set r1.joint: true"
    if config.r1.gamma and config.r1.on != "real":
        yield "r1.on", f"super-resolution penalises D on real images alone, not on {config.r1.on}: set r1.on: real"


def _inputs(config: Loaded) -> Iterator[tuple[str, str]]:
    faces = config.model.generator.kind == "gcfsr"
    if faces != (config.lq == "down_up"):
        yield "lq", f"lq {config.lq} does not feed {config.model.generator.kind}: use down_up for gcfsr, and only there"
    for key, factors in (("factors", config.factors), ("validation.factors", config.validation.factors)):
        bad = [factor for factor in factors if not FACTORS[0] <= factor <= FACTORS[1]]
        if faces and (bad or not factors):
            what = f"factor {bad[0]} is outside [4, 64]" if bad else "the list is empty"
            yield key, f"{key}: {what}; choose from 4, 8, 16, 32, 64"
    if config.lq == "second_order":
        yield from _degradation(config)


def _crop(config: Loaded) -> Iterator[tuple[str, str]]:
    """The generator enlarges to the crop, and the discriminator looks at it."""
    unet, crop = config.model.discriminator.kind == "unet_sn", config.degradation.crop_size
    step = math.lcm(scale_of(config), UNET_SIDES if unet else 1)
    if config.model.generator.kind != "gcfsr" and crop > 0 and crop % step:
        beside = " or ".join(str(side) for side in (crop - crop % step, crop - crop % step + step) if side)
        yield (
            "degradation.crop_size",
            f"degradation.crop_size {crop} does not fit the networks, which take multiples of {step}: set {beside}",
        )


def _target(config: Loaded) -> Iterator[tuple[str, str]]:
    crop = config.degradation.crop_size
    if config.model.generator.kind != "gcfsr" and config.recipe.sharpen_target and crop <= USM_MARGIN:
        yield (
            "recipe.sharpen_target, degradation.crop_size",
            f"recipe.sharpen_target needs crops of at least {USM_MARGIN + 1} pixels, not {crop}: enlarge "
            "degradation.crop_size or set recipe.sharpen_target: false",
        )


def _degradation(config: Loaded) -> Iterator[tuple[str, str]]:
    try:
        check_options(config.degradation)
    except ConfigError as error:
        yield "degradation", str(error)
    need, source = smallest_side(config.degradation, scale_of(config)), config.degradation.source_size
    if source < need:
        yield "degradation.source_size", f"degradation.source_size {source} is too small: {NEEDS.format(need)}"
    size = config.degradation.pool_size
    problem = pool_problem(size, config.ghost_batch) if size else None
    if problem:
        yield "degradation.pool_size, ghost_batch", problem


def _validation(config: Loaded) -> Iterator[tuple[str, str]]:
    v, faces = config.validation, config.model.generator.kind == "gcfsr"
    wrong = [lq for lq in v.lqs if (lq == "down_up") != faces]
    if wrong:
        right = "down_up" if faces else "second_order or bicubic"
        yield "validation.lq", f"validation.lq {wrong[0]} does not feed {config.model.generator.kind}: use {right}"
    if not v.lqs or len(set(v.lqs)) < len(v.lqs):
        yield "validation.lq", f"validation.lq is [{', '.join(v.lqs)}]: name at least one way, and each once"
    if v.select_by not in v.names:
        yield "validation.select_by", f"validation.select_by {v.select_by} is not measured: add it to validation.names"
    if config.eval_img and not config.data.val:
        yield "data.val", "the best weights are chosen by a validation list: give data.val, or set eval_img: 0"


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def scale_of(config: Loaded) -> int:
    """How much the generator enlarges; GCFSR keeps the size."""
    generator = config.model.generator
    return getattr(generator, "scale", 0) or getattr(generator, "upscale", 1)


def map_side(config: Loaded) -> int:
    """The side of a generator's maps of a crop; RRDBNet folds until they are a quarter of the image."""
    return config.degradation.crop_size // (4 if config.model.generator.kind == "rrdbnet" else scale_of(config))


def crop_of(config: Loaded) -> int:
    """The side a training image must have at least."""
    if config.lq == "second_order":
        return smallest_side(config.degradation, scale_of(config))
    return 1 if config.lq == "down_up" else config.degradation.crop_size


def data_problems(config: Loaded, dataset: Dataset) -> list[str]:
    """What the opened training data cannot do for this configuration, and lists that overlap."""
    found = []
    crop, side = crop_of(config), dataset.resolution
    if side and side < crop:
        said = f"{dataset.source} holds images of {side} pixels"
        second = f"{said}, and {NEEDS.format(crop)}"
        plain = f"{said}, smaller than the crop of {crop}: lower degradation.crop_size, or pack larger images"
        found.append(second if config.lq == "second_order" else plain)
    if config.lq == "paired" and not dataset.paired:
        found.append(f"{dataset.source} lacks low-quality partners (KEY.lq.png): pack pairs, or choose another lq")
    return found + overlaps(config, dataset)


def overlaps(config: Loaded, train: Dataset) -> list[str]:
    """Images that two of the lists train, val and test share, byte for byte."""
    from sdtrain.data.read.dataset import open_dataset, reading

    sets = {"train": train}
    for split in ("val", "test"):
        source = getattr(config.data, split)
        if source:
            sets[split] = open_dataset(source, **reading(config.data))
    found = []
    names = list(sets)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = shared_images(sets[one], sets[other])
            if shared:
                found.append(
                    f"data.{other} shares {len(shared)} images with data.{one} (first {shared[0]}): a list that has "
                    "seen training or selection measures nothing; pack disjoint lists"
                )
    return found


def shared_images(large: Any, small: Any) -> list[str]:
    """Keys of `small` whose stored bytes `large` holds too; only files of equal length are read."""
    wanted = {int(size) for size in small.index.size}
    candidates = [i for i, size in enumerate(large.index.size.tolist()) if size in wanted]
    lengths = {int(large.index.size[i]) for i in candidates}
    have = {_digest(large, i) for i in candidates}
    pairs = [i for i, size in enumerate(small.index.size.tolist()) if size in lengths]
    return [small.index.key(i) for i in pairs if _digest(small, i) in have]


def _digest(dataset: Dataset, i: int) -> bytes:
    try:
        return hashlib.sha256(dataset.read(i)).digest()
    except (OSError, EOFError) as error:
        raise DataError(f"sample {dataset.index.key(i)} of {dataset.source} cannot be read ({error})") from None
