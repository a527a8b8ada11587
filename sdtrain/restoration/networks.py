"""What the builders of super-resolution methods share: students, frozen networks, stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdtrain.config import schema
from sdtrain.config.options import span_img
from sdtrain.contracts import Stage, Start
from sdtrain.losses.feature import PerceptualLoss, VGGFeatures
from sdtrain.losses.omgd_dcd import Connectors, response_network
from sdtrain.models.ghost import set_ghost_batch
from sdtrain.restoration.options import weights_of_responses
from sdtrain.rng import seed_of

if TYPE_CHECKING:
    from sdtrain.builder import Builder
    from sdtrain.restoration.options import LoadedOnline


def shortened(stages: list[Stage], total_img: int | None) -> list[Stage]:
    """The stages up to `total_img` images; None = all of them."""
    if total_img is None:
        return stages
    begins = [0, *(stage.end_img for stage in stages)]
    kept = [stage for begin, stage in zip(begins, stages) if begin < total_img]
    return [replace(stage, end_img=min(stage.end_img, total_img)) for stage in kept]


def narrowed(section: Any, C: Any, **how: Any) -> Any:
    """The options of a student: `section` with the fraction C of its channels. Raises ConfigError when none is left."""
    scaled = schema.model(section.kind).scaled
    assert scaled is not None  # `checks` lets no other model through
    return scaled(section, C, **how)


def perceptual(builder: Builder) -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual loss of Real-ESRGAN (vgg19, images in [0, 1]) or of GCFSR (vgg16, images in [-1, 1])."""
    which: str = builder.config.perceptual  # type: ignore[attr-defined]  # a key of these methods
    state = builder.weights(which, builder.config.weights.perceptual)
    made = PerceptualLoss.for_real_esrgan(state) if which == "vgg19" else PerceptualLoss.for_gcfsr(state)
    return builder.frozen(made)


def online_stages(
    config: LoadedOnline, builder: Builder, teachers: Mapping[str, tuple[str, str]], student: tuple[str, ...]
) -> list[Stage]:
    """The stages: teachers with L1 alone where the recipe begins so, then all together.

    `teachers`: name -> (generator, discriminator); `student`: the networks that the student's optimizer moves.
    """
    length = span_img(config.n, builder.steps_per_epoch, config.batch_size)
    pixel = round(length * config.recipe.pixel_share / config.batch_size) * config.batch_size
    average = {"G_T": "G_T_raw"}
    alone = {f"G_{name}_pixel": (G,) for name, (G, _) in teachers.items()}
    players: dict[str, tuple[str, ...]] = {"G": student}
    for name, (G, D) in teachers.items():
        players |= {f"G_{name}": (G,), f"D_{name}": (D,)}
    stages = []
    if pixel:
        stages.append(Stage(name="teacher_pixel", end_img=pixel, players=alone, averages=average, evaluated="G_T"))
    starts = {"G_T_raw": Start(net="G_T")} if pixel else {}  # as published, after the stage of L1
    both = {**average, "G_ema": "G"}
    stages.append(Stage(name="online", end_img=length, players=players, averages=both, starts=starts))
    return shortened(stages, config.total_img)


def student_and_teachers(config: LoadedOnline, builder: Builder) -> dict[str, nn.Module]:
    """G at the student's width, and the wide teacher with its discriminator at the full one."""
    model, student = config.model, config.student
    small = narrowed(model.generator, student.C, growth=student.growth, style=student.style)
    return {
        "G": builder.generator(small),
        "G_T_raw": builder.generator(model.generator, "G/teacher"),
        "D_T": builder.discriminator(model.discriminator, "D/teacher"),
    }


def connectors(config: LoadedOnline, name: str, layers: Sequence[str], widths: Sequence[tuple[int, int]]) -> nn.Module:
    """What takes maps of `layers` from one width to another, `widths` [channels]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "init", name))
        made = Connectors(layers, widths)
    set_ghost_batch(made, config.ghost_batch)
    return made.train()


def responses_of(config: LoadedOnline, builder: Builder) -> VGGFeatures | None:
    """The frozen VGG16 in which images are compared, None where they are not. Raises WeightsError."""
    if not config.response.compares:
        return None
    source: str | None = getattr(config.weights, weights_of_responses(config)["vgg16"])
    made = builder.frozen(response_network(builder.weights("vgg16", source)))
    assert isinstance(made, VGGFeatures)
    return made
