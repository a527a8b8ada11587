"""FastGAN generator (Liu et al. 2021) as ProjectedGAN uses it (Sauer et al. 2021), official parameter names.

z -> unit second moment -> 4x4 -> feat_8 ... feat_R, each twice as large; skip-layer excitation lets a small feature map
gate a large one (64 by 4, 128 by 8, 256 by 16, 512 by 32); one spectrally normalised convolution makes RGB. There is no
tanh: images are nominally in [-1, 1] and clamped only when quantised.

The official network exists from 128 to 1024 pixels. At 32 and 64 pixels this file offers small siblings of our own: the
same network stopped at that resolution, with only those skip links that exist (none at 32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.errors import ConfigError
from sdtrain.models.doubling import conv_of_doubled
from sdtrain.models.fastgan.options import GeneratorOptions
from sdtrain.models.ghost import (
    Advancing,
    GhostBatchNorm2d,
    Move,
    OwnBatchNorm2d,
    SpectralConv2d,
    SpectralConvTranspose2d,
    SpectralLinear,
    normalise_ghosts,
    towards_means,
)
from sdtrain.rng import Draws

RESOLUTIONS = (32, 64, 128, 256, 512, 1024)
SMALLEST_OFFICIAL = 128
# channels at each resolution in multiples of ngf
WIDTHS = {2: 16, 4: 16, 8: 8, 16: 4, 32: 2, 64: 2, 128: 1, 256: 0.5, 512: 0.25, 1024: 0.125}
EXCITED_BY = {64: 4, 128: 8, 256: 16, 512: 32}
ENOUGH_PLACES = 64  # of an image, for which it is faster to sum up after a convolution than to repeat pixels before it


def channels(ngf: int) -> dict[int, int]:
    """Feature channels by resolution; halves are cut off like the official int()."""
    return {resolution: int(width * ngf) for resolution, width in WIDTHS.items()}


def unit_second_moment(z: Tensor) -> Tensor:
    """z / sqrt(mean over features of z^2 + 1e-8) for z [N, z_dim]."""
    return z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class GLU(nn.Module):
    """Gated linear unit: the first half of the channels times the sigmoid of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2C, ...] -> [N, C, ...]."""
        return F.glu(x, dim=1)


class NoiseInjection(nn.Module):
    """x + weight * noise with one learned scalar, zero at the start; noise [N, 1, H, W], or None for no noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """x [N, C, H, W], noise [N, 1, H, W] or None -> [N, C, H, W]."""
        # the parameter stays in the graph without noise: a data-parallel reducer waits for every gradient
        return x + self.weight * (0.0 if noise is None else noise)


