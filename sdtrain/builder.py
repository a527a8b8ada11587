"""What a method is built from: networks, frozen nets and distances, initialised by the seed and handed to the engine.

`methods/NAME/build.py: build(config, builder)` asks for what its method needs; the method itself sees none of this.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.config import schema
from sdtrain.config.declare import Role
from sdtrain.config.keys import Config
from sdtrain.config.options import Augment, SelfDistillation
from sdtrain.contracts import Engine, Method, Net
from sdtrain.engine.ema import freeze
from sdtrain.engine.shared import shared_weights
from sdtrain.errors import ConfigError
from sdtrain.models.ghost import set_ghost_batch, settle_spectral_norms
from sdtrain.models.recompute import recompute
from sdtrain.rng import Draws, seed_of

Distance = Callable[[Tensor, Tensor], Tensor]  # images [N, 3, H, W] in [-1, 1] twice -> [N]
Paired = Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]  # T: the same change to both
Augmentation = Callable[[Tensor, Draws, float], Tensor]  # images, draws, p -> images


@dataclass
class Builder:
    """Bound to one configuration, one data set and one engine."""

    config: Config
    engine: Engine
    resolution: int
    """Side of the training images in pixels."""
    class_counts: Sequence[int] = ()
    """Samples of each class in the training set; () = no classes."""
    steps_per_epoch: float = 0.0
    random_weights: bool = False
    """A plan builds networks without reading weights files."""
    teachers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Key of the configuration -> place and sha256 of the file that it has led to."""
    watchers: list[nn.Module] = field(default_factory=list)
    """What `frozen` has been given."""

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def method(self) -> Method:
        """The method of the configuration."""
        built = importlib.import_module(f"sdtrain.methods.{self.config.method}.build").build(self.config, self)
        assert isinstance(built, Method)
        return built

    def module(self, role: Role, section: Any, name: str, **more: Any) -> nn.Module:
        """`models/KIND/networks.py: Generator` or `Discriminator` on the CPU; `name` decides its random numbers."""
        networks = importlib.import_module(f"sdtrain.models.{section.kind}.networks")
        name_of = schema.model(section.kind).feature_weights
        if role == "discriminator" and name_of:
            more = {**more, "feature_weights": self.weights(name_of(section), self.config.weights.features)}
        if (own := getattr(section, "own_norms", 1)) not in (1, self.config.num_ghosts):
            raise ConfigError(
                f"model.{role}.own_norms {own} is not the number of ghosts, batch_size / ghost_batch = "
                f"{self.config.num_ghosts}; set it to that, or to 1 for one batch norm that all ghosts share"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.config.seed, "init", name))
            made = getattr(networks, role.capitalize())(
                section, resolution=self.resolution, num_classes=len(self.class_counts), **more
            )
        assert isinstance(made, nn.Module)
        set_ghost_batch(made, self.config.ghost_batch)
        settle_spectral_norms(made)
        if self.config.checkpoint_activations and (blocks := schema.model(section.kind).blocks.get(role)):
            recompute(made, blocks)
        return made.train()

    def generator(self, section: Any, name: str = "G") -> nn.Module:
        return self.module("generator", section, name)

    def discriminator(self, section: Any, name: str = "D") -> nn.Module:
        return self.module("discriminator", section, name)

    def nets(self, trained: Mapping[str, nn.Module], averages: Mapping[str, str]) -> dict[str, Net]:
        """Hand networks to the engine; an average is a frozen float32 copy of the network it follows."""
        copies = {name: freeze(copy.deepcopy(trained[source])) for name, source in averages.items()}
        nets = {name: self.engine.net(module) for name, module in trained.items()}
        return nets | {name: self.engine.net(module, trained=False) for name, module in copies.items()}

    def frozen(self, module: nn.Module) -> nn.Module:
        """A network that only looks on, whole on every rank."""
        self.watchers.append(freeze(module.to(self.device)))
        return self.watchers[-1]

    def weights(self, name: str, source: str | None) -> dict[str, Tensor] | None:
        """Tensors of a frozen network; None = a seeded random stand-in. Raises WeightsError."""
        return shared_weights(name, "random" if self.random_weights else source or "download")

    def distance(self, sd: SelfDistillation) -> Distance:
        """The image distance of L_SD."""
        from sdtrain.losses.self_distillation import given

        return given(sd.images, self._distance(sd))

    def _distance(self, sd: SelfDistillation) -> Distance:
        if sd.loss == "lpips-vgg":
            from sdtrain.losses.perceptual import LPIPS

            dtype = torch.bfloat16 if sd.precision == "bf16" else torch.float32
            return self.frozen(LPIPS(self.weights("lpips_vgg", self.config.weights.lpips), trunk_dtype=dtype))
        from sdtrain.losses import distance, ms_ssim

        return {"l1": distance.l1, "l2": distance.l2, "ms-ssim": ms_ssim.ms_ssim_loss}[sd.loss]

    def paired_augment(self, sd: SelfDistillation) -> Paired | None:
        """T of Eq. (2), or None."""
        if not sd.augment:
            return None
        from sdtrain.augment.paired import PairedAugment

        return PairedAugment(padding=sd.padding)

    def augmentation(self, options: Augment) -> Augmentation | None:
        """What D sees instead of the plain image, or None."""
        if options.kind == "none":
            return None
        if options.kind == "diffaug":
            from sdtrain.augment.diffaug import diff_augment

            policy = "color,translation,cutout" if options.policy is None else options.policy
            return lambda x, draws, p: diff_augment(x, draws, policy=policy, cutout_ratio=options.cutout)
        from sdtrain.augment.ada import AdaPipe

        pipe = AdaPipe(options.policy or "bgc").to(self.device)
        return lambda x, draws, p: pipe(x, p, draws)
