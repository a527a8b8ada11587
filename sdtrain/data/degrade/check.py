"""What a degradation cannot do, said before it is tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdtrain.data.degrade.options import DegradationOptions
from sdtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from sdtrain.rng import Draws

USM_MARGIN = 25  # pixels the sharpening mask reflects at a border

# Option name (without the order's number) -> allowed interval of both ends, open or closed as the text says.
RANGES = {
    "sigma": ("above 0 pixels", lambda v: v > 0),
    "noise_sigma": ("0 or more (unit 1/255)", lambda v: v >= 0),
    "poisson_scale": ("0 or more", lambda v: v >= 0),
    "jpeg_quality": ("inside (0, 100)", lambda v: 0 < v < 100),
}


def range_problems(o: DegradationOptions) -> Iterator[str]:
    for stem, (text, allowed) in RANGES.items():
        for name in (f"{stem}1", f"{stem}2"):
            low, high = getattr(o, name)
            if not (low <= high and allowed(low) and allowed(high)):
                yield f"{name} = [{low}, {high}] must rise and lie {text}"
    for name in ("resize_range1", "resize_range2"):
        low, high = getattr(o, name)
        if not 0 < low <= 1 <= high:
            yield f"{name} = [{low}, {high}] must be a down factor in (0, 1] and an up factor >= 1"
    for name in ("beta_generalized", "beta_plateau"):
        low, high = getattr(o, name)
        if not 0 < low <= 1 <= high:
            yield f"{name} = [{low}, {high}] must reach from a value in (0, 1] to one >= 1"


def weight_problems(o: DegradationOptions) -> Iterator[str]:
    for name, count in (("kind_prob", 6), ("resize_prob1", 3), ("resize_prob2", 3)):
        weights = getattr(o, name)
        if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
            yield f"{name} = {list(weights)} must be {count} weights, none negative, not all zero"
    for name in vars(o):
        if name.endswith(("_prob", "_prob1", "_prob2")) and isinstance(getattr(o, name), (int, float)):
            if not 0 <= getattr(o, name) <= 1:
                yield f"{name} = {getattr(o, name)} is not a probability: use a number from 0 to 1"


def size_problems(o: DegradationOptions) -> Iterator[str]:
    low, high = o.kernel_size
    if not (1 <= low <= high and low % 2 and high % 2):
        yield f"kernel_size = [{low}, {high}] must be two odd numbers in rising order"
    if not 0 < o.crop_size <= o.source_size:
        yield f"crop_size = {o.crop_size} must be positive and no larger than source_size = {o.source_size}"
    if o.pool_size < 0:
        yield f"pool_size = {o.pool_size} must be 0 (no pool) or a multiple of ghost_batch"
    if o.decisions not in ("ghost", "sample"):
        yield f"decisions = {o.decisions!r} must be 'ghost' or 'sample'"


def check_options(o: DegradationOptions) -> None:
    """Raise one ConfigError that lists every setting that cannot work."""
    problems = [*range_problems(o), *weight_problems(o), *size_problems(o)]
    if problems:
        raise ConfigError("degradation: " + "; ".join(problems))


def pool_problem(size: int, ghost_batch: int) -> str | None:
    """Why a pool of `size` pairs cannot serve ghosts of `ghost_batch` samples, and which sizes near it can."""
    if size > 0 and size % ghost_batch == 0:
        return None
    below, above = size - size % ghost_batch, size + -size % ghost_batch
    near = " or ".join(str(m) for m in dict.fromkeys((below, above)) if m > 0) or str(ghost_batch)
    return f"pool_size = {size} is not a multiple of ghost_batch = {ghost_batch}: use {near}, or 0 for no pool"


def pool_bytes(o: DegradationOptions, scale: int, sharpened: bool = False) -> int:
    """Memory and checkpoint size of one ghost's pool of pairs; sharpened images are kept as float32."""
    hq, lq = 3 * o.crop_size**2, 3 * (o.crop_size // scale) ** 2
    return o.pool_size * (hq * (4 if sharpened else 1) + lq)


def smallest_side(o: DegradationOptions, scale: int) -> int:
    """The side in pixels below which some filter would have nothing to reflect."""
    need = o.kernel_size[1] // 2 + 1
    side = need * scale  # the last filter works at the final size
    while int(side * o.resize_range1[0]) < need or int(side // scale * o.resize_range2[0]) < 1:
        side += scale
    return max(side, USM_MARGIN + 1 if o.sharpen else 0)


def check_image(o: DegradationOptions, hq: Tensor, draws: Draws, scale: int, cropped: bool = False) -> None:
    """Raise DataError for images [N, 3, H, W] that cannot be degraded, ConfigError for a scale that cannot be cut."""
    if hq.ndim != 4 or hq.shape[1] != 3 or len(hq) != draws.num_samples:
        raise DataError(f"degradation got images {tuple(hq.shape)}: it needs [{draws.num_samples}, 3, H, W]")
    side = min(hq.shape[-2:])
    need = smallest_side(o, scale)
    if side < need:
        raise DataError(
            f"images of {side} pixels are too small for this degradation at x{scale}: it needs {need} or more;"
            " use larger crops, a smaller kernel_size, or a larger lower end of resize_range1"
        )
    if cropped and o.crop_size % scale:
        raise ConfigError(f"degradation: crop_size = {o.crop_size} must be a multiple of the scale {scale}")
    if cropped and side < o.crop_size:
        raise DataError(
            f"images of {side} pixels are smaller than crop_size = {o.crop_size}: lower it or use larger images"
        )
