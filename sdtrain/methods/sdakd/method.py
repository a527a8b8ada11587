"""SDAKD: a narrow student generator and a narrow student discriminator (Kaparinos and Mezaris 2025, Eq. 1-4).

    stage 1  teacher       G_T, D_T by the recipe of the original work against the ground truth
    stage 2  supervised    G_S: L_sup + lambda_1 L_MLP                        Eq. (1)    D_S: L_2(P_S, P_T)    Eq. (2)
    stage 3  adversarial   G_S: L_sup + lambda_1 L_MLP + lambda_2 L_adv_S     Eq. (3)    D_S: L_adv_S          Eq. (4)

The teacher's image replaces the ground truth in every loss of the student generator; ground truth is what D calls real.
The stage `naive` is the baseline: the recipe of the original work at the student's widths, without a teacher.
Networks: G, D are the students, G_ema the average of G, G_T, D_T the teachers, G_T_raw the generator whose average G_T
is while it trains, MLP the transform of the student's feature map, MLP_D that of D's where one is distilled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.contracts import Chunk, Loss, Net, Phase, Stage, State, Terms
from sdtrain.losses.feature import mlp_loss, probability_loss
from sdtrain.losses.self_distillation import as_teacher, lazy_weight, num_compared, self_distillation
from sdtrain.methods.sdakd.options import Options
from sdtrain.restoration.inputs import Faces, Photos
from sdtrain.restoration.recipe import OriginalRecipe
from sdtrain.rng import Draws


class SDAKD(OriginalRecipe):
    """The phases of the three stages. `inputs` makes low-quality images and calls generators on them."""

    o: Options
    steering = ("G/sup", "G/mlp", "G/adv")

    def __init__(
        self,
        options: Options,
        nets: Mapping[str, Net],
        stages: Sequence[Stage],
        inputs: Photos | Faces,
        *,
        given: tuple[str, ...] = (),
        layers: tuple[str, ...] = (),
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        T: Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """`given`: teachers that come from files; `layers`: maps that MLP distils; images are in the inputs' range."""
        super().__init__(options, nets, stages, inputs, perceptual)
        self.given, self.layers, self.distance, self.T = given, layers, distance, T
        judge = options.adversary == "teacher"  # it has the teacher's width, and starts from D_T
        self.judges = {"D_T": "D_T", "D": "D_T_judge" if judge else "D_S"}
        self.lambda_2: float | None = None if options.lambda_2 == "auto" else options.lambda_2

    def lazy(self) -> Mapping[str, int]:
        return {player: self.o.r1.every for player in ("D_original", "D_sup", "D")}

    def loss_G_stage2(self, x: Chunk) -> Loss:
        """Eq. (1): L_G_S-stage2 = L_sup + lambda_1 L_MLP."""
        _, terms = self.supervised_terms(x)
        return self.eq_1(terms), terms

    def loss_D_stage2(self, x: Chunk) -> Loss:
        """Eq. (2): L_D_S-stage2 = L_2(P_real_S, P_real_T) (+ lambda_D L_MLP of the last hidden maps)."""
        images = self.judged_in_stage2(x)
        P_T, hidden_T = self.as_teacher(x, lambda: self.nets["D_T"](images, hidden=True))
        P_S, hidden_S = self.nets["D"](images, hidden=True)
        terms = {"D/p": probability_loss(P_S, P_T, self.o.p_loss)}
        if not self.o.lambda_D:
            return terms["D/p"], terms
        terms["D/mlp"] = mlp_loss(self.nets["MLP_D"], hidden_S, hidden_T, self.o.fm_reduction)
        return terms["D/p"] + self.o.lambda_D * terms["D/mlp"], terms

    def loss_G_stage3(self, x: Chunk) -> Loss:
        """Eq. (3): L_G_S-stage3 = L_sup + lambda_1 L_MLP + lambda_2 L_adv_S (+ alpha L_SD, SD-GAN's Eq. 2)."""
        fake, terms = self.terms_of_eq_3(x)
        assert self.lambda_2 is not None  # `balance` came first
        loss = self.eq_1(terms) + self.lambda_2 * terms["G/adv"]
        if alpha := lazy_weight(self.o.sd.alpha, self.o.sd.every, x.step):
            terms["G/sd"] = self.L_SD(x, fake)
            loss = loss + alpha * terms["G/sd"]
        return loss, terms

    def loss_D_stage3(self, x: Chunk) -> Loss:
        """Eq. (4): L_D_S-stage3 = L_adv_S, the discriminator's side; ground truth is the real image."""
        return self.loss_D_adv("G", "D", x)

    def eq_1(self, terms: Terms) -> Tensor:
        """L_sup + lambda_1 L_MLP, of scalars -> scalar."""
        return terms["G/sup"] + self.o.lambda_1 * terms["G/mlp"] if self.o.lambda_1 else terms["G/sup"]

    def supervised_terms(self, x: Chunk) -> tuple[Tensor, Terms]:
        """The student's images [N, 3, H, W], and L_sup and, unless lambda_1 is 0, L_MLP, scalars."""
        draws = x.draws.sub("G")
        fake, maps = self.with_maps(self.nets["G"], x, draws)
        taught = draws if self.o.noise == "shared" else draws.sub("teacher")
        teacher, teacher_maps = self.as_teacher(x, lambda: self.with_maps(self.nets["G_T"], x, taught))
        self.made |= {("G", x.draws.ghosts): fake.detach(), ("G_T", x.draws.ghosts): teacher}
        terms = {"G/sup": self.L_sup(fake, teacher)}
        for layer in self.layers:
            terms["G/mlp"] = mlp_loss(
                self.nets["MLP"], maps[layer], teacher_maps[layer], self.o.fm_reduction, self.o.fm_tiles
            )
        return fake, terms

    def terms_of_eq_3(self, x: Chunk) -> tuple[Tensor, Terms]:
        """The student's images [N, 3, H, W], and the terms of Eq. (3), scalars."""
        fake, terms = self.supervised_terms(x)
        terms["G/adv"] = self.L_G_adv(self.nets["D"], fake, x)
        return fake, terms

    def L_sup(self, fake: Tensor, teacher: Tensor) -> Tensor:
        """L_1 (or L_2) + perceptual distance to the teacher's image, with the original work's weights.

        [N, 3, H, W] in the inputs' range twice -> scalar.
        """
        w = self.o.supervision
        loss = w.pixel * (F.mse_loss if w.distance == "l2" else F.l1_loss)(fake, teacher)
        return loss + w.perceptual * self.perceptual(fake, teacher) if w.perceptual and self.perceptual else loss

    def L_SD(self, x: Chunk, fake: Tensor) -> Tensor:
        """SD-GAN's distance between the student and its own average on the same input and noise.

        `fake` [N, 3, H, W] in the inputs' range -> scalar.
        """
        num = num_compared(self.o.sd.share, x.draws.ghost_batch)
        if num < x.draws.ghost_batch:
            fake, x = x.first_of(fake, num), x.first(num)
        with as_teacher(self.o.sd.teacher_precision, fake.device):
            fake_ema = self.no_grad("G_ema", x, "G")
        assert self.distance is not None
        both = self.inputs.signed(fake), self.inputs.signed(fake_ema.to(fake.dtype))
        return self_distillation(*both, self.distance, self.T, x.draws.sub("G"))

    def control(self, step: int, means: Mapping[str, float]) -> dict[str, float]:
        """How the weighted terms of Eq. (3) stand to L_sup, from global means: the paper wants about 1 at the start."""
        weights = {"mlp": self.o.lambda_1, "adv": self.lambda_2}
        if "G/sup" not in means or "G/adv" not in means:
            return {}
        ratios = {n: w * means[f"G/{n}"] / means["G/sup"] for n, w in weights.items() if f"G/{n}" in means and w}
        return {**{f"G/ratio_{n}": v for n, v in ratios.items()}, "G/lambda_2": weights["adv"] or 0.0}

    def balance(self, means: Terms) -> None:
        """lambda_2: auto. The weighted adversarial term becomes the mean of the other terms of Eq. (3), once."""
        others = [float(means["G/sup"])] + ([self.o.lambda_1 * float(means["G/mlp"])] if self.o.lambda_1 else [])
        self.lambda_2 = sum(others) / len(others) / max(abs(float(means["G/adv"])), 1e-12)

    def phases(self, stage: Stage, step: int) -> Sequence[Phase]:
        self.made = {}
        G, D = self.game(stage.name)
        phase_G, phase_D = self.phase_G(stage.name, G, D), self.phase_D(stage.name, G, D, step)
        d_first = self.o.order == "D first" and stage.name != "supervised"
        phases = [phase_D, phase_G] if d_first else [phase_G, phase_D]
        return [phase for phase in phases if phase.player in stage.players]

    def phase_G(self, stage: str, G: str, D: str) -> Phase:
        whole = self.o.fm_tiles == 1  # DDP cannot follow recomputed strips
        if stage == "supervised":
            return Phase(name="G", player="G_sup", loss=self.loss_G_stage2, reaches_all=whole)
        if stage == "adversarial":
            phase = Phase(name="G", player="G", loss=self.loss_G_stage3, reaches_all=whole)
            if self.lambda_2 is None:
                return replace(phase, prepass=lambda x: self.terms_of_eq_3(x)[1], receive=self.balance)
            return phase
        if stage.endswith("_pixel"):
            return Phase(name="G", player="G_pixel", loss=partial(self.loss_pixel, G))
        return Phase(name="G", player="G_original", loss=partial(self.loss_G_original, G, D))

    def phase_D(self, stage: str, G: str, D: str, step: int) -> Phase:
        if stage == "supervised":
            return Phase(name="D", player="D_sup", loss=self.loss_D_stage2)
        if stage == "adversarial":
            return self.judging("D", "D", "D", self.loss_D_stage3, step)
        return self.judging("D", "D_original", D, partial(self.loss_D_adv, G, D), step)

    def game(self, stage: str) -> tuple[str, str]:
        """Who plays in a stage: the teachers or the students."""
        if stage.startswith("teacher"):
            return "G_T_raw" if "G_T_raw" in self.nets else "G_T", "D_T"
        return "G", "D"

    def with_maps(self, G: Net, x: Chunk, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [N, 3, H, W] of G, and the maps [N, C, h, w] that MLP distils by layer."""
        return self.inputs(G, x, draws, layers=self.layers) if self.layers else (self.inputs(G, x, draws), {})

    def as_teacher(self, x: Chunk, forward: Callable[[], Any]) -> Any:
        """Without gradients, in the teachers' own precision."""
        device = x.real.device.type
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self.o.teacher.precision == "bf16"):
            return forward()

    def judged_in_stage2(self, x: Chunk) -> Tensor:
        """Images [N, 3, H, W] for Eq. (2).

        Mixed, every second sample of a ghost is real, and which half changes from step to step.
        """
        if self.o.p_images == "real":
            return x.real
        teacher = self.made["G_T", x.draws.ghosts]
        if self.o.p_images == "teacher":
            return teacher
        position = torch.arange(len(teacher), device=teacher.device) % x.draws.ghost_batch
        return torch.where(((position + x.step) % 2 == 0).view(-1, 1, 1, 1), x.real, teacher)

    def state(self) -> State:
        return {"lambda_2": self.lambda_2}

    def load_state(self, state: State) -> None:
        self.lambda_2 = state["lambda_2"]
