"""The keys that all methods of super-resolution share. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdtrain.config.options import R1, AdversarialLoss, Count, Fraction, Images, NonNegative, Positive, Span
from sdtrain.data.degrade.options import DegradationOptions

if TYPE_CHECKING:
    from sdtrain.config.keys import Config


@dataclass(frozen=True, kw_only=True)
class Width:
    """How narrow a student is."""

    C: str | Positive = "1/4"
    """Share of the teacher's channels, in every convolution; a number or a fraction such as 1/4."""
    growth: Literal["scaled", "fixed"] = "scaled"
    """Whether RRDBNet's growth channels shrink too; fixed at 32, students open in other tools."""
    style: Literal["fixed", "scaled"] = "fixed"
    """Whether GCFSR's style width shrinks too; the paper speaks of convolutions only."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The original work's own training, of teachers and naive baselines. Defaults are Real-ESRGAN's."""

    pixel: NonNegative = 1.0
    """Weight of L1."""
    perceptual: NonNegative = 1.0
    """Weight of the perceptual loss."""
    adversarial: NonNegative = 0.1
    """Weight of the adversarial loss of the generator."""
    pixel_share: Fraction = 0.0
    """Share of the time that trains the generator with L1 alone (Real-ESRNet: 5/7)."""
    sharpen_target: bool = True
    """The generator's target is the sharpened ground truth; the real image of D never is."""


Lq = Literal["second_order", "bicubic", "down_up"]
Measured = Literal["fid", "psnr_y", "ssim_y", "lpips", "fd_lite0", "fd_dinov2", "fd_clip"]


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
    names: tuple[Measured, ...] = ("fid", "psnr_y", "ssim_y", "lpips")
    """What is measured; fd_lite0, fd_dinov2, fd_clip are Frechet distances in the features of those networks."""
    select_by: Measured = "fid"
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
class RestorationOptions:
    """What every method of super-resolution is asked."""

    total_img: Images | None = None
    """Images after which the run ends, whatever the stages; null = all stages."""
    student: Width = Width()
    """How narrow the student is."""
    recipe: Recipe = Recipe()
    """The original work's own training."""
    perceptual: Literal["vgg19", "vgg16"] = "vgg19"
    """Network of the perceptual loss: Real-ESRGAN's and GCFSR's."""
    adversarial: AdversarialLoss = "logistic"
    """L_adv; logistic is BCE with logits as well as the non-saturating loss."""
    order: Literal["G first", "D first"] = "G first"
    """Who steps first. Real-ESRGAN: G, and D judges the images of that step; GCFSR: D."""
    r1: R1 = R1()
    """Gradient penalty of D."""
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


@dataclass(frozen=True, kw_only=True)
class Response:
    """Weights of a student's distances to a teacher's image, in VGG16."""

    style: NonNegative = 1e4
    """Weight of the distance of Gram matrices in VGG16."""
    feature: NonNegative = 10.0
    """Weight of the distance of maps at relu2_2 of VGG16."""

    @property
    def compares(self) -> bool:
        """Whether VGG16 is needed."""
        return bool(self.style or self.feature)


@dataclass(frozen=True, kw_only=True)
class OnlineOptions(RestorationOptions):
    """Of methods whose teachers train beside the student."""

    n: Span = "30 epochs"
    """Length of the run; the first recipe.pixel_share of it trains teachers alone, with L1."""
    lambda_CD: NonNegative = 1.0
    """Weight of the distance of feature maps; 0 = none is distilled."""


if TYPE_CHECKING:

    class Loaded(RestorationOptions, Config):  # type: ignore[misc]  # a method may narrow a common key
        """A loaded configuration of such a method."""

    class LoadedOnline(OnlineOptions, Loaded):  # type: ignore[misc]
        """A loaded configuration of a method whose teachers train beside the student."""

        response: Response


def weights_of_recipe(config: Loaded, perceptual: float = 0.0) -> dict[str, str]:
    """Frozen networks that training by the recipe and validation use: file -> key of `weights`.

    `perceptual`: the weight of a perceptual loss beside the recipe's.
    """
    used: dict[str, str] = {config.perceptual: "perceptual"} if config.recipe.perceptual or perceptual else {}
    return used | ({name: name for name in networks_of(config.validation.names)} if config.data.val else {})


def networks_of(names: Iterable[str]) -> list[str]:
    """The files, but for FID's, of networks that metrics of super-resolution compare images by."""
    return [name.removeprefix("fd_") for name in names if name.startswith("fd_")] + ["alex"] * ("lpips" in names)


def weights_of_responses(config: LoadedOnline) -> dict[str, str]:
    """Frozen networks of OMGD and DCD: the recipe's, and the VGG16 in which they compare images, if they do."""
    used = weights_of_recipe(config)
    return used if "vgg16" in used or not config.response.compares else used | {"vgg16": "vgg16"}
