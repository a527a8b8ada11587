"""The keys of SDAKD. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdtrain.config.declare import MethodDeclaration
from sdtrain.config.options import (
    R1,
    AdversarialLoss,
    Count,
    Fraction,
    Images,
    NonNegative,
    Positive,
    SelfDistillation,
    Span,
)
from sdtrain.data.degrade.options import DegradationOptions
from sdtrain.methods.sdakd import checks

if TYPE_CHECKING:
    from sdtrain.config.keys import Config


@dataclass(frozen=True, kw_only=True)
class Student:
    """How narrow the students of SDAKD are."""

    C: str | Positive = "1/4"
    """Share of the teacher's channels, in every convolution; a number or a fraction such as 1/4."""
    D_C: str | Positive | None = None
    """Share of the teacher's discriminator; null = C, 1 = the naive baseline (C, 1)."""
    growth: Literal["scaled", "fixed"] = "scaled"
    """Whether RRDBNet's growth channels shrink too; fixed at 32, students open in other tools."""
    style: Literal["fixed", "scaled"] = "fixed"
    """Whether GCFSR's style width shrinks too; the paper speaks of convolutions only."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Trained networks to distil, instead of stage 1."""

    generator: str | None = None
    """File, or folder of a run that trained one (its best); null = stage 1 trains one."""
    discriminator: str | None = None
    """File, or folder of such a run (its last); null = stage 1 trains one, on the given generator if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teachers' forward passes."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The original work's own training: stage 1 and the naive baselines. Defaults are Real-ESRGAN's."""

    pixel: NonNegative = 1.0
    """Weight of L1."""
    perceptual: NonNegative = 1.0
    """Weight of the perceptual loss."""
    adversarial: NonNegative = 0.1
    """Weight of the adversarial loss of the generator."""
    pixel_share: Fraction = 0.0
    """Share of n1 that trains the generator with L1 alone (Real-ESRNet: 5/7)."""
    sharpen_target: bool = True
    """The generator's target is the sharpened ground truth; the real image of D never is."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """L_sup of SDAKD: distance to the teacher's image, with the weights of the original works."""

    pixel: NonNegative = 1.0
    """Weight of L1."""
    perceptual: NonNegative = 1.0
    """Weight of the perceptual loss."""


Lq = Literal["second_order", "bicubic", "down_up"]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a super-resolution run measures after each epoch. Inputs are made once, stored and hashed."""

    lq: Lq | tuple[Lq, ...] = "second_order"
    """How the low-quality images are made: one word or a list, whose first chooses the best weights and whose others
    are measured too (psnr_y_bicubic, ...). down_up is GCFSR's. The paper does not say for Real-ESRGAN."""
    factors: tuple[Count, ...] = (16, 32, 64)
    """[times] GCFSR: one FID each; their mean chooses."""
    seed: int = 0
    """Of the degradation and of layer noise; keep it, so that numbers of runs compare."""
    names: tuple[Literal["fid", "psnr_y", "ssim_y", "lpips"], ...] = ("fid", "psnr_y", "ssim_y", "lpips")
    """What is measured."""
    select_by: Literal["fid", "psnr_y", "ssim_y", "lpips"] = "fid"
    """What chooses the best weights of a stage; the paper: lowest FID."""
    strips: Count = 4
    """[images] Images shown as LQ | bicubic | student | teacher | HQ."""
    histogram_images: Count = 100
    """[images] Training images behind the histograms of D's outputs (Figures 2 and 3 of SDAKD)."""

    @property
    def lqs(self) -> tuple[Lq, ...]:
        """`lq` as a list."""
        return (self.lq,) if isinstance(self.lq, str) else self.lq


