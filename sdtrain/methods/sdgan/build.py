"""How SD-GAN is put together from a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdtrain.augment.consistent import consistent_augment
from sdtrain.methods.sdgan.method import SDGAN

if TYPE_CHECKING:
    from sdtrain.builder import Builder
    from sdtrain.methods.sdgan.options import Loaded


def build(config: Loaded, builder: Builder) -> SDGAN:
    """G, D and the average of G. Raises WeightsError for frozen networks that are not there."""
    G, D = builder.generator(config.model.generator), builder.discriminator(config.model.discriminator)
    distils = bool(config.sd.alpha) or config.sd.log
    z_dim: int = G.z_dim  # type: ignore[assignment]  # every generator says it
    return SDGAN(
        config,
        builder.nets({"G": G, "D": D}, averages={"G_ema": "G"}),
        z_dim=z_dim,
        batch_size=config.batch_size,
        total_img=config.total_img,
        distance=builder.distance(config.sd) if distils else None,
        T=builder.paired_augment(config.sd) if distils else None,
        augment=builder.augmentation(config.augment),
        consistent=consistent_augment if config.bcr else None,
        class_counts=builder.class_counts if config.fake_labels == "drawn" else (),
    )
