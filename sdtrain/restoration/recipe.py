"""How the original works train a super-resolution GAN: what every method here makes of its teachers.

Images of a step that later phases of the same step use are kept under the name of the network that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtrain.config.schedule import value_at
from sdtrain.contracts import Chunk, Loss, Net, Phase, Restoration, Stage, Tensors
from sdtrain.losses.adversarial import ADVERSARIAL, d_loss, gradient_penalty
from sdtrain.restoration.inputs import Faces, Photos
from sdtrain.restoration.options import RestorationOptions


class OriginalRecipe(Restoration):
    """The losses of Real-ESRGAN and GCFSR. `inputs` makes low-quality images and calls generators on them."""

    o: RestorationOptions
    inputs: Photos | Faces

    def __init__(
        self,
        options: RestorationOptions,
        nets: Mapping[str, Net],
        stages: Sequence[Stage],
        inputs: Photos | Faces,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        """`perceptual`: images [N, 3, H, W] in the inputs' range twice -> scalar."""
        self.o, self.nets, self.stages, self.inputs = options, dict(nets), list(stages), inputs
        self.feed, self.perceptual = inputs.feed, perceptual
        self.L_adv = ADVERSARIAL[options.adversarial]
        self.made: dict[tuple[str, Sequence[int]], Tensor] = {}  # images of this step that several phases use

    def to_range(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 in the inputs' range."""
        return self.inputs.to_range(images)

    def prepare(self, x: Chunk, stage: Stage) -> Chunk:
        return self.inputs.prepare(x, stage.name)

    def blank(self, x: Chunk) -> Chunk:
        return self.inputs.blank(x)

    def generate(self, G: str, x: Chunk) -> Tensor:
        """Images [N, 3, H, W] of G's own step, with a graph."""
        fake = self.inputs(self.nets[G], x, x.draws.sub("G"))
        self.made[G, x.draws.ghosts] = fake.detach()
        return fake  # type: ignore[no-any-return]  # what a generator called without layers gives

    def loss_pixel(self, G: str, x: Chunk) -> Loss:
        """Real-ESRNet: L1 to the sharpened ground truth."""
        L_1 = F.l1_loss(self.generate(G, x), self.inputs.target(x))
        return L_1, {"G/l1": L_1}

    def loss_G_original(self, G: str, D: str, x: Chunk) -> Loss:
        """w_1 L_1 + w_p L_perceptual + w_adv L_adv_T against the ground truth, as the original works train."""
        fake, target, w = self.generate(G, x), self.inputs.target(x), self.o.recipe
        terms = {"G/l1": F.l1_loss(fake, target), "G/adv": self.L_G_adv(self.nets[D], fake, x)}
        loss = w.pixel * terms["G/l1"] + w.adversarial * terms["G/adv"]
        if w.perceptual and self.perceptual is not None:
            terms["G/perceptual"] = self.perceptual(fake, target)
            loss = loss + w.perceptual * terms["G/perceptual"]
        return loss, terms

    def loss_D_adv(self, G: str, D: str, x: Chunk) -> Loss:
        """L_adv of D on the ground truth and on images of G: those of G's step, or new ones when D comes first."""
        real_logits, fake_logits = self.nets[D](x.real), self.nets[D](self.judged(G, x))
        loss, terms = d_loss(self.L_adv, real_logits, fake_logits)
        logits = {"D/real_logit": real_logits.mean(), "D/fake_logit": fake_logits.mean()}
        return loss, {**terms, **logits}

    def judged(self, G: str, x: Chunk) -> Tensor:
        """Images [N, 3, H, W] of G that D is to call fake, without a graph."""
        kept = self.made.get((G, x.draws.ghosts)) if self.o.order == "G first" else None
        return self.no_grad(G, x, "D") if kept is None else kept

    def L_G_adv(self, D: Net, fake: Tensor, x: Chunk) -> Tensor:
        """L_adv of G for its images [N, 3, H, W] -> scalar; a relativistic one compares with the ground truth."""
        return self.L_adv.g(D(fake), D(x.real) if self.L_adv.relativistic else None)

    def with_R1(self, D: str, loss: Callable[[Chunk], Loss], x: Chunk) -> Loss:
        """L_adv + gamma/2 * interval * E ||grad_x D(x)||^2, one step for both as GCFSR does."""
        total, terms = loss(x)
        real = x.real.detach().requires_grad_(True)
        R1 = gradient_penalty(real, self.nets[D](real))
        gamma = value_at(self.o.r1.gamma, x.seen_img)
        return total + R1 * (gamma / 2 * self.o.r1.every), {**terms, "D/r1": R1}

    def judging(self, name: str, player: str, D: str, loss: Callable[[Chunk], Loss], step: int) -> Phase:
        """The phase in which D learns by `loss`, with R1 in its turn."""
        if self.o.r1.gamma and step % self.o.r1.every == 0:
            penalised = partial(self.with_R1, D, loss)
            return Phase(name=name, player=player, loss=penalised, reaches_all=False, fp32=True)
        return Phase(name=name, player=player, loss=loss)

    def no_grad(self, G: str, x: Chunk, purpose: str) -> Tensor:
        """Images [N, 3, H, W] of G in the inputs' range, without a graph."""
        with torch.no_grad():
            return self.inputs(self.nets[G], x, x.draws.sub(purpose))  # type: ignore[no-any-return]

    def ghost_state(self) -> Mapping[int, Tensors]:
        """{ghost: {name: [...]}}, the pair pools."""
        return self.inputs.state()

    def load_ghost_state(self, state: Mapping[int, Tensors], device: torch.device) -> None:
        """Take over {ghost: {name: [...]}}. Raises RunError for pools of another size."""
        self.inputs.load_state(state, device)
