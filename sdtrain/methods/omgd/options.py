"""The keys of OMGD for super-resolution. Free of torch."""

from __future__ import annotations

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
    """Weights of the student's distances to each teacher's image, as published."""

    ssim: NonNegative = 10.0
    """Weight of 1 - SSIM."""
    tv: NonNegative = 1e-5
    """Weight of total variation, a sum over an image."""
    tv_size: Literal["256", "own"] = "256"
    """Whether the sum counts as that of 256 px, for which its weight was chosen, or grows with the image."""


@dataclass(frozen=True, kw_only=True)
class Options(OnlineOptions):
    response: Response = Response()
    """Distances to each teacher's image."""
    lambda_CD: NonNegative = 10.0
    """Weight of channel distillation (published: 10 to 1000, by data set); 0 = no map is distilled."""


if TYPE_CHECKING:

    class Loaded(Options, LoadedOnline):  # type: ignore[misc]  # a method may narrow a common key
        """A loaded configuration of this method."""


METHOD = MethodDeclaration(
    options=Options,
    players=("G_wide_pixel", "G_deep_pixel", "G_wide", "D_wide", "G_deep", "D_deep", "G"),
    decisive=("data.val", "eval_img", "weights.vgg16"),
    problems=checks.problems,
    data_problems=checks.data_problems,
    weights_needed=weights_of_responses,
)
