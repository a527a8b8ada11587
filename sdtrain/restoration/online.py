"""What OMGD and DCD share: teachers that train by the original recipe beside the student, and a response network.

Networks: G is the student, G_ema its average, G_T_raw and D_T a teacher and its discriminator, G_T the average of
G_T_raw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from sdtrain.contracts import Chunk, Loss, Net, Phase, Stage
from sdtrain.losses.feature import VGGFeatures
from sdtrain.restoration.inputs import Faces, Photos
from sdtrain.restoration.options import OnlineOptions
from sdtrain.restoration.recipe import OriginalRecipe


class Online(OriginalRecipe):
    """Teachers take their steps first; the student learns from the images they made before them."""

    o: OnlineOptions

    def __init__(
        self,
        options: OnlineOptions,
        nets: Mapping[str, Net],
        stages: Sequence[Stage],
        inputs: Photos | Faces,
        *,
        layers: tuple[str, ...],
        vgg: VGGFeatures | None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """`layers`: maps that are distilled; `vgg`: in which responses are compared."""
        super().__init__(options, nets, stages, inputs, perceptual)
        self.layers, self.vgg = layers, vgg
        self.maps: dict[tuple[str, Sequence[int]], Mapping[str, Tensor]] = {}  # of teachers, in this step

    def begin_step(self) -> None:
        self.made, self.maps = {}, {}

    def teaching(self, G: str, D: str, name: str, step: int) -> list[Phase]:
        """The phases of one teacher, whose terms are logged as NAME/... and whose players are G_NAME and D_NAME."""
        original, judge = partial(self.loss_G_original, G, D), partial(self.loss_D_of, G, D)
        phase_G = Phase(name=f"G_{name}", player=f"G_{name}", loss=logged_as(name, original))
        phase_D = self.judging(f"D_{name}", f"D_{name}", D, judge, step)
        phase_D = replace(phase_D, loss=logged_as(name, phase_D.loss))
        return [phase_D, phase_G] if self.o.order == "D first" else [phase_G, phase_D]

    def loss_D_of(self, G: str, D: str, x: Chunk) -> Loss:
        """What a teacher's discriminator learns by; DCD with modified training judges the student too."""
        return self.loss_D_adv(G, D, x)

    def pixel(self, G: str, name: str) -> Phase:
        """Real-ESRNet, for a teacher."""
        return Phase(name=f"G_{name}", player=f"G_{name}_pixel", loss=logged_as(name, partial(self.loss_pixel, G)))

    def with_maps(self, G: str, x: Chunk) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Images [N, 3, H, W] of G's own step and its maps [N, C, h, w] by layer, all with a graph."""
        if not self.layers:
            return self.inputs(self.nets[G], x, x.draws.sub("G")), {}
        fake, maps = self.inputs(self.nets[G], x, x.draws.sub("G"), layers=self.layers)
        return fake, maps


def logged_as(name: str, loss: Callable[[Chunk], Loss]) -> Callable[[Chunk], Loss]:
    """`loss` with its terms G/l1, D/adv as G_NAME/l1, D_NAME/adv."""

    def renamed(x: Chunk) -> Loss:
        total, terms = loss(x)
        return total, {f"{term[0]}_{name}{term[1:]}": value for term, value in terms.items()}

    return renamed
