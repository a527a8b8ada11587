"""How DCD is put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdtrain.methods.dcd.method import DCD, TEACHERS
from sdtrain.restoration.inputs import make_inputs
from sdtrain.restoration.networks import (
    connectors,
    online_stages,
    perceptual,
    responses_of,
    student_and_teachers,
)

if TYPE_CHECKING:
    from sdtrain.builder import Builder
    from sdtrain.methods.dcd.options import Loaded

COLOURS = 3  # channels of what D_T looks at


def build(config: Loaded, builder: Builder) -> DCD:
    """The method of this configuration. Raises WeightsError for a VGG that does not fit."""
    trained, averages = student_and_teachers(config, builder), {"G_ema": "G", "G_T": "G_T_raw"}
    G: Any = trained["G"]
    layers: tuple[str, ...] = G.distilled_layers if config.lambda_CD else ()
    for name, source in (("conn_S", "G"), ("conn_T", "G_T_raw")) if layers else ():
        net: Any = trained[source]
        widths = [(net.layer_channels(layer), COLOURS) for layer in layers]
        trained[name] = connectors(config, name, layers, widths)
    return DCD(
        config,
        builder.nets(trained, averages),
        online_stages(config, builder, TEACHERS, ("G", "conn_S", "conn_T") if layers else ("G",)),
        make_inputs(config),
        layers=layers,
        vgg=responses_of(config, builder),
        perceptual=perceptual(builder) if config.recipe.perceptual else None,
    )
