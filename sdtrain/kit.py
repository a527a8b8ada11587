"""What a method is built from: networks, frozen nets and distances, placed on the device, initialised by the seed.

A file in `methods/` never imports the machinery; its `build(config, kit)` asks the kit for what it needs.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdtrain.config import schema
from sdtrain.engine.ema import freeze
from sdtrain.engine.player import Net
from sdtrain.models.ghost import set_ghost_batch, settle_spectral_norms
from sdtrain.rng import seed_of
from sdtrain.weights import load_weights


@dataclass
class Kit:
    """Builders bound to one run."""

    config: Any
    device: torch.device
    resolution: int
    num_classes: int
    steps_per_epoch: float = 0.0
    random_weights: bool = False  # a plan builds the networks without reading weights files

    def method(self) -> Any:
        """The method of the configuration, built: `methods/NAME.py: METHOD`."""
        return importlib.import_module(f"sdtrain.methods.{self.config.method}.method").METHOD.build(self.config, self)

    def generator(self, section: Any, role: str = "G", **more: Any) -> Net:
        """A trainable generator `models/KIND.py: Generator`."""
        return self._net("Generator", section, role, more)

    def discriminator(self, section: Any, role: str = "D", **more: Any) -> Net:
        """A trainable discriminator `models/KIND.py: Discriminator`; feature networks get their frozen weights."""
        name = schema.model(section.kind).feature_weights
        if name:
            more = {**more, "feature_weights": self.weights(name, self.config.weights.features)}
        return self._net("Discriminator", section, role, more)

    def _net(self, class_name: str, section: Any, role: str, more: dict[str, Any]) -> Net:
        module = importlib.import_module(f"sdtrain.models.{section.kind}.networks")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.config.seed, "init", role))
            net = getattr(module, class_name)(section, resolution=self.resolution, num_classes=self.num_classes, **more)
        set_ghost_batch(net, self.config.ghost_batch)
        settle_spectral_norms(net)
        return Net(net.to(self.device).train())

    def average_of(self, net: Net) -> Net:
        """An fp32 copy that follows `net` by EMA; in eval mode, without gradients."""
        return Net(freeze(copy.deepcopy(net.module)))

    def frozen(self, module: nn.Module) -> nn.Module:
        return freeze(module.to(self.device))

    def weights(self, name: str, source: str | None) -> dict[str, torch.Tensor] | None:
        """Tensors of a frozen network; None = a seeded random stand-in."""
        return load_weights(name, "random" if self.random_weights else source or "download")

    def distance(self, sd: Any) -> Any:
        """The image distance of L_SD, images in [-1, 1] -> [N]."""
        if sd.loss == "lpips-vgg":
            from sdtrain.losses.perceptual import LPIPS

            dtype = torch.bfloat16 if sd.precision == "bf16" else torch.float32
            return self.frozen(LPIPS(self.weights("lpips_vgg", self.config.weights.lpips), trunk_dtype=dtype))
        from sdtrain.losses import distance, ms_ssim

        return {"l1": distance.l1, "l2": distance.l2, "ms-ssim": ms_ssim.ms_ssim_loss}[sd.loss]

    def paired_augment(self, sd: Any) -> Any:
        """T of Eq. (2), or None."""
        if not sd.augment:
            return None
        from sdtrain.augment.paired import PairedAugment

        return PairedAugment(padding=sd.padding)

    def augmentation(self, options: Any) -> Any:
        """What D sees: a function (images, draws, p) -> images, or None."""
        if options.kind == "none":
            return None
        if options.kind == "diffaug":
            from sdtrain.augment.diffaug import diff_augment

            policy = "color,translation,cutout" if options.policy is None else options.policy
            return lambda x, draws, p: diff_augment(x, draws, policy=policy, cutout_ratio=options.cutout)
        from sdtrain.augment.ada import AdaPipe

        pipe = AdaPipe(options.policy or "bgc").to(self.device)
        return lambda x, draws, p: pipe(x, p, draws)

    def consistency_augmentation(self) -> Any:
        """What balanced consistency compares an image with: a function (images, draws) -> images."""
        from sdtrain.augment.consistent import consistent_augment

        return consistent_augment
