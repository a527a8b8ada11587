"""DCD: feature maps of teacher and student are compared through the teacher's discriminator (Hu et al. 2023).

    teacher   G_T and D_T by the recipe of the original work
    student   L_adv(D_T) + lambda_CD L_CD + 1e4 L_style + 10 L_feature, the last two against the teacher's image
    L_CD      sum over layers of  mean | D_h(conn_S(F_S)) - D_h(conn_T(F_T)) |, D_h the last hidden map of D_T

D_T calls ground truth real and the teacher's images fake; with `judged: both` (DCD with modified adversarial training)
the student's too. In a step G_T and D_T move first; the student learns from what G_T made before. Networks beside those
of `restoration/online.py`: conn_S and conn_T, maps as three channels that D_T can look at; both move with the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.contracts import Chunk, Loss, Phase, Stage, Terms
from sdtrain.losses.adversarial import d_loss
from sdtrain.losses.omgd_dcd import discriminator_distance, responses, style_and_feature
from sdtrain.methods.dcd.options import Options
from sdtrain.restoration.online import Online

TEACHERS = {"teacher": ("G_T_raw", "D_T")}


class DCD(Online):
    """Its phases, the student's loss, and D's with modified adversarial training."""

    o: Options
    judges = {"D_T": "D_T"}

    def phases(self, stage: Stage, step: int) -> Sequence[Phase]:
        self.begin_step()
        if stage.name == "teacher_pixel":
            return [self.pixel("G_T_raw", "teacher")]
        return [*self.teaching("G_T_raw", "D_T", "teacher", step), Phase(name="G", player="G", loss=self.loss_G)]

    def generate(self, G: str, x: Chunk) -> Tensor:
        """Images [N, 3, H, W] of G's own step, which is the teacher's; its maps are kept for the student's."""
        fake, maps = self.with_maps(G, x)
        self.made[G, x.draws.ghosts] = fake.detach()
        self.maps[G, x.draws.ghosts] = {layer: f.detach() for layer, f in maps.items()}
        return fake

    def loss_D_of(self, G: str, D: str, x: Chunk) -> Loss:
        """L(real, 1) + L(G_T, 0), or with both judged L(real, 1) + L(G_T, 0) / 2 + L(G_S, 0) / 2."""
        if self.o.judged == "teacher":
            return self.loss_D_adv(G, D, x)
        net = self.nets[D]
        real, teacher, student = net(x.real), net(self.judged(G, x)), net(self.no_grad("G", x, "G"))
        losses = [d_loss(self.L_adv, real, fake)[0] for fake in (teacher, student)]
        logits = {"real": real, "fake": teacher, "student": student}
        return (losses[0] + losses[1]) / 2, {f"D/{n}_logit": v.mean() for n, v in logits.items()}

    def loss_G(self, x: Chunk) -> Loss:
        """lambda_adv L_adv + lambda_CD L_CD + w_style L_style + w_feature L_feature (or w_sup L_sup)."""
        fake, maps = self.with_maps("G", x)
        r, o = self.o.response, self.o
        terms = {"G/adv": self.L_G_adv(self.nets["D_T"], fake, x), **self.response(x, fake)}
        weights = {"G/adv": o.lambda_adv, "G/style": r.style, "G/feature": r.feature, "G/sup": r.sup}
        if self.layers:
            terms["G/cd"], weights["G/cd"] = self.L_CD(x, fake, maps), o.lambda_CD
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), terms

    def response(self, x: Chunk, fake: Tensor) -> Terms:
        """Distances of the student's images [N, 3, H, W] to the teacher's, scalars."""
        r, terms, taught = self.o.response, Terms(), self.made["G_T_raw", x.draws.ghosts]
        if self.vgg:
            with torch.no_grad():
                aims = responses(self.vgg, self.inputs.signed(taught))
            found = style_and_feature(responses(self.vgg, self.inputs.signed(fake)), aims)
            terms |= {f"G/{name}": value for name, value in found.items()}
        if r.sup:
            w = self.o.recipe
            terms["G/sup"] = w.pixel * F.l1_loss(fake, taught)
            if w.perceptual and self.perceptual is not None:
                terms["G/sup"] = terms["G/sup"] + w.perceptual * self.perceptual(fake, taught)
        return terms

    def L_CD(self, x: Chunk, fake: Tensor, maps: Mapping[str, Tensor]) -> Tensor:
        """Distance of maps [N, C, h, w] by layer in D_T's last hidden map; `fake` [N, 3, H, W] gives the size."""
        student, teacher = self.nets["conn_S"](maps), self.nets["conn_T"](self.maps["G_T_raw", x.draws.ghosts])

        def hidden(x: Tensor) -> Tensor:
            """[N, 3, h, w] -> D's last hidden map."""
            if self.o.map_size == "image":
                x = F.interpolate(x, size=fake.shape[-2:], mode="bilinear", align_corners=False)
            return self.nets["D_T"](x, hidden=True)[1]  # type: ignore[no-any-return]

        return torch.stack([discriminator_distance(hidden, student[n], teacher[n]) for n in self.layers]).sum()
