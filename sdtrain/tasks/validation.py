"""Measuring a super-resolution network on a fixed list: FID, PSNR-Y, SSIM-Y and LPIPS, the same bits on any ranks.

    RUN/inputs/SPLIT.safetensors   the low-quality inputs, 8 bits, made once; their hash is part of the protocol

Every image goes through the networks alone, so its numbers do not depend on who else is measured or on which rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdtrain.data.degrade.chain import fixed_lq
from sdtrain.data.degrade.resize_matlab import gcfsr_test_input, gcfsr_test_small, imresize
from sdtrain.data.read.dataset import open_dataset, reading
from sdtrain.data.read.reader import read_image
from sdtrain.engine.agree import share_out
from sdtrain.engine.ranks import by_main, sum_over_ranks
from sdtrain.engine.shared import shared_weights
from sdtrain.engine.writing import on_main
from sdtrain.errors import DataError
from sdtrain.metrics.fid import fid_of_features
from sdtrain.metrics.sr_metrics import psnr_y, ssim_y, to_uint8
from sdtrain.rng import Draws

if TYPE_CHECKING:
    from sdtrain.contracts import Inputs
    from sdtrain.metrics.features import Extractor
    from sdtrain.restoration.options import Loaded

HIGHER_IS_BETTER = ("psnr_y", "ssim_y")


@dataclass(frozen=True)
class Setting:
    """One way in which every image of a list was made small."""

    name: str
    """The factor, or the degradation where there are several of those."""
    lq: str
    factor: int


Upscale = Callable[[int, Setting], Tensor]  # (image number, setting) -> uint8 [1, 3, H, W]


class ValidationList:
    """One split: `hq(i)` and `lq(i, setting)` as uint8, and `measure(upscale)`."""

    def __init__(
        self,
        config: Loaded,
        split: str,
        inputs: Inputs,
        folder: Path,
        device: torch.device,
        keep_index: bool = True,
    ) -> None:
        self.config, self.split, self.inputs, self.device = config, split, inputs, device
        self.options = config.validation
        source = getattr(config.data, split)
        self.data = open_dataset(source, keep_index=keep_index, **reading(config.data))
        if self.data.num_samples < 2:
            raise DataError(f"data.{split} {source} holds {self.data.num_samples} image; FID needs at least 2")
        self.faces = config.model.generator.kind == "gcfsr"
        factors = tuple(self.options.factors) if self.faces else (inputs.scale,)
        lqs = self.options.lqs
        self.settings = [Setting(lq if len(lqs) > 1 else str(f), lq, f) for lq in lqs for f in factors]
        self.path = folder / "inputs" / f"{split}.safetensors"
        self.between: Callable[[], None] = lambda: None  # called by all ranks before each round of images

    def __len__(self) -> int:
        return self.data.num_samples

    def hq(self, i: int) -> Tensor:
        """Image i, uint8 [3, H, W], cut to whole multiples of the scale."""
        image, step = read_image(self.data, i), self.inputs.scale
        return image[:, : image.shape[1] // step * step, : image.shape[2] // step * step]

    def lq(self, i: int, setting: Setting) -> Tensor:
        """The input made of image i, uint8 [3, h, w]."""
        return self.stored[f"{i:05d}/{setting.name}"]

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """The low-quality inputs, uint8 [3, h, w]; the main rank makes them when the run folder has none.

        Collective.
        """
        from safetensors.torch import load, save

        from sdtrain.files import write_bytes

        def make() -> None:
            if not self.path.is_file():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if self.path.parent.is_symlink():
                    raise OSError(f"{self.path.parent} is a link: nothing is written through it; take it away")
                made = {f"{i:05d}/{s.name}": self._degraded(i, s) for i in range(len(self)) for s in self.settings}
                write_bytes(self.path, save(made))

        on_main(make, self.path)
        content = self.path.read_bytes()
        self.lq_hash = by_main(lambda: hashlib.sha256(content).hexdigest())
        return load(content)

    def _degraded(self, i: int, setting: Setting) -> Tensor:
        """Image i made worse [3, h, w] uint8: by image, number and `validation.seed` alone."""
        hq, how = self.hq(i).float() / 255, self.config.degradation
        if self.faces:
            return to_uint8(gcfsr_test_small(hq[None], setting.factor)[0])
        return to_uint8(fixed_lq(hq, str(i), self.options.seed, kind=setting.lq, scale=setting.factor, options=how))

    @torch.no_grad()
    def upscale(self, net: Any, i: int, setting: Setting) -> Tensor:
        """What `net` makes of input i: uint8 [1, 3, H, W] on the device; layer noise is fixed by image and seed."""
        module = getattr(net, "module", net)
        was_training = module.training
        module.eval()
        try:
            lq, factor = self.lq(i, setting).to(self.device)[None].float() / 255, setting.factor
            if not self.faces:
                return to_uint8(module(lq))
            draws = Draws(seed=self.options.seed, step=0, ghosts=(i,), ghost_batch=1, device=self.device, path="val")
            x = gcfsr_test_input(lq, factor) * 2 - 1
            side = self.hq(i).shape[-1]
            return to_uint8(module(x[..., :side, :side], float(factor), draws.sub("noise")), -1.0, 1.0)
        finally:
            module.train(was_training)

    def bicubic(self, i: int, setting: Setting) -> Tensor:
        """The input enlarged by MATLAB's bicubic, uint8 [1, 3, H, W]: what a student must beat."""
        return to_uint8(imresize(self.lq(i, setting).to(self.device)[None].float() / 255, setting.factor))

    def measure(self, upscale: Upscale) -> dict[str, float]:
        """All configured values. Collective.

        Of several factors or degradations each has its NAME_FACTOR or NAME_DEGRADATION; NAME alone is the mean over
        factors, or the value under the first degradation.
        """
        assert self.stored
        found = {setting.name: self._measure(upscale, setting) for setting in self.settings}
        first = next(iter(found.values()))
        if len(found) == 1:
            return first
        means = {n: sum(values[n] for values in found.values()) / len(found) for n in first}
        each = {f"{n}_{setting}": value for setting, values in found.items() for n, value in values.items()}
        return (means if self.faces else first) | each

    def _measure(self, upscale: Upscale, setting: Setting) -> dict[str, float]:
        singles = self._singles(setting.factor)
        rows = torch.zeros(len(self), len(singles), dtype=torch.float64, device=self.device)
        features = {n: torch.zeros(len(self), net.width, device=self.device) for n, net in self.extractors.items()}

        def measure(i: int) -> None:
            fake, real = upscale(i, setting), self.hq(i).to(self.device)[None]
            for column, distance in enumerate(singles.values()):
                rows[i, column] = distance(fake, real)[0]
            for name, extractor in self.extractors.items():
                features[name][i] = extractor(fake)[0]

        share_out(len(self), measure, self.between)
        sum_over_ranks([rows])
        sum_over_ranks(list(features.values()))
        values = dict(zip(singles, rows.mean(0).tolist()))
        values |= {name: fid_of_features(self.real_features[name], found) for name, found in features.items()}
        return {name: values[name] for name in self.options.names}

    def _singles(self, factor: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """What is measured image by image, of [1, 3, H, W] in [0, 255]. Collective, also on a rank without an image."""
        border = 0 if self.faces else factor
        known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "psnr_y": partial(psnr_y, crop_border=border),
            "ssim_y": partial(ssim_y, crop_border=border),
        }
        if "lpips" in self.options.names:
            lpips = self.lpips
            known["lpips"] = lambda fake, real: lpips(fake / 127.5 - 1, real / 127.5 - 1)
        return {name: known[name] for name in self.options.names if name in known}

    @cached_property
    def real_features(self) -> dict[str, Tensor]:
        """By metric: features of all images, float32 [num_samples, width]. Collective."""
        rows = {name: torch.zeros(len(self), net.width, device=self.device) for name, net in self.extractors.items()}

        def measure(i: int) -> None:
            for name, extractor in self.extractors.items():
                rows[name][i] = extractor(self.hq(i).to(self.device)[None])[0]

        share_out(len(self), measure, self.between)
        sum_over_ranks(list(rows.values()))
        return rows

    @cached_property
    def extractors(self) -> dict[str, Extractor]:
        """By metric: the network in whose features it is a Frechet distance. Collective."""
        names = [name for name in self.options.names if name == "fid" or name.startswith("fd_")]
        return {name: self._extractor(name) for name in names}

    def _extractor(self, metric: str) -> Extractor:
        from sdtrain.metrics import features

        kind = "inception" if metric == "fid" else metric.removeprefix("fd_")
        m, source = self.config.metrics, getattr(self.config.weights, kind) or "download"
        if kind != "inception":
            made: Callable[..., Extractor] = getattr(features, kind)
            return made(source, self.device)
        if m.extractor == "random-inception" or source == "random":
            return features.random_inception(0, int(m.tap), self._calibration, self.device)
        return features.inception(source, int(m.tap), self.device)

    def _calibration(self) -> list[Tensor]:
        return [self.hq(i)[None] for i in range(len(self))]

    @cached_property
    def lpips(self) -> Any:
        """The distance of features. Collective."""
        from sdtrain.losses.perceptual import LPIPS

        state = shared_weights("alex", self.config.weights.alex or "download")
        return LPIPS(state, net="alex").to(self.device).eval().requires_grad_(False)

    def protocol(self) -> dict[str, Any]:
        """How the values are measured; numbers compare when all of this is equal."""
        assert self.stored
        o = self.options
        return {
            "split": self.split,
            "num_images": len(self),
            "real_hash": self.data.hash,
            "lq": o.lqs[0] if len(o.lqs) == 1 else list(o.lqs),
            "lq_hash": self.lq_hash,
            "factors": list(dict.fromkeys(setting.factor for setting in self.settings)),
            "seed": o.seed,
            "fid": None,
            **{name: net.identity for name, net in self.extractors.items()},
            "lpips": f"alex, {self.config.weights.alex or 'download'}" if "lpips" in o.names else None,
            "psnr_y, ssim_y": f"8 bits, border {0 if self.faces else self.inputs.scale}",
        }
