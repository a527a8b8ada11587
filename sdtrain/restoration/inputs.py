"""What a super-resolution network is fed: training pairs made on the device from high-quality images.

`Photos` serves generators that enlarge (RRDBNet, SRVGGNetCompact; images in [0, 1]), `Faces` GCFSR, whose input has the
output size already and which is told the factor (images in [-1, 1]). Both are called as `inputs(G, chunk, draws)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtrain.contracts import Chunk, Feed
from sdtrain.data.degrade.chain import Degradation, flip_images, usm
from sdtrain.data.degrade.noise import eight_bit
from sdtrain.data.degrade.pair_pool import pool_for
from sdtrain.data.degrade.resize_matlab import draw_factors, gcfsr_train_input, imresize
from sdtrain.models.layout import for_convolutions
from sdtrain.rng import Draws

if TYPE_CHECKING:
    from sdtrain.restoration.options import Loaded


class Photos:
    """Pairs (HQ crop, LQ of 1 / scale): the second-order degradation with its pool, plain bicubic, or given pairs."""

    def __init__(self, config: Loaded, scale: int) -> None:
        self.lq, self.scale, self.options = config.lq, scale, config.degradation
        self.degradation, self.sharp_target = Degradation(self.options), config.recipe.sharpen_target
        self.pool = pool_for(self.options, config.ghost_batch) if self.lq == "second_order" else None
        side = self.options.source_size if self.lq == "second_order" else self.options.crop_size
        self.feed = Feed(crop=side, pad=self.lq == "second_order", paired=self.lq == "paired", scale=scale)

    @staticmethod
    def to_range(images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 in [0, 1]."""
        return images.float().div_(255)

    @staticmethod
    def signed(images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1] -> [-1, 1], which distances and T expect."""
        return images * 2 - 1

    def prepare(self, x: Chunk, stage: str = "") -> Chunk:
        """The chunk with `real` cropped and `inputs["lq"]` made.

        Real-ESRGAN degrades the sharpened source in every stage. The stage of L1 alone (Real-ESRNet) compares with the
        crop of that very source; the others keep the raw crop, which D judges, and sharpen it in `target`.
        """
        if self.lq == "paired":
            return x
        if self.lq == "bicubic":
            return replace(x, inputs={"lq": eight_bit(imresize(x.real, 1 / self.scale))})
        pair = self.pair(x, sharpened=self.sharp_target and stage.endswith("_pixel"))
        if self.pool is not None:
            pair = self.pool(pair, x.draws)
        if "sharp" in pair:
            return replace(x, real=pair["sharp"], inputs={"lq": pair["lq"], "target": pair["sharp"]})
        return replace(x, real=pair["hq"], inputs={"lq": pair["lq"]})

    def pair(self, x: Chunk, sharpened: bool = False) -> dict[str, Tensor]:
        """The chunk's pair before the pool: `lq` [N, 3, crop / scale, ...], `hq` or `sharp` [N, 3, crop, crop]."""
        hq = flip_images(x.real, replace(x.draws, device="cpu").sub("degrade"), self.options.flip_prob)
        return self.degradation.pair(hq, x.draws, self.scale, sharpened)

    def fixed(self, x: Chunk) -> Chunk:
        """`prepare` without the pool, which figures must not stir; given pairs are replaced by bicubic ones."""
        if self.lq == "second_order":
            pair = self.pair(x)
            return replace(x, real=pair["hq"], inputs={"lq": pair["lq"]})
        return replace(x, inputs={"lq": eight_bit(imresize(x.real, 1 / self.scale))})

    def blank(self, x: Chunk) -> Chunk:
        """The shapes that `prepare` hands on."""
        side, small = self.options.crop_size, self.options.crop_size // self.scale
        real, lq = (x.real.new_zeros(len(x.real), 3, size, size) for size in (side, small))
        return replace(x, real=real, inputs={"lq": lq})

    def target(self, x: Chunk) -> Tensor:
        """What the original training compares with, [N, 3, H, W] in [0, 1].

        The ground truth, unsharp-masked in Real-ESRGAN's recipe.
        """
        if "target" in x.inputs:
            return x.inputs["target"]
        return usm(x.real) if self.sharp_target else x.real

    def __call__(self, G: Any, x: Chunk, draws: Draws, layers: Sequence[str] = ()) -> Any:
        return G(for_convolutions(x.inputs["lq"]), layers=layers)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """The pool, {ghost: {name: [...]}}, {} without one."""
        return self.pool.state() if self.pool is not None else {}

    def load_state(self, state: Mapping[int, Mapping[str, Tensor]], device: torch.device | str) -> None:
        """Take over {ghost: {name: [...]}} from `state`.

        Raises RunError for pools of another size.
        """
        if self.pool is not None:
            self.pool.load_state(state, device=device)


class Faces:
    """GCFSR's pairs: down by a factor drawn for each image, and up again."""

    scale = 1

    def __init__(self, config: Loaded) -> None:
        self.factors = tuple(config.factors)
        self.feed = Feed()

    @staticmethod
    def to_range(images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 in [-1, 1]."""
        return images.float().div_(127.5).sub_(1)

    @staticmethod
    def signed(images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1], as they are."""
        return images

    def prepare(self, x: Chunk, stage: str = "") -> Chunk:
        factors = draw_factors(x.draws, self.factors)
        lq = gcfsr_train_input((x.real + 1) / 2, factors) * 2 - 1
        factor = torch.tensor(factors, dtype=torch.float32).to(lq.device, non_blocking=True)
        return replace(x, inputs={"lq": lq, "factor": factor})

    fixed = prepare

    @staticmethod
    def blank(x: Chunk) -> Chunk:
        return replace(x, inputs={"lq": x.real, "factor": x.real.new_ones(len(x.real))})

    @staticmethod
    def target(x: Chunk) -> Tensor:
        """The ground truth [N, 3, H, W] in [-1, 1]."""
        return x.real

    def __call__(self, G: Any, x: Chunk, draws: Draws, layers: Sequence[str] = ()) -> Any:
        return G(x.inputs["lq"], x.inputs["factor"], draws.sub("noise"), layers=layers)

    def state(self) -> dict[int, dict[str, Tensor]]:
        return {}

    def load_state(self, state: Mapping[int, Mapping[str, Tensor]], device: torch.device | str) -> None:
        """{ghost: {name: [...]}} is empty: nothing is kept from step to step."""
        pass


def make_inputs(config: Loaded) -> Photos | Faces:
    generator = config.model.generator
    if generator.kind == "gcfsr":
        return Faces(config)
    return Photos(config, generator.scale if generator.kind == "rrdbnet" else generator.upscale)
