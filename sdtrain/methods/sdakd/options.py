"""The keys of SDAKD. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdtrain.config.declare import MethodDeclaration
from sdtrain.config.options import Count, NonNegative, Positive, SelfDistillation, Span
from sdtrain.methods.sdakd import checks
from sdtrain.restoration.options import RestorationOptions, Width, weights_of_recipe

if TYPE_CHECKING:
    from sdtrain.restoration.options import Loaded as LoadedRestoration


@dataclass(frozen=True, kw_only=True)
class Student(Width):
    """How narrow the students of SDAKD are."""

    D_C: str | Positive | None = None
    """Share of the teacher's discriminator; null = C, 1 = the naive baseline (C, 1)."""


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
class Supervision:
    """L_sup of SDAKD: distance to the teacher's image, with the weights of the original works."""

    pixel: NonNegative = 1.0
    """Weight of the distance of pixels."""
    distance: Literal["l1", "l2"] = "l1"
    """Distance of pixels; the original works train with L1."""
    perceptual: NonNegative = 1.0
    """Weight of the perceptual loss."""


@dataclass(frozen=True, kw_only=True)
class Options(RestorationOptions):
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
    student: Student = Student()
    """How narrow the students are."""
    teacher: Teacher = Teacher()
    """Trained networks to distil, instead of stage 1."""
    supervision: Supervision = Supervision()
    """Distance to the teacher's image."""
    lambda_1: NonNegative = 1.0
    """Weight of L_MLP; 0 = no map is distilled."""
    lambda_D: NonNegative = 0.0
    """Weight of L_MLP between the last hidden maps of D_S and D_T in stage 2; the paper tried it without benefit."""
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
    sd: SelfDistillation = SelfDistillation(alpha=0.0)
    """SD-GAN's L_SD in stage 3, on top of Eq. (3)."""


if TYPE_CHECKING:

    class Loaded(Options, LoadedRestoration):  # type: ignore[misc]  # a method may narrow a common key
        """A loaded configuration of this method."""


def weights_needed(config: Loaded) -> dict[str, str]:
    """Frozen networks in use: file -> key of `weights`."""
    used = weights_of_recipe(config, config.supervision.perceptual)
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
