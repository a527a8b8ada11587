"""The keys of DCD for super-resolution. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdtrain.config.declare import MethodDeclaration
from sdtrain.config.options import NonNegative
from sdtrain.restoration import checks, options
from sdtrain.restoration.options import OnlineOptions, weights_of_responses

if TYPE_CHECKING:
    from sdtrain.restoration.options import LoadedOnline


@dataclass(frozen=True, kw_only=True)
class Response(options.Response):
    """The student's distance to the teacher's image."""

    sup: NonNegative = 0.0
    """Weight of L_sup in their place: the recipe's L1 and perceptual loss, against the teacher's image."""


@dataclass(frozen=True, kw_only=True)
class Options(OnlineOptions):
    response: Response = Response()
    """Distance to the teacher's image."""
    lambda_adv: NonNegative = 1.0
    """Weight of L_adv of the student, whom the teacher's discriminator judges."""
    judged: Literal["teacher", "both"] = "teacher"
    """Whose images D calls fake; both = DCD with modified adversarial training, each with half of the weight."""
    map_size: Literal["image", "own"] = "image"
    """Size at which D sees maps: enlarged to the image's, or their own (unet_sn alone)."""


if TYPE_CHECKING:

    class Loaded(Options, LoadedOnline):  # type: ignore[misc]  # a method may narrow a common key
        """A loaded configuration of this method."""


def problems(config: Loaded) -> list[tuple[str, str]]:
    """Combinations that cannot work, as (keys, sentence)."""
    return [*checks.problems(config), *_map_size(config)]


def _map_size(config: Loaded) -> Iterator[tuple[str, str]]:
    D, crop = config.model.discriminator.kind, config.degradation.crop_size
    if config.map_size == "image":
        return
    if D != "unet_sn":
        yield "map_size", f"a {D} discriminator takes images of one size: set map_size: image"
    elif (side := checks.map_side(config)) % checks.UNET_SIDES:
        said = f"the generator's maps of a crop of {crop} are {side} pixels wide, and a unet_sn discriminator takes"
        yield "map_size", f"{said} multiples of {checks.UNET_SIDES}: set map_size: image, or another crop_size"


METHOD = MethodDeclaration(
    options=Options,
    players=("G_teacher_pixel", "G_teacher", "D_teacher", "G"),
    decisive=("data.val", "eval_img", "weights.vgg16"),
    problems=problems,
    data_problems=checks.data_problems,
    weights_needed=weights_of_responses,
)
