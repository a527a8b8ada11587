"""SD-GAN: the EMA generator teaches the active generator (Nowinowski and Krawiec 2026, Eq. 1-2).

    L_G = L_adv + alpha * L_SD(T(G(z)), T(G_ema(z)))                                        Eq. (2)

G_ema follows G by Eq. (1) (sdtrain/engine/ema.py). `sd.alpha: 0` is the baseline: the second term is then not computed
(or, with `sd.log: true`, only logged). Everything here serves any generator called as G(z, c, draws) and any
discriminator called as D(x, c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdtrain.augment.ada import update_p
from sdtrain.losses.adversarial import ADVERSARIAL, r1_penalty
from sdtrain.losses.consistency import bcr
from sdtrain.losses.regularizers import path_length_penalty
from sdtrain.methods.phase import Chunk, Loss, Phase, Stage, Terms
from sdtrain.options import Augment, PathLength, R1, SelfDistillation


@dataclass(frozen=True, kw_only=True)
class Options:
    sd: SelfDistillation = SelfDistillation()
    adversarial: Literal["hinge", "logistic", "least-squares", "wasserstein"] = "hinge"
    augment: Augment = Augment()  # what D sees instead of the plain image, in every pass
    r1: R1 = R1()
    path_length: PathLength = PathLength()
    style_mixing: float = 0.0  # probability that a ghost's generator mixes two styles (StyleGAN2)
    bcr: float = 0.0  # weight of balanced consistency of D under augmentation (StyleNAT)
    d_passes: Literal["separate", "together"] = "separate"  # real and fake through D in two calls, or one


def problems(config: Any) -> list[tuple[str, str]]:
    """Combinations that cannot work, as (key, sentence)."""
    found = []
    if config.path_length.weight and config.model.generator.kind != "stylegan2":
        found.append(("path_length.weight", "path-length regularisation needs model.generator.kind: stylegan2; set it to 0"))
    if config.style_mixing and config.model.generator.kind != "stylegan2":
        found.append(("style_mixing", "style mixing needs model.generator.kind: stylegan2; set it to 0"))
    if config.bcr and config.augment.kind != "none":
        found.append(("bcr", "balanced consistency augments by itself; set augment.kind: none"))
    return found


class SDGAN:
    """The phases of SD-GAN.

    nets: G, D, G_ema, each callable. `distance(x, y) -> [N]` is the image distance of L_SD, `T(x, y, draws)` the paired
    augmentation or None, `augment(x, draws, p)` what D sees.
    """

    def __init__(
        self,
        options: Any,
        nets: Mapping[str, Callable[..., Any]],
        *,
        batch_size: int,
        total_img: int,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        T: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]] | None = None,
        augment: Callable[[Tensor, Any, float], Tensor] | None = None,
    ) -> None:
        self.o, self.G, self.D, self.G_ema = options, nets["G"], nets["D"], nets["G_ema"]
        self.batch_size = batch_size
        self.distance, self.T, self._augment = distance, T, augment
        self.adversarial = ADVERSARIAL[options.adversarial]
        self.stages = [Stage(name="main", end_img=total_img)]
        self.p = options.augment.p  # ADA's augmentation probability
        self.signs = [0.0, 0.0]  # sum and count of sign(D(real)) since p last moved
        self.pl_mean = 0.0  # running mean of path lengths, `a` of the fact sheet
        self.pl_global_mean: Tensor | None = None

    # What the loop asks ------------------------------------------------------------------------------------------------

    def players(self, stage: str) -> dict[str, tuple[str, ...]]:
        return {"G": ("G",), "D": ("D",)}

    def averages(self, stage: str) -> dict[str, str]:
        return {"G_ema": "G"}

    def phases(self, stage: str, step: int) -> list[Phase]:
        """G, its regulariser, D, its regulariser, as the official StyleGAN2-ADA and ProjectedGAN loops order them."""
        phases = [Phase(name="G", player="G", loss=self.loss_G)]
        if self.o.path_length.weight and step % self.o.path_length.every == 0:
            lengths = {"prepass": self.mean_path_length, "receive": self._receive_path_length}
            phases.append(Phase(name="G_pl", player="G", loss=self.loss_path_length, reaches_all=False, fp32=True, **lengths))
        phases.append(Phase(name="D", player="D", loss=self.loss_D))
        if self.o.r1.gamma and step % self.o.r1.every == 0:
            phases.append(Phase(name="D_r1", player="D", loss=self.loss_R1, reaches_all=False, fp32=True))
        return phases

    # The equations -----------------------------------------------------------------------------------------------------

    def loss_G(self, x: Chunk) -> Loss:
        """Eq. (2): L_G = L_adv + alpha * L_SD(T(G(z)), T(G_ema(z)))."""
        draws = x.draws.sub("G")
        fake = self.generate(self.G, x, draws)
        L_adv = self.adversarial.generator(self.D(self.augment(fake, draws), x.labels))
        if self.o.sd.alpha:
            L_SD = self.L_SD(fake, x, draws)
            return L_adv + self.o.sd.alpha * L_SD, {"G/adv": L_adv, "G/sd": L_SD}
        if self.o.sd.log:
            with torch.no_grad():
                return L_adv, {"G/adv": L_adv, "G/sd": self.L_SD(fake, x, draws)}
        return L_adv, {"G/adv": L_adv}

    def L_SD(self, fake: Tensor, x: Chunk, draws: Any) -> Tensor:
        """Mean distance between student and teacher on the same latents, under the same T; the teacher has no gradient."""
        assert self.distance is not None
        with torch.no_grad():
            fake_ema = self.generate(self.G_ema, x, draws, teacher=True)
        if self.T is not None:
            fake, fake_ema = self.T(fake, fake_ema, draws.sub("T"))
        return self.distance(fake, fake_ema).mean()

    def loss_D(self, x: Chunk) -> Loss:
        """The adversarial loss of D on fresh fakes and the real images of this step."""
        draws = x.draws.sub("D")
        with torch.no_grad():
            fake = self.generate(self.G, x, draws)
        real, fake = self.augment(x.real, draws.sub("real")), self.augment(fake, draws.sub("fake"))
        fake_logits, real_logits = self.judge(fake, real, x.labels)
        on_real, on_fake = self.adversarial.discriminator(real_logits, fake_logits)
        terms = {"D/real": on_real, "D/fake": on_fake}
        terms |= {"D/real_logit": real_logits.mean(), "D/fake_logit": fake_logits.mean()}
        terms["D/real_sign"] = real_logits.detach().sign().mean()
        loss = on_real + on_fake
        if self.o.bcr:
            terms["D/bcr"] = bcr(self.D, x.real, fake, fake_logits, real_logits, draws.sub("bcr"), x.labels)
            loss = loss + self.o.bcr * terms["D/bcr"]
        return loss, terms

    def judge(self, fake: Tensor, real: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """D on fake and real: two passes (official; batch statistics never mix) or one over both."""
        if self.o.d_passes == "separate":
            return self.D(fake, labels), self.D(real, labels)
        both = None if labels is None else torch.cat([labels, labels])
        fake_logits, real_logits = self.D(torch.cat([fake, real]), both).chunk(2)
        return fake_logits, real_logits

    def loss_R1(self, x: Chunk) -> Loss:
        """gamma/2 * E ||grad_x D(aug(x))||^2, times the interval: lazy regularisation."""
        real = x.real.detach().requires_grad_(True)
        logits = self.D(self.augment(real, x.draws.sub("R1")), x.labels)
        R1 = r1_penalty(real, logits)
        return R1 * (self.o.r1.gamma / 2 * self.o.r1.every), {"D/r1": R1}

    def loss_path_length(self, x: Chunk) -> Loss:
        """weight * E (|J^T y| - a)^2 with `a` already moved by the mean length of the global batch, times the interval."""
        lengths = self.path_lengths(x)
        penalty = path_length_penalty(lengths, self.pl_mean_before, self.o.path_length.decay, 1.0, self.pl_global_mean)
        return penalty * (self.o.path_length.weight * self.o.path_length.every), {"G/pl": penalty}

    # Pieces ------------------------------------------------------------------------------------------------------------

    def generate(self, G: Callable[..., Tensor], x: Chunk, draws: Any, teacher: bool = False) -> Tensor:
        """Images of the latents that `draws` holds; a teacher sees the same latents and, unless told otherwise, noise."""
        net = getattr(G, "module", G)
        z = draws.normal("z", net.z_dim)
        noise = draws.sub("noise/teacher" if teacher and self.o.sd.noise == "independent" else "noise")
        if not self.o.style_mixing:
            return G(z, x.labels, noise)
        mixing = 0.0 if teacher and self.o.sd.mixing == "none" else self.o.style_mixing
        return G(z, x.labels, noise, mixing=mixing)

    def augment(self, x: Tensor, draws: Any) -> Tensor:
        return x if self._augment is None else self._augment(x, draws.sub("augment"), self.p)

    def path_lengths(self, x: Chunk) -> Tensor:
        """Path lengths of the first `1/shrink` of every ghost, [num_samples / shrink]."""
        from sdtrain.losses.regularizers import path_lengths

        draws = x.draws.sub("G_pl")
        keep = torch.arange(draws.num_samples, device=x.real.device).view(len(draws.ghosts), -1)
        keep = keep[:, : max(draws.ghost_batch // self.o.path_length.shrink, 1)].reshape(-1)
        return path_lengths(self.G, draws, x.labels, keep, self.o.style_mixing)

    def mean_path_length(self, x: Chunk) -> Terms:
        return {"pl": self.path_lengths(x).mean().detach()}

    def _receive_path_length(self, means: Terms) -> None:
        self.pl_mean_before, self.pl_global_mean = self.pl_mean, means["pl"]
        self.pl_mean += self.o.path_length.decay * (float(means["pl"]) - self.pl_mean)

    # ADA and what a resume needs ---------------------------------------------------------------------------------------

    @property
    def controls(self) -> tuple[str, ...]:
        """Terms whose global mean `control` needs after every step."""
        return ("D/real_sign",) if self.o.augment.kind == "ada" and self.o.augment.target else ()

    def control(self, step: int, means: dict[str, float]) -> dict[str, float]:
        """ADA: every `interval` steps move p by the sign of r_t - target. Returns numbers for the log."""
        self.signs[0] += means["D/real_sign"] * self.batch_size
        self.signs[1] += self.batch_size
        a = self.o.augment
        if (step + 1) % a.interval == 0:
            self.p = update_p(self.p, *self.signs, self.batch_size, a.interval, a.target, float(a.speed_img) / 1000)
            self.signs = [0.0, 0.0]
        return {"ada/p": self.p}

    def state(self) -> dict[str, Any]:
        return {"p": self.p, "signs": self.signs, "pl_mean": self.pl_mean}

    def load_state(self, state: dict[str, Any]) -> None:
        self.p, self.signs, self.pl_mean = state["p"], list(state["signs"]), state["pl_mean"]