@dataclass(frozen=True, kw_only=True)
class Options:
    stages: tuple[Literal["teacher", "supervised", "adversarial", "naive"], ...] = (
        "teacher",
        "supervised",
        "adversarial",
    )
    """What is trained, in this order; the teacher's is left out when both its files are given; naive stands alone."""
    n1: Span = "30 epochs"
    """Length of stage 1 and of naive."""
    n2: Span = "30 epochs"
    """Length of stage 2, supervised."""
    n3: Span = "30 epochs"
    """Length of stage 3, adversarial."""
    total_img: Images | None = None
    """Images after which the run ends, whatever the stages; null = all stages."""
    student: Student = Student()
    """How narrow the students are."""
    teacher: Teacher = Teacher()
    """Trained networks to distil, instead of stage 1."""
    recipe: Recipe = Recipe()
    """The original work's own training."""
    supervision: Supervision = Supervision()
    """Distance to the teacher's image."""
    perceptual: Literal["vgg19", "vgg16"] = "vgg19"
    """Network of the perceptual loss: Real-ESRGAN's and GCFSR's."""
    lambda_1: NonNegative = 1.0
    """Weight of L_MLP; 0 = no map is distilled."""
    lambda_2: NonNegative | Literal["auto"] = 0.1
    """Weight of L_adv_S; auto balances Eq. (3) at the start of stage 3."""
    fm_layer: str | None = None
    """Map that is distilled (the paper is silent); null = the last one of the backbone, as the model names it."""
    fm_reduction: Literal["mean", "sum"] = "mean"
    """How L_MLP sums up; only a mean keeps the terms of Eq. (3) alike with lambda_1 = 1."""
    fm_tiles: Count = 1
    """[strips] Parts in which L_MLP is computed: less memory, the same value."""
    p_loss: Literal["probability", "logit"] = "probability"
    """What D_S copies in stage 2; Eq. (2) speaks of probabilities."""
    p_images: Literal["half", "real", "teacher"] = "half"
    """What D_S sees in stage 2: half ground truth and half G_T's images, or only one of them."""
    start_from: Literal["best", "last"] = "best"
    """G_S of stage 3 is that of the best validation of stage 2, or its last; D_S is its last always."""
    adversary: Literal["student", "teacher"] = "student"
    """Who judges in stage 3; teacher = Ablations 1 to 3."""
    teacher_d: Literal["train", "frozen"] = "train"
    """Whether the judging teacher goes on training (not in the paper)."""
    noise: Literal["shared", "independent"] = "shared"
    """GCFSR's layer noise of teacher and student (the paper is silent)."""
    adversarial: AdversarialLoss = "logistic"
    """L_adv; logistic is BCE with logits as well as the non-saturating loss."""
    order: Literal["G first", "D first"] = "G first"
    """Who steps first. Real-ESRGAN: G, and D judges the images of that step; GCFSR: D."""
    r1: R1 = R1()
    """Gradient penalty of D."""
    sd: SelfDistillation = SelfDistillation(alpha=0.0)
    """SD-GAN's L_SD in stage 3, on top of Eq. (3)."""
    lq: Literal["second_order", "bicubic", "down_up", "paired"] = "second_order"
    """How training inputs are made; down_up is GCFSR's, paired reads KEY.lq.png from the shards."""
    degradation: DegradationOptions = DegradationOptions()
    """The second-order degradation of Real-ESRGAN."""
    factors: tuple[Count, ...] = (64, 64, 64, 64, 32, 32, 16, 16, 8, 4)
    """[times] GCFSR: the factor of a sample is drawn uniformly from this list."""
    eval_epochs: NonNegative = 1.0
    """[epochs] Distance of validations (paper: each epoch); 0 = every eval_img images."""
    validation: Validation = Validation()
    """What is measured after each epoch."""


if TYPE_CHECKING:

    class Loaded(Options, Config):  # type: ignore[misc]  # a method may narrow a common key
        """A loaded configuration of this method."""



def weights_needed(config: Loaded) -> dict[str, str]:
    """Frozen networks in use: file -> key of `weights`."""
    vgg = config.recipe.perceptual or config.supervision.perceptual
    used: dict[str, str] = {config.perceptual: "perceptual"} if vgg else {}
    used |= {"alex": "alex"} if "lpips" in config.validation.names and config.data.val else {}
    return used | ({"lpips_vgg": "lpips"} if config.sd.alpha and config.sd.loss == "lpips-vgg" else {})


METHOD = MethodDeclaration(
    options=Options,
    players=("G_pixel", "G_original", "D_original", "G_sup", "D_sup", "G", "D"),
    decisive=("data.val", "eval_img"),  # validation chooses what stage 3 starts from
    teacher_keys=("teacher.generator", "teacher.discriminator"),
    needs_teacher=lambda config: not {"supervised", "adversarial"}.isdisjoint(config.stages),
    problems=checks.problems,
    data_problems=checks.data_problems,
    weights_needed=weights_needed,
)
