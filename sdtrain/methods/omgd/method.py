"""OMGD: a student without a discriminator learns from a wide and a deep teacher that train beside it (Ren et al. 2021).

    teachers  each by the recipe of the original work, against a discriminator of its own
    student   sum over teachers of  10 (1 - SSIM) + 1e4 L_style + 10 L_feature + 1e-5 L_TV,  + lambda_CD L_CD
    L_CD      sum over layers of  || mean_hw conn(F_S) - mean_hw F_wide ||^2, of the wide teacher alone

In a step both teachers move first, and the student learns from the images they made before. Networks beside those of
`restoration/online.py`: G_deep and D_deep, the deep teacher; conn, the student's maps at the wide teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdtrain.contracts import Chunk, Loss, Phase, Stage, Terms
from sdtrain.losses.omgd_dcd import channel_distillation, omgd_terms, weighted
from sdtrain.methods.omgd.options import Options
from sdtrain.restoration.online import Online

TEACHERS = {"wide": ("G_T_raw", "D_T"), "deep": ("G_deep", "D_deep")}
VALUES_256 = 3 * 256 * 256  # of an image for which the weight of L_TV was chosen


class OMGD(Online):
    """Its phases, and the student's loss."""

    o: Options
    judges = {"D_T": "D_wide", "D_deep": "D_deep"}

    def phases(self, stage: Stage, step: int) -> Sequence[Phase]:
        self.begin_step()
        if stage.name == "teacher_pixel":
            return [self.pixel(G, name) for name, (G, _) in TEACHERS.items()]
        teachers = [phase for name, pair in TEACHERS.items() for phase in self.teaching(*pair, name, step)]
        return [*teachers, Phase(name="G", player="G", loss=self.loss_G)]

    def generate(self, G: str, x: Chunk) -> Tensor:
        """Images [N, 3, H, W] of G's own step; of the wide teacher the means of its maps are kept."""
        if G != "G_T_raw":
            return super().generate(G, x)
        fake, maps = self.with_maps(G, x)
        self.made[G, x.draws.ghosts] = fake.detach()
        self.maps[G, x.draws.ghosts] = {n: f.detach().mean((2, 3), keepdim=True) for n, f in maps.items()}
        return fake

    def loss_G(self, x: Chunk) -> Loss:
        """sum_t [ w_ssim (1 - SSIM) + w_style L_style + w_feature L_feature + w_tv L_TV ] + lambda_CD L_CD."""
        fake, maps = self.with_maps("G", x)
        taught = [self.inputs.signed(self.made[G, x.draws.ghosts]) for G, _ in TEACHERS.values()]
        losses, terms = [], Terms()
        for name, found in zip(TEACHERS, omgd_terms(self.vgg, self.inputs.signed(fake), *taught), strict=True):
            losses.append(weighted(found, self.weights(fake)))
            terms |= {f"G/{term}_{name}": value for term, value in found.items()}
        if self.layers:
            terms["G/cd"] = self.L_CD(x, maps)
            losses.append(self.o.lambda_CD * terms["G/cd"])
        return torch.stack(losses).sum(), terms

    def L_CD(self, x: Chunk, maps: Mapping[str, Tensor]) -> Tensor:
        """Channel distillation of the student's maps [N, C, h, w] by layer -> scalar."""
        connected, wide = self.nets["conn"](maps), self.maps["G_T_raw", x.draws.ghosts]
        return torch.stack([channel_distillation(connected[n], wide[n]) for n in self.layers]).sum()

    def weights(self, fake: Tensor) -> dict[str, float]:
        """Those of the terms for images [N, 3, H, W]; L_TV is a sum, here over an image."""
        r = self.o.response
        size = VALUES_256 / fake[0].numel() if r.tv_size == "256" else 1.0
        return {"ssim": r.ssim, "style": r.style, "feature": r.feature, "tv": r.tv * size / len(fake)}
