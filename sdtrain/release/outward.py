"""A network as other programs see it: named inputs, every random number among them, outputs clamped to their range.

    RRDBNet, SRVGGNetCompact    lq [N, 3, H, W] in [0, 1] -> image [N, 3, scale H, scale W] in [0, 1]
    GCFSR                       face [N, 3, R, R] in [-1, 1], factor [N], noise -> image [N, 3, R, R] in [-1, 1]
    other GANs                  z [N, z_dim], c [N, classes] one-hot where there are classes, truncation_psi [1] where
                                there is a style space, noise -> image [N, 3, R, R] in [-1, 1]
    discriminators              x [N, 3, R, R] in [-1, 1], c as above -> logits [N, 1], not clamped

A noise input is one map, [N, 1, r, r] standard normal or zeros, named after its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdtrain.interop.network import PHOTOS, Network
from sdtrain.rng import Draws, generator

FACE = "gcfsr"
LQ_SIDE, JUDGED = 32, 256  # where an architecture does not say a side
FACTOR = 16.0  # of the faces that GCFSR is shown here
UNTOUCHED = ("mapping", "style")  # small, and too fine for float16


class GivenNoise:
    """Stands in for `Draws`: normal numbers by purpose, noted with their shapes, or those that were given."""

    def __init__(self, batch: int, maps: dict[str, Tensor] | None = None) -> None:
        self.batch, self.maps, self.asked = batch, maps, dict[str, tuple[int, ...]]()

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """[N, *shape]: zeros while they are noted, else what was given under the name of `purpose`."""
        name = input_name(purpose)
        self.asked[name] = shape
        return torch.zeros(self.batch, *shape) if self.maps is None else self.maps[name]


def input_name(purpose: str) -> str:
    """What a noise input is called: `noise_b8_conv0` for `noise/b8.conv0`."""
    return purpose.replace("/", "_").replace(".", "_")


class Outward(nn.Module):
    """`net` with the inputs above by position, in the order of `names`; in `half`, computed in float16."""

    def __init__(self, network: Network, half: bool = False, clamped: bool = True) -> None:
        """Raises WeightsError for a network that does not fit its card."""
        super().__init__()
        self.judges = network.player == "Discriminator"
        self.net: Any = network.build().requires_grad_(False)
        self.kind, self.resolution = network.kind, network.resolution
        self.num_classes, self.half_, self.clamped = network.num_classes, False, clamped
        self.lowest = 0.0 if self.kind in PHOTOS else -1.0
        self.truncates = hasattr(self.net, "mapping") and hasattr(self.net, "synthesis")
        self.noise = self._noise()
        self.half_ = half
        if half:
            for name, part in self.net.named_children():
                part.to(torch.float32 if name in UNTOUCHED else torch.float16)

    @property
    def scale(self) -> int:
        """Output pixels an input pixel."""
        return int(self.net.scale) if self.kind in PHOTOS else 1

    @property
    def side(self) -> int:
        """Of the square images that it takes or makes, or where that is free of those it is traced with."""
        return self.resolution or (JUDGED if self.judges else LQ_SIDE)

    @property
    def fold(self) -> int:
        """What the sides of an input must be a multiple of."""
        return 4 // self.scale if self.kind == "rrdbnet" else 1

    @property
    def names(self) -> tuple[str, ...]:
        classes, style = ("c",) if self.num_classes else (), ("truncation_psi",) if self.truncates else ()
        if self.judges:
            return ("x", *classes)
        if self.kind in PHOTOS:
            return ("lq",)
        if self.kind == FACE:
            return ("face", "factor", *self.noise)
        return ("z", *classes, *style, *self.noise)

    def _noise(self) -> dict[str, tuple[int, ...]]:
        """The noise maps of one forward pass, by name: their shapes without the batch."""
        if self.judges or self.kind in PHOTOS:
            return {}
        given, side = GivenNoise(1), self.resolution or 0
        face = {"face": torch.zeros(1, 3, side, side), "factor": torch.ones(1)} if self.kind == FACE else {}
        with torch.no_grad():
            self._draw({**face, **self._latents(1)}, given)
        return given.asked

    def _latents(self, batch: int, seed: object = 0) -> dict[str, Tensor]:
        if self.kind == FACE:
            return {}
        found = {"z": torch.randn(batch, int(self.net.z_dim), generator=generator("release", seed, "z"))}
        return found | self._labels(batch) | ({"truncation_psi": torch.tensor([0.7])} if self.truncates else {})

    def _labels(self, batch: int) -> dict[str, Tensor]:
        classes = self.num_classes
        return {"c": torch.eye(classes)[torch.arange(batch) % classes]} if classes else {}

    def inputs(self, batch: int, seed: object, picture: Tensor | None = None) -> dict[str, Tensor]:
        """Example inputs by name; `picture` [N, 3, H, W] in [0, 1] is shown to what does not begin with latents."""
        if self.judges:
            return {"x": cast(Tensor, picture) * 2 - 1, **self._labels(batch)}
        if self.kind in PHOTOS:
            return {"lq": cast(Tensor, picture)}
        maps = {
            name: torch.randn(batch, *shape, generator=generator("release", seed, name))
            for name, shape in self.noise.items()
        }
        if self.kind == FACE:
            return {"face": cast(Tensor, picture) * 2 - 1, "factor": torch.full((batch,), FACTOR), **maps}
        return {**self._latents(batch, seed), **maps}

    def forward(self, *values: Tensor) -> Tensor:
        """The inputs in the order of `names`, float32 -> image (or logits), float32, clamped unless told otherwise."""
        given = dict(zip(self.names, values))
        if self.judges:
            return self.net(*values)
        noise = GivenNoise(0, {name: self._low(given[name]) for name in self.noise})
        image = self._draw(given, noise).float()
        return image.clamp(self.lowest, 1.0) if self.clamped else image

    def _low(self, x: Tensor) -> Tensor:
        return x.half() if self.half_ else x

    def _draw(self, given: dict[str, Tensor], noise: GivenNoise) -> Tensor:
        draws = cast(Draws, noise)
        if self.kind in PHOTOS:
            return self.net(self._low(given["lq"]))
        if self.kind == FACE:
            return self.net(self._low(given["face"]), self._low(given["factor"]), draws)
        if not self.truncates:
            return self.net(self._low(given["z"]), given.get("c"), draws)
        ws = self.net.mapping(given["z"], given.get("c"), update_w_avg=False)
        w_avg: Tensor = self.net.mapping.w_avg
        return self.net.synthesis(w_avg + given["truncation_psi"] * (ws - w_avg), draws)


def in_order(names: Sequence[str], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(inputs[name] for name in names)
