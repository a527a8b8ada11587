"""SD-GAN as it is, with the smallest players, f = identity and L_SD = 1/2 (theta - phi)^2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdtrain.config.options import SelfDistillation
from sdtrain.methods.dirac.method import Dirac, half_square
from sdtrain.methods.sdgan.options import Options

if TYPE_CHECKING:
    from sdtrain.builder import Builder
    from sdtrain.methods.dirac.options import Loaded


def build(config: Loaded, builder: Builder) -> Dirac:
    """The two players and the average, with the weight `simulation.alpha`."""
    G, D = builder.generator(config.model.generator), builder.discriminator(config.model.discriminator)
    alpha = config.simulation.alpha
    return Dirac(
        Options(sd=SelfDistillation(alpha=alpha, augment=False), adversarial="wasserstein"),
        builder.nets({"G": G, "D": D}, averages={"G_ema": "G"}),
        z_dim=1,
        batch_size=config.batch_size,
        total_img=config.total_img,
        distance=half_square,
        simultaneous=config.simulation.updates == "simultaneous",
    )
