"""SD-GAN: the EMA generator teaches the active generator (Nowinowski and Krawiec 2026, Eq. 1-2).

    L_G = L_adv + alpha * L_SD(T(G(z)), T(G_ema(z)))                                        Eq. (2)

G_ema follows G by Eq. (1) (sdtrain/engine/ema.py). `sd.alpha: 0` is the baseline: the second term is then not computed
(or, with `sd.log: true`, only logged). Everything here serves any generator called as G(z, c, draws) and any
discriminator called as D(x, c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdtrain.contracts import Chunk, Loss, Phase, Stage, Terms
from sdtrain.losses.adversarial import ADVERSARIAL, r1_penalty
from sdtrain.losses.consistency import balanced_consistency
from sdtrain.losses.regularizers import path_length_penalty, path_lengths
from sdtrain.losses.self_distillation import self_distillation


class SDGAN:
    """The phases of SD-GAN.

    nets: G, D, G_ema, each callable. `distance(x, y) -> [N]` is the image distance of L_SD, `T(x, y, draws)` the paired
    augmentation or None, `augment(x, draws, p)` what D sees.
    """

    def __init__(
        self,
        options: Any,
        nets: Mapping[str, Any],
        *,
        batch_size: int,
        total_img: int,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        T: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]] | None = None,
        augment: Callable[[Tensor, Any, float], Tensor] | None = None,
        consistent: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        self.nets = dict(nets)
        self.o, self.G, self.D, self.G_ema = options, nets["G"], nets["D"], nets["G_ema"]
        self.batch_size = batch_size
        self.distance, self.T, self._augment, self.consistent = distance, T, augment, consistent
        self.z_dim = self.G_ema.module.z_dim
        self.adversarial = ADVERSARIAL[options.adversarial.replace("-", "_")]
        self.stages = [Stage(name="main", end_img=total_img)]
        self.p = options.augment.p  # ADA's augmentation probability
        self.signs = [0.0, 0.0]  # sum and count of sign(D(real)) since p last moved
        self.pl_mean = self.pl_mean_before = 0.0  # running mean of path lengths, `a` of the fact sheet
        self.pl_global_mean: Tensor | None = None

    @classmethod
    def build(cls, config: Any, kit: Any) -> SDGAN:
        """G, D and the average of G from the configuration."""
        G, D = kit.generator(config.model.generator), kit.discriminator(config.model.discriminator)
        nets = {"G": G, "D": D, "G_ema": kit.average_of(G)}
        distils = bool(config.sd.alpha) or config.sd.log
        return cls(
            config,
            nets,
            batch_size=config.batch_size,
            total_img=config.total_img,
            distance=kit.distance(config.sd) if distils else None,
            T=kit.paired_augment(config.sd) if distils else None,
            augment=kit.augmentation(config.augment),
            consistent=kit.consistency_augmentation() if config.bcr else None,
        )

    teachers: tuple[str, ...] = ()  # networks that never change and are in no checkpoint
    task = "generation"
    students = ("G",)
    evaluated = "G_ema"  # what validation, samples and `best/` are about

    @staticmethod
    def to_range(images: Tensor) -> Tensor:
        """uint8 in [0, 255] -> float32 in [-1, 1]."""
        return images.float().div_(127.5).sub_(1.0)

    def blank(self, x: Chunk) -> Chunk:
        """For a count of memory: ADA's p may come to be anything, so let every image be augmented."""
        self.p = 1.0 if self.controls else self.p
        return x

    def players(self, stage: str) -> dict[str, tuple[str, ...]]:
        return {"G": ("G",), "D": ("D",)}

    def averages(self, stage: str) -> dict[str, str]:
        return {"G_ema": "G"}

    def phases(self, stage: str, step: int) -> list[Phase]:
        """G, its regulariser, D, its regulariser, as the official StyleGAN2-ADA and ProjectedGAN loops order them."""
        penalty: dict[str, Any] = {"reaches_all": False, "fp32": True}
        phases = [Phase(name="G", player="G", loss=self.loss_G)]
        if self.o.path_length.weight and step % self.o.path_length.every == 0:
            penalty_of_mean = {**penalty, "prepass": self.mean_path_length, "receive": self._receive_path_length}
            phases.append(Phase(name="G_pl", player="G", loss=self.loss_path_length, **penalty_of_mean))
        phases.append(Phase(name="D", player="D", loss=self.loss_D))
        if self.o.r1.gamma and step % self.o.r1.every == 0:
            phases.append(Phase(name="D_r1", player="D", loss=self.loss_R1, **penalty))
        return phases

    def loss_G(self, x: Chunk) -> Loss:
        """Eq. (2): L_G = L_adv + alpha * L_SD(T(G(z)), T(G_ema(z)))."""
        draws = x.draws.sub("G")
        fake = self.generate(self.G, x, draws)
        L_adv = self.adversarial.g(self.D(self.augment(fake, draws), x.labels))
        if self.o.sd.alpha:
            L_SD = self.L_SD(fake, x, draws)
            return L_adv + self.o.sd.alpha * L_SD, {"G/adv": L_adv, "G/sd": L_SD}
        if self.o.sd.log:
            with torch.no_grad():
                return L_adv, {"G/adv": L_adv, "G/sd": self.L_SD(fake, x, draws)}
        return L_adv, {"G/adv": L_adv}

    def L_SD(self, fake: Tensor, x: Chunk, draws: Any) -> Tensor:
        """Mean distance of student and teacher on the same latents, under the same T; the teacher has no gradient."""
        assert self.distance is not None
        with torch.no_grad():
            fake_ema = self.generate(self.G_ema, x, draws, teacher=True)
        return self_distillation(fake, fake_ema, self.distance, self.T, draws)

    def loss_D(self, x: Chunk) -> Loss:
        """The adversarial loss of D on fresh fakes and the real images of this step."""
        draws = x.draws.sub("D")
        with torch.no_grad():
            fake = self.generate(self.G, x, draws)
        real, fake = self.augment(x.real, draws.sub("real")), self.augment(fake, draws.sub("fake"))
        fake_logits, real_logits = self.judge(fake, real, x.labels)
        on_real, on_fake = self.adversarial.d(real_logits, fake_logits)
        terms = {"D/real": on_real, "D/fake": on_fake}
        terms |= {"D/real_logit": real_logits.mean(), "D/fake_logit": fake_logits.mean()}
        terms["D/real_sign"] = real_logits.detach().sign().mean()
        loss = on_real + on_fake
        if self.o.bcr:
            terms["D/bcr"] = self.consistency(x, fake, real_logits, fake_logits, draws.sub("bcr"))
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
        """weight * E (|J^T y| - a)^2, times the interval; `a` has been moved by the mean length of the global batch."""
        o = self.o.path_length
        penalty, _ = path_length_penalty(self.path_lengths(x), self.pl_mean_before, o.decay, 1.0, self.pl_global_mean)
        return penalty * (o.weight * o.every), {"G/pl": penalty}

    def consistency(self, x: Chunk, fake: Tensor, real_logits: Tensor, fake_logits: Tensor, draws: Any) -> Tensor:
        """Balanced consistency: D should say the same of an image and of its augmentation, real and fake alike."""
        assert self.consistent is not None
        real_aug, fake_aug = self.consistent(x.real, draws.sub("real")), self.consistent(fake, draws.sub("fake"))
        fake_aug_logits, real_aug_logits = self.judge(fake_aug, real_aug, x.labels)
        return balanced_consistency(real_logits, real_aug_logits, fake_logits, fake_aug_logits, 1.0, 1.0)

    def generate(self, G: Callable[..., Any], x: Chunk, draws: Any, teacher: bool = False) -> Tensor:
        """Images of the latents in `draws`; a teacher sees the same latents and, unless told otherwise, noise."""
        z = draws.normal("z", self.z_dim)
        independent = teacher and self.o.sd.noise == "independent"
        if not self.o.style_mixing:
            return G(z, x.labels, draws.sub("noise/teacher" if independent else "noise"))
        mixing = 0.0 if teacher and self.o.sd.mixing == "none" else self.o.style_mixing
        if not independent:
            return G(z, x.labels, draws.sub("noise"), mixing=mixing)
        net = self.G_ema.module  # same mixing by the same draws, other noise
        return net.synthesis(net.styles(z, x.labels, draws.sub("noise"), mixing), draws.sub("noise/teacher"))

    def augment(self, x: Tensor, draws: Any) -> Tensor:
        return x if self._augment is None else self._augment(x, draws.sub("augment"), self.p)

    def path_lengths(self, x: Chunk) -> Tensor:
        """Path lengths of smaller ghosts, [num_samples / shrink]; latents, noise and y have draws of their own."""
        few = max(x.draws.ghost_batch // self.o.path_length.shrink, 1)
        draws = replace(x.draws, ghost_batch=few).sub("G_pl")
        labels = None if x.labels is None else x.labels.unflatten(0, (len(draws.ghosts), -1))[:, :few].flatten(0, 1)
        z, noise = draws.normal("z", self.z_dim), draws.sub("noise")
        images, ws = self.G(z, labels, noise, mixing=self.o.style_mixing, return_ws=True)
        return path_lengths(ws, images, draws.normal("y", *images.shape[1:]))

    def mean_path_length(self, x: Chunk) -> Terms:
        return {"pl": self.path_lengths(x).mean().detach()}

    def _receive_path_length(self, means: Terms) -> None:
        self.pl_mean_before, self.pl_global_mean = self.pl_mean, means["pl"]
        self.pl_mean += self.o.path_length.decay * (float(means["pl"]) - self.pl_mean)

    @property
    def controls(self) -> tuple[str, ...]:
        """Terms whose global mean `control` needs after every step."""
        return ("D/real_sign",) if self.o.augment.kind == "ada" and self.o.augment.target else ()

    def control(self, step: int, means: dict[str, float]) -> dict[str, float]:
        """ADA: every `interval` steps move p by the sign of r_t - target. Returns numbers for the log."""
        from sdtrain.augment.ada import update_p

        self.signs[0] += means["D/real_sign"] * self.batch_size
        self.signs[1] += self.batch_size
        a = self.o.augment
        if (step + 1) % a.interval == 0:
            total, seen = self.signs
            self.p = update_p(self.p, total, seen, self.batch_size, a.interval, a.target, a.speed_img / 1000)
            self.signs = [0.0, 0.0]
        return {"ada/p": self.p}

    def state(self) -> dict[str, Any]:
        return {"p": self.p, "signs": self.signs, "pl_mean": self.pl_mean}

    def load_state(self, state: dict[str, Any]) -> None:
        self.p, self.signs, self.pl_mean = state["p"], list(state["signs"]), state["pl_mean"]


METHOD = SDGAN
