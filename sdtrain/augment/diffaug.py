"""DiffAugment (Zhao et al. 2020) with ProjectedGAN's numbers: differentiable augmentation of real and fake images.

Every transform is a pure function of images [N, C, H, W] and explicit draws, one row a sample. x is the row axis (dim
2) and y the column axis (dim 3), as in the reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.rng import Draws

TRANSLATION_RATIO = 0.125
CUTOUT_RATIO = 0.2


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """x + (u - 0.5), u [N] in [0, 1)."""
    return x + (_each(u) - 0.5)


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """(x - m) * 2u + m with m the mean over channels, u [N] in [0, 1)."""
    mean = x.mean(dim=1, keepdim=True)
    return (x - mean) * (2 * _each(u)) + mean


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """(x - m) * (u + 0.5) + m with m the mean of the image, u [N] in [0, 1)."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_each(u) + 0.5) + mean


def translation(x: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
    """Output pixel (i, j) is input pixel (i + tx, j + ty), zero outside; tx, ty [N] whole pixels."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device) + tx.view(-1, 1)
    cols = torch.arange(width, device=x.device) + ty.view(-1, 1)
    sample = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    inside = _inside(rows, height)[:, :, None] & _inside(cols, width)[:, None, :]
    rows, cols = rows.clamp(0, height - 1)[:, :, None], cols.clamp(0, width - 1)[:, None, :]
    return x.permute(0, 2, 3, 1)[sample, rows, cols].permute(0, 3, 1, 2) * inside[:, None]


def cutout(x: Tensor, ox: Tensor, oy: Tensor, ratio: float = CUTOUT_RATIO) -> Tensor:
    """Zero a square of `ratio` of the size, centred (its pixel size // 2) at ox, oy [N] and clipped at the borders."""
    rows, cols = (_covered(n, o, ratio) for n, o in zip(x.shape[-2:], (ox, oy), strict=True))
    return x * ~(rows[:, :, None] & cols[:, None, :])[:, None]


def translation_limit(size: int, ratio: float = TRANSLATION_RATIO) -> int:
    """Largest shift in pixels."""
    return int(size * ratio + 0.5)


def cutout_size(size: int, ratio: float = CUTOUT_RATIO) -> int:
    """Side of the cut square in pixels."""
    return int(size * ratio + 0.5)


def cutout_end(size: int, ratio: float = CUTOUT_RATIO) -> int:
    """Offsets are drawn from [0, cutout_end)."""
    return size + (1 - cutout_size(size, ratio) % 2)


def _each(u: Tensor) -> Tensor:
    return u.view(-1, 1, 1, 1)


def _inside(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _covered(size: int, offset: Tensor, ratio: float) -> Tensor:
    """[N, size] bool: rows (or columns) that the square covers. A part beyond the border covers the border itself."""
    side = cutout_size(size, ratio)
    first = offset.view(-1, 1) - side // 2
    index = torch.arange(size, device=offset.device)
    last = (first + side - 1).clamp(0, size - 1)
    return (index >= first.clamp(0, size - 1)) & (index <= last) & (side > 0)


def _color(x: Tensor, draws: Draws, cutout_ratio: float) -> Tensor:
    x = brightness(x, draws.uniform("brightness"))
    x = saturation(x, draws.uniform("saturation"))
    return contrast(x, draws.uniform("contrast"))


def _translation(x: Tensor, draws: Draws, cutout_ratio: float) -> Tensor:
    rows, cols = (translation_limit(n) for n in x.shape[-2:])
    return translation(x, draws.integers("tx", -rows, rows + 1), draws.integers("ty", -cols, cols + 1))


def _cutout(x: Tensor, draws: Draws, cutout_ratio: float) -> Tensor:
    rows, cols = (cutout_end(n, cutout_ratio) for n in x.shape[-2:])
    return cutout(x, draws.integers("ox", 0, rows), draws.integers("oy", 0, cols), cutout_ratio)


POLICIES: dict[str, Callable[[Tensor, Draws, float], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}


def diff_augment(
    x: Tensor,
    draws: Draws | None,
    policy: str = "color,translation,cutout",
    cutout_ratio: float = CUTOUT_RATIO,
) -> Tensor:
    """Augment images [N, C, H, W] in the order of `policy`; every sample has its own draws, known by ghost.

    `draws=None` or an empty policy returns x. cutout_ratio is 0.2 in ProjectedGAN, 0.5 in the first DiffAugment and in
    StyleNAT. Raises ConfigError for a policy name that does not exist.
    """
    for name in filter(None, policy.replace(" ", "").split(",")):
        if name not in POLICIES:
            raise ConfigError(f"DiffAugment has no policy {name!r}; choose among {', '.join(POLICIES)}")
        if draws is not None:
            x = POLICIES[name](x, draws.sub(f"diffaug/{name}"), cutout_ratio)
    return x


def blur(x: Tensor, sigma: float) -> Tensor:
    """ProjectedGAN's fading blur: separable 2^-(i/sigma)^2 over |i| <= int(3 sigma), normalised, zero padded.

    [N, C, H, W] -> the same shape. Off in the official recipe (blur_init_sigma 0); below one tap it returns x.
    """
    radius = int(3 * sigma)
    if radius < 1:
        return x
    taps = torch.exp2(-(torch.arange(-radius, radius + 1, device=x.device) / sigma).square()).to(x.dtype)
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(x, taps, padding=(0, radius), groups=x.shape[1])
    return F.conv2d(x, taps.transpose(2, 3), padding=(radius, 0), groups=x.shape[1])
