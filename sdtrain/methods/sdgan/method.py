"""SD-GAN: the EMA generator teaches the active generator (Nowinowski and Krawiec 2026, Eq. 1-2).

    L_G = L_adv + alpha * L_SD(T(G(z)), T(G_ema(z)))                                        Eq. (2)

G_ema follows G by Eq. (1) (sdtrain/engine/ema.py). `sd.alpha: 0` is the baseline: the second term is then not computed
(or, with `sd.log: true`, only logged). Everything here serves any generator called as G(z, c, draws) and any
discriminator called as D(x, c).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdtrain.augment.ada import update_p
from sdtrain.config.schedule import Schedule, value_at
from sdtrain.contracts import Chunk, Loss, Method, Net, Phase, Stage, State, Terms
from sdtrain.losses.adversarial import ADVERSARIAL, d_loss, gradient_penalty
from sdtrain.losses.consistency import balanced_consistency
from sdtrain.losses.regularizers import path_length_penalty, path_lengths
from sdtrain.losses.self_distillation import as_teacher, lazy_weight, num_compared, self_distillation
from sdtrain.methods.sdgan.options import Options
from sdtrain.rng import Draws
from sdtrain.sampling import labels_for


class SDGAN(Method):
    """The phases of SD-GAN on the networks G, D and G_ema."""

    task = "generation"

    def __init__(
        self,
        options: Options,
        nets: Mapping[str, Net],
        *,
        z_dim: int,
        batch_size: int,
        total_img: int,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        T: Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]] | None = None,
        augment: Callable[[Tensor, Draws, float], Tensor] | None = None,
        consistent: Callable[[Tensor, Draws], Tensor] | None = None,
        class_counts: Sequence[int] = (),
    ) -> None:
        """`distance` [N, 3, H, W] twice -> [N] is that of L_SD, `T` the paired augmentation, `augment` what D sees.

        `class_counts`: samples of each class in the training set, for labels of fakes; () = those of the real batch.
        """
        self.o, self.nets = options, dict(nets)
        self.G, self.D, self.G_ema = nets["G"], nets["D"], nets["G_ema"]
        self.z_dim, self.batch_size, self.class_counts = z_dim, batch_size, tuple(class_counts)
        self.distance, self.T, self._augment, self.consistent = distance, T, augment, consistent
        self.L_adv = ADVERSARIAL[options.adversarial]
        self.stages = [
            Stage(name="main", end_img=total_img, players={"G": ("G",), "D": ("D",)}, averages={"G_ema": "G"})
        ]
        tuned = options.augment.kind == "ada" and options.augment.target
        self.steering = ("D/real_sign", "D/r1_sign") if tuned else ()
        self.snapshots = options.snapshots
        self.p = value_at(options.augment.p, 0)  # ADA's augmentation probability
        self.signs = [0.0, 0.0]  # sum and count of sign(D(real)) since p last moved
        self.pl_mean: Tensor | float = 0.0  # running mean of path lengths, `a` of the fact sheet
        self.pl_mean_before: Tensor | float = 0.0
        self.pl_global_mean: Tensor | None = None

    def phases(self, stage: Stage, step: int) -> Sequence[Phase]:
        """G, its regulariser, D, its regulariser, as the official StyleGAN2-ADA and ProjectedGAN loops order them."""
        of_G, of_D = self.phases_G(step), self.phases_D(step)
        return [*of_D, *of_G] if self.o.order == "D first" else [*of_G, *of_D]

    def phases_G(self, step: int) -> list[Phase]:
        phases = [Phase(name="G", player="G", loss=self.loss_G)]
        if self.o.path_length.weight and step % self.o.path_length.every == 0:
            phases.append(
                Phase(
                    name="G_pl",
                    player="G",
                    loss=self.loss_path_length,
                    reaches_all=False,
                    fp32=True,
                    prepass=self.mean_path_length,
                    receive=self._receive_path_length,
                )
            )
        return phases

    def phases_D(self, step: int) -> list[Phase]:
        if not self.o.r1.gamma or step % self.o.r1.every:
            return [Phase(name="D", player="D", loss=self.loss_D)]
        if self.o.r1.joint:
            return [Phase(name="D", player="D", loss=self.loss_D_penalised, reaches_all=False, fp32=True)]
        penalty = Phase(name="D_r1", player="D", loss=self.loss_penalty, reaches_all=False, fp32=True)
        return [Phase(name="D", player="D", loss=self.loss_D), penalty]

    def lazy(self) -> Mapping[str, int]:
        return {"G": self.o.path_length.every, "D": self.o.r1.every}

    def blank(self, x: Chunk) -> Chunk:
        """ADA's p may come to be anything, so let every image be augmented; schedules stand at their end."""
        self.p = 1.0 if self.steering else self.p
        return replace(x, seen_img=self.stages[-1].end_img)

    def loss_G(self, x: Chunk) -> Loss:
        """Eq. (2): L_G = L_adv + alpha * L_SD(T(G(z)), T(G_ema(z)))."""
        draws = x.draws.sub("G")
        fake = self.generate(self.G, x, draws)
        L_adv = self.loss_G_adv(fake, x, draws)
        alpha = lazy_weight(self.o.sd.alpha, self.o.sd.every, x.step)
        if alpha:
            L_SD = self.L_SD(fake, x, draws)
            return L_adv + alpha * L_SD, {"G/adv": L_adv, "G/sd": L_SD}
        if self.o.sd.log and not self.o.sd.alpha:
            with torch.no_grad():
                return L_adv, {"G/adv": L_adv, "G/sd": self.L_SD(fake, x, draws)}
        return L_adv, {"G/adv": L_adv}

    def loss_G_adv(self, fake: Tensor, x: Chunk, draws: Draws) -> Tensor:
        """L_adv of G for [N, C, H, W] in [-1, 1] -> scalar; a relativistic one compares with the step's real images."""
        fake_logits = self.D(self.augment(fake, draws, x), self.fake_labels(x, draws))
        if not self.L_adv.relativistic:
            return self.L_adv.g(fake_logits, None)
        real = self.augment(x.real, draws.sub("real"), x)
        return self.L_adv.g(fake_logits, self.D(real, x.labels))

    def L_SD(self, fake: Tensor, x: Chunk, draws: Draws) -> Tensor:
        """Mean distance of student and teacher on the same latents, under the same T; the teacher has no gradient.

        `fake`: the student's images [N, C, H, W] in [-1, 1] -> scalar.
        """
        assert self.distance is not None
        num = num_compared(self.o.sd.share, x.draws.ghost_batch)
        if num < x.draws.ghost_batch:
            fake, x, draws = x.first_of(fake, num), x.first(num), draws.first(num)
        with as_teacher(self.o.sd.teacher_precision, fake.device):
            fake_ema = self.generate(self.G_ema, x, draws, teacher=True)
        return self_distillation(fake, fake_ema.to(fake.dtype), self.distance, self.T, draws)

    def loss_D(self, x: Chunk) -> Loss:
        """The adversarial loss of D on fresh fakes and the real images of this step."""
        draws = x.draws.sub("D")
        with torch.no_grad():
            fake = self.generate(self.G, x, draws)
        return self.loss_D_of(x, x.real, fake)[:2]

    def loss_D_of(self, x: Chunk, real: Tensor, fake: Tensor) -> tuple[Tensor, Terms, Tensor, Tensor]:
        """The adversarial loss of D on given images [N, C, H, W], its terms, real and fake logits [N, ...].

        Loss and terms are scalars; images in [-1, 1], not yet augmented.
        """
        draws = x.draws.sub("D")
        real_seen, fake_seen = self.augment(real, draws.sub("real"), x), self.augment(fake, draws.sub("fake"), x)
        labels = self.fake_labels(x, draws)
        fake_logits, real_logits = self.judge(fake_seen, real_seen, labels, x.labels)
        loss, terms = d_loss(self.L_adv, real_logits, fake_logits)
        terms |= {"D/real_logit": real_logits.mean(), "D/fake_logit": fake_logits.mean()}
        terms["D/real_sign"] = real_logits.detach().sign().mean()
        if self.o.bcr:
            terms["D/bcr"] = self.consistency(x, fake_seen, labels, real_logits, fake_logits, draws.sub("bcr"))
            loss = loss + self.o.bcr * terms["D/bcr"]
        return loss, terms, real_logits, fake_logits

    def judge(
        self, fake: Tensor, real: Tensor, fake_labels: Tensor | None, real_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """D on fake and real: two passes (official; batch statistics never mix) or one over both.

        [N, C, H, W] and one-hot labels [N, num_classes] or None, of each -> logits [N, ...] of fake and real.
        """
        if self.o.d_passes == "separate":
            return self.D(fake, fake_labels), self.D(real, real_labels)
        both = None if fake_labels is None or real_labels is None else torch.cat([fake_labels, real_labels])
        fake_logits, real_logits = self.D(torch.cat([fake, real]), both).chunk(2)
        return fake_logits, real_logits

    def loss_penalty(self, x: Chunk) -> Loss:
        """R1 (and R2) in a step of its own: lazy regularisation."""
        draws = x.draws.sub("R1")
        images = {"D/r1": x.real.detach().requires_grad_(True)}
        if self.o.r1.on == "both":
            with torch.no_grad():
                images["D/r2"] = self.generate(self.G, x, draws)
            images["D/r2"].requires_grad_(True)
        seen = {n: self.augment(image, draws if n == "D/r1" else draws.sub(n), x) for n, image in images.items()}
        labels = {"D/r1": x.labels, "D/r2": self.fake_labels(x, draws)}
        logits = {n: self.D(image, labels[n]) for n, image in seen.items()}
        loss, terms = self.penalty(x, images, logits)
        return loss, {**terms, "D/r1_sign": logits["D/r1"].detach().sign().mean()}

    def loss_D_penalised(self, x: Chunk) -> Loss:
        """L_adv of D with R1 (and R2) on the same logits, one step for all, as R3GAN does."""
        real = x.real.detach().requires_grad_(True)
        with torch.no_grad():
            fake = self.generate(self.G, x, x.draws.sub("D"))
        fake.requires_grad_(True)
        loss, terms, real_logits, fake_logits = self.loss_D_of(x, real, fake)
        images, logits = {"D/r1": real}, {"D/r1": real_logits}
        if self.o.r1.on == "both":
            images["D/r2"], logits["D/r2"] = fake, fake_logits
        penalty, more = self.penalty(x, images, logits)
        return loss + penalty, {**terms, **more}

    def penalty(self, x: Chunk, images: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> Loss:
        """gamma/2 * E ||grad_x D(aug(x))||^2 for each kind of images, times the interval.

        `images` [N, C, H, W] require grad, `logits` [N, K] or [N] come from them -> the sum, and a scalar by kind.
        """
        terms = {name: gradient_penalty(images[name], logits[name]) for name in images}
        gamma = value_at(self.o.r1.gamma, x.seen_img)
        return torch.stack(list(terms.values())).sum() * (gamma / 2 * self.o.r1.every), terms

    def loss_path_length(self, x: Chunk) -> Loss:
        """weight * E (|J^T y| - a)^2, times the interval; `a` has been moved by the mean length of the global batch."""
        o = self.o.path_length
        penalty, _ = path_length_penalty(self.path_lengths(x), self.pl_mean_before, o.decay, 1.0, self.pl_global_mean)
        return penalty * (o.weight * o.every), {"G/pl": penalty}

    def consistency(
        self, x: Chunk, fake: Tensor, labels: Tensor | None, real_logits: Tensor, fake_logits: Tensor, draws: Draws
    ) -> Tensor:
        """Balanced consistency: D should say the same of an image and of its augmentation, real and fake alike.

        `fake` [N, C, H, W] as D saw it, its `labels` [N, num_classes] or None, logits [N, ...] of both -> scalar.
        """
        assert self.consistent is not None
        real_aug, fake_aug = self.consistent(x.real, draws.sub("real")), self.consistent(fake, draws.sub("fake"))
        fake_aug_logits, real_aug_logits = self.judge(fake_aug, real_aug, labels, x.labels)
        return balanced_consistency(real_logits, real_aug_logits, fake_logits, fake_aug_logits, 1.0, 1.0)

    def generate(self, G: Net, x: Chunk, draws: Draws, teacher: bool = False) -> Tensor:
        """Images [num_samples, C, H, W] in [-1, 1] of the latents in `draws`.

        A teacher sees the same latents and, unless told otherwise, noise.
        """
        z, c, noise = draws.normal("z", self.z_dim), self.fake_labels(x, draws), draws.sub("noise")
        independent = draws.sub("noise/teacher") if teacher and self.o.sd.noise == "independent" else None
        if not self.o.style_mixing:
            return G(z, c, independent or noise)
        mixing = 0.0 if teacher and self.o.sd.mixing == "none" else self.o.style_mixing
        return G(z, c, noise, mixing=mixing, layer_draws=independent)

    def fake_labels(self, x: Chunk, draws: Draws) -> Tensor | None:
        """Classes of fakes, one-hot [num_samples, num_classes] or None.

        Drawn as often as they are in the training set (official), or those of the real images.
        """
        return labels_for(draws, self.class_counts) if self.class_counts else x.labels

    def augment(self, images: Tensor, draws: Draws, x: Chunk) -> Tensor:
        """What D sees instead of `images` [N, C, H, W] in [-1, 1]: the same shape, not clamped."""
        if self._augment is None:
            return images
        given = self.o.augment.p
        p = value_at(given, x.seen_img) if isinstance(given, Schedule) else self.p
        return self._augment(images, draws.sub("augment"), p)

    def path_lengths(self, x: Chunk) -> Tensor:
        """Path lengths of smaller ghosts, [num_samples / shrink]; latents, noise and y have draws of their own."""
        few = max(x.draws.ghost_batch // self.o.path_length.shrink, 1)
        draws = replace(x.draws, ghost_batch=few).sub("G_pl")
        labels = None if x.labels is None else x.labels.unflatten(0, (len(draws.ghosts), -1))[:, :few].flatten(0, 1)
        labels = self.fake_labels(replace(x, labels=labels), draws)
        z, noise = draws.normal("z", self.z_dim), draws.sub("noise")
        images, ws = self.G(z, labels, noise, mixing=self.o.style_mixing, return_ws=True)
        return path_lengths(ws, images, draws.normal("y", *images.shape[1:]))

    def mean_path_length(self, x: Chunk) -> Terms:
        return {"pl": self.path_lengths(x).mean().detach()}

    def _receive_path_length(self, means: Terms) -> None:
        self.pl_mean_before, self.pl_global_mean = self.pl_mean, means["pl"]
        # float64, on the device: nobody waits for it
        self.pl_mean = self.pl_mean + self.o.path_length.decay * (means["pl"].double() - self.pl_mean)

    def steers_after(self, step: int) -> bool:
        """ADA moves p."""
        return bool(self.steering) and (step + 1) % self.o.augment.interval == 0

    def control(self, step: int, means: Mapping[str, float]) -> dict[str, float]:
        """ADA: every `interval` steps move p by the sign of r_t - target. Returns numbers for the log.

        r_t is the mean sign of all verdicts on augmented real images since p last moved: those of every step, and those
        of the steps of R1, which looks at the real images once more.
        """
        for name in (n for n in self.steering if n in means):
            self.signs[0] += means[name] * self.batch_size
            self.signs[1] += self.batch_size
        a = self.o.augment
        if (step + 1) % a.interval == 0 and a.target is not None:
            total, seen = self.signs
            self.p = update_p(self.p, total, seen, self.batch_size, a.interval, a.target, a.speed_img / 1000)
            self.signs = [0.0, 0.0]
        return {"ada/p": self.p}

    def state(self) -> State:
        return {"p": self.p, "signs": self.signs, "pl_mean": float(self.pl_mean)}

    def load_state(self, state: State) -> None:
        self.p, self.signs, self.pl_mean = state["p"], list(state["signs"]), state["pl_mean"]