class ConditionalBatchNorm2d(Advancing):
    """(1 + gain(e)) * normalised x + bias(e), with statistics per ghost (see GhostBatchNorm2d)."""

    ghost_batch: int | None = None
    eps, momentum = 1e-5, 0.1
    stored_mean: Tensor
    stored_var: Tensor

    def __init__(self, num_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.gain = SpectralLinear(embedding_dim, num_channels)
        self.bias = SpectralLinear(embedding_dim, num_channels)
        self.register_buffer("stored_mean", torch.zeros(num_channels))
        self.register_buffer("stored_var", torch.ones(num_channels))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [N, C, H, W], e [N, embedding_dim] -> [N, C, H, W].

        Raises ValueError in training unless N is a multiple of `ghost_batch`.
        """
        gain, bias = 1 + self.gain(e)[:, :, None, None], self.bias(e)[:, :, None, None]
        return self._normalised(x) * gain + bias

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.stored_mean, self.stored_var, None, None, False, 0.0, self.eps)
        out, seen = normalise_ghosts(x, self.ghost_batch, None, None, self.eps)
        self._record(seen)
        return out

    def _moves(self, entry: list[Tensor]) -> list[Move]:
        return towards_means(entry, self.stored_mean, self.stored_var, self.momentum)


def batch_norm(num_channels: int, own_norms: int) -> Advancing:
    """One for all ghosts, or one for each of `own_norms`."""
    return OwnBatchNorm2d(num_channels, own_norms) if own_norms > 1 else GhostBatchNorm2d(num_channels)


class UpConv2d(SpectralConv2d):
    """Nearest upsampling by two, then a 3x3 convolution without bias."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, c_in, H, W] -> [N, c_out, 2H, 2W]."""
        if x[0, 0].numel() >= ENOUGH_PLACES:
            return conv_of_doubled(x, self.weight)
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class InitLayer(nn.Module):
    """z [N, z_dim] -> [N, channels, 4, 4]."""

    def __init__(self, z_dim: int, num_channels: int, own_norms: int = 1) -> None:
        super().__init__()
        conv = SpectralConvTranspose2d(z_dim, 2 * num_channels, 4, bias=False)
        self.init = nn.Sequential(conv, batch_norm(2 * num_channels, own_norms), GLU())

    def forward(self, z: Tensor) -> Tensor:
        """z [N, z_dim] -> [N, num_channels, 4, 4]."""
        return self.init(unit_second_moment(z)[:, :, None, None])


class UpBlock(nn.Sequential):
    """Twice as large: nearest upsampling, then convolution, [noise,] batch norm and GLU, once (lite) or twice.

    The indices of the sequence are the official parameter names: 1 conv, 2 noise, 3 norm, 5 conv, 6 noise, 7 norm, or
    1 conv, 2 norm in the lite block. 0 is the upsampling, which the first convolution does.
    """

    def __init__(self, c_in: int, c_out: int, lite: bool = False, own_norms: int = 1) -> None:
        def stage(conv: nn.Module) -> list[nn.Module]:
            noise = [] if lite else [NoiseInjection()]
            return [conv, *noise, batch_norm(2 * c_out, own_norms), GLU()]

        again = [] if lite else stage(SpectralConv2d(c_out, 2 * c_out, 3, padding=1, bias=False))
        super().__init__(nn.Identity(), *stage(UpConv2d(c_in, 2 * c_out)), *again)
        self.num_noises = 0 if lite else 2

    def forward(self, x: Tensor, e: Tensor | None = None, noises: Sequence[Tensor | None] = (None, None)) -> Tensor:
        """x [N, c_in, H, W] -> [N, c_out, 2H, 2W]; noises [N, 1, 2H, 2W] or None each; e is ignored."""
        remaining = iter(noises)
        for layer in self:
            x = layer(x, next(remaining)) if isinstance(layer, NoiseInjection) else layer(x)
        return x


class ConditionalUpBlock(nn.Module):
    """UpBlock with conditional batch norm; both convolutions share one noise scalar, as upstream."""

    num_noises = 2

    def __init__(self, c_in: int, c_out: int, embedding_dim: int) -> None:
        super().__init__()
        self.conv1 = UpConv2d(c_in, 2 * c_out)
        self.conv2 = SpectralConv2d(c_out, 2 * c_out, 3, padding=1, bias=False)
        self.bn1 = ConditionalBatchNorm2d(2 * c_out, embedding_dim)
        self.bn2 = ConditionalBatchNorm2d(2 * c_out, embedding_dim)
        self.noise = NoiseInjection()

    def forward(self, x: Tensor, e: Tensor, noises: Sequence[Tensor | None] = (None, None)) -> Tensor:
        """x [N, c_in, H, W], e [N, embedding_dim] -> [N, c_out, 2H, 2W]; noises [N, 1, 2H, 2W] or None each."""
        x = F.glu(self.bn1(self.noise(self.conv1(x), noises[0]), e), dim=1)
        return F.glu(self.bn2(self.noise(self.conv2(x), noises[1]), e), dim=1)


class ConditionalUpBlockLite(nn.Module):
    """Lite UpBlock with conditional batch norm."""

    num_noises = 0

    def __init__(self, c_in: int, c_out: int, embedding_dim: int) -> None:
        super().__init__()
        self.conv = UpConv2d(c_in, 2 * c_out)
        self.bn = ConditionalBatchNorm2d(2 * c_out, embedding_dim)

    def forward(self, x: Tensor, e: Tensor, noises: Sequence[Tensor | None] = ()) -> Tensor:
        """x [N, c_in, H, W], e [N, embedding_dim] -> [N, c_out, 2H, 2W]; noises are ignored."""
        return F.glu(self.bn(self.conv(x), e), dim=1)


class SkipExcitation(nn.Module):
    """Skip-layer excitation: big * gate, the gate being a function of a small feature map, one number a channel."""

    def __init__(self, c_small: int, c_big: int) -> None:
        super().__init__()
        squeeze, excite = SpectralConv2d(c_small, c_big, 4, bias=False), SpectralConv2d(c_big, c_big, 1, bias=False)
        self.main = nn.Sequential(nn.AdaptiveAvgPool2d(4), squeeze, nn.SiLU(), excite, nn.Sigmoid())

    def forward(self, small: Tensor, big: Tensor) -> Tensor:
        """small [N, c_small, h, w], big [N, c_big, H, W] -> [N, c_big, H, W]."""
        return big * self.main(small)


class Synthesis(nn.Module):
    """All of the network; the official generator keeps it under the name `synthesis`."""

    def __init__(self, options: GeneratorOptions, resolution: int, num_classes: int) -> None:
        super().__init__()
        width = channels(options.ngf)
        # upstream builds the 256-pixel level always; official checkpoints of 128 pixels hold it too
        top = max(resolution, 256) if resolution >= SMALLEST_OFFICIAL else resolution
        self.levels = [r for r in WIDTHS if 8 <= r <= resolution]
        self.init = InitLayer(options.z_dim, width[2], options.own_norms)
        for r in (r for r in WIDTHS if 8 <= r <= top):
            self.add_module(f"feat_{r}", _up_block(options, width[r // 2], width[r], num_classes))
        for r, small in EXCITED_BY.items():
            if r <= top:
                self.add_module(f"se_{r}", SkipExcitation(width[small], width[r]))
        self.to_big = SpectralConv2d(width[resolution], 3, 3, padding=1)
        if num_classes:
            self.embed = nn.Embedding(options.num_embeddings, options.z_dim)
        for r in (r for r in WIDTHS if resolution < r <= top):
            self.get_submodule(f"feat_{r}").requires_grad_(False)
            self.get_submodule(f"se_{r}").requires_grad_(False)

    def forward(self, z: Tensor, c: Tensor | None, draws: Draws | None) -> Tensor:
        """z [N, z_dim], c one-hot [N, num_classes] if conditional -> images [N, 3, R, R], nominally in [-1, 1]."""
        e = None if c is None else self.embed(c.argmax(1))
        feat = {4: self.init(z)}
        for r in self.levels:
            block = self.get_submodule(f"feat_{r}")
            feat[r] = block(feat[r // 2], e, _noises(draws, r, block.num_noises))  # type: ignore[arg-type]
            if r in EXCITED_BY:
                feat[r] = self.get_submodule(f"se_{r}")(feat[EXCITED_BY[r]], feat[r])
        return self.to_big(feat[self.levels[-1]])


def _up_block(options: GeneratorOptions, c_in: int, c_out: int, num_classes: int) -> nn.Module:
    if not num_classes:
        return UpBlock(c_in, c_out, options.lite, options.own_norms)
    block = ConditionalUpBlockLite if options.lite else ConditionalUpBlock
    return block(c_in, c_out, options.z_dim)


def _noises(draws: Draws | None, resolution: int, count: int) -> list[Tensor | None]:
    if draws is None:
        return [None] * count
    return [draws.normal(f"noise/feat_{resolution}.{i}", 1, resolution, resolution) for i in range(count)]


class Generator(nn.Module):
    """FastGAN. `draws=None` runs without noise maps; the official code adds fresh noise always, also in eval.

    At 128 pixels the official network owns feat_256 and se_256 without using them. They are kept so that official files
    load strictly, and do not require gradients, so that data-parallel training does not wait for them.

    Raises ConfigError for a resolution or width that cannot be built.
    """

    def __init__(self, options: GeneratorOptions, *, resolution: int, num_classes: int = 0) -> None:
        super().__init__()
        _check(options, resolution, num_classes)
        self.z_dim, self.resolution, self.num_classes = options.z_dim, resolution, num_classes
        self.synthesis = Synthesis(options, resolution, num_classes)

    def forward(self, z: Tensor, c: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        """z [N, z_dim], c one-hot [N, num_classes] if conditional -> images [N, 3, R, R], nominally in [-1, 1].

        Raises ValueError without c if conditional, and in training unless N is a multiple of the ghost batch.
        """
        if self.num_classes and c is None:
            raise ValueError("a conditional generator needs labels c [N, num_classes]")
        return self.synthesis(z, c if self.num_classes else None, draws)


def _check(options: GeneratorOptions, resolution: int, num_classes: int) -> None:
    if resolution not in RESOLUTIONS:
        raise ConfigError(
            f"the FastGAN generator cannot make {resolution} pixels; choose a resolution among {RESOLUTIONS}"
        )
    top = max(resolution, 256) if resolution >= SMALLEST_OFFICIAL else resolution
    if channels(options.ngf)[top] < 1:
        least = int(1 / WIDTHS[top])
        raise ConfigError(f"FastGAN with ngf {options.ngf} has no channels left at {top} pixels; set ngf >= {least}")
    if num_classes > options.num_embeddings:
        raise ConfigError(
            f"FastGAN has num_embeddings {options.num_embeddings} but the data has {num_classes} classes; "
            f"set num_embeddings >= {num_classes}"
        )
    if num_classes and options.own_norms > 1:
        raise ConfigError(
            f"own_norms {options.own_norms} is for generators without classes: conditional batch norms have no affine "
            "transform of their own; set own_norms 1"
        )
