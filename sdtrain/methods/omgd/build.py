"""How OMGD is put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdtrain.config import schema
from sdtrain.methods.omgd.method import OMGD, TEACHERS
from sdtrain.restoration.inputs import make_inputs
from sdtrain.restoration.networks import (
    connectors,
    narrowed,
    online_stages,
    perceptual,
    responses_of,
    student_and_teachers,
)

if TYPE_CHECKING:
    from sdtrain.builder import Builder
    from sdtrain.methods.omgd.options import Loaded


def build(config: Loaded, builder: Builder) -> OMGD:
    """The method of this configuration. Raises WeightsError for a VGG that does not fit."""
    trained, averages = student_and_teachers(config, builder), {"G_ema": "G", "G_T": "G_T_raw"}
    trained["G_deep"] = builder.generator(deep(config), "G/deep")
    trained["D_deep"] = builder.discriminator(config.model.discriminator, "D/deep")
    G: Any = trained["G"]
    layers: tuple[str, ...] = G.distilled_layers if config.lambda_CD else ()
    if layers:
        wide: Any = trained["G_T_raw"]
        trained["conn"] = connectors(
            config, "conn", layers, [(G.layer_channels(layer), wide.layer_channels(layer)) for layer in layers]
        )
    return OMGD(
        config,
        builder.nets(trained, averages),
        online_stages(config, builder, TEACHERS, ("G", "conn") if layers else ("G",)),
        make_inputs(config),
        layers=layers,
        vgg=responses_of(config, builder),
        perceptual=perceptual(builder) if config.recipe.perceptual else None,
    )


def deep(config: Loaded) -> Any:
    """The options of the deep teacher: the student's width, more layers."""
    generator, student = config.model.generator, config.student
    deepened = schema.model(generator.kind).deepened
    assert deepened is not None  # `checks` lets no other model through
    return deepened(narrowed(generator, student.C, growth=student.growth, style=student.style))
