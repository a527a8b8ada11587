"""How SDAKD is put together: which networks a configuration needs, its stages, and the hand-over between them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.config import schema
from sdtrain.config.options import span_img
from sdtrain.contracts import Stage
from sdtrain.engine.ema import freeze
from sdtrain.engine.player import Net
from sdtrain.interop.architectures import require
from sdtrain.interop.loading import file_of_run, load_network
from sdtrain.interop.network import load_into
from sdtrain.losses.feature import FeatureMLP, PerceptualLoss
from sdtrain.methods.sdakd.inputs import make_inputs
from sdtrain.rng import seed_of


def build(method: Any, config: Any, kit: Any) -> Any:
    """An `SDAKD` for this configuration. Raises WeightsError for teacher files that do not fit it."""
    nets = networks(config, kit)
    uses_vgg = config.recipe.perceptual or config.supervision.perceptual
    sd = bool(config.sd.alpha)
    return method(
        config,
        nets,
        stages_of(config, kit.steps_per_epoch),
        make_inputs(config),
        perceptual=perceptual(kit, config.perceptual) if uses_vgg else None,
        distance=kit.distance(config.sd) if sd else None,
        T=kit.paired_augment(config.sd) if sd else None,
    )


def networks(config: Any, kit: Any) -> dict[str, Net]:
    """Teachers (from files, or to be trained) unless every stage does without, then the students."""
    model, student, nets = config.model, config.student, dict[str, Net]()
    if set(config.stages) != {"naive"}:
        nets |= teachers(config, kit)
    small = narrowed(model.generator, student.C, growth=student.growth, style=student.style)
    judge = student.C if student.D_C is None else student.D_C
    G = kit.generator(small)
    nets |= {"G": G, "G_ema": kit.average_of(G)}
    nets["D"] = kit.discriminator(narrowed(model.discriminator, 1 if config.adversary == "teacher" else judge))
    if config.lambda_1 and "G_T" in nets:
        T = nets["G_T"].module
        nets["MLP"] = feature_mlp(kit, config.fm_layer or str(T.fm_layer), G.module, T)
    return nets


def teachers(config: Any, kit: Any) -> dict[str, Net]:
    model, files, nets = config.model, config.teacher, dict[str, Net]()
    if files.generator:
        nets["G_T"] = teacher_from(kit, files.generator, "Generator", model.generator)
    else:
        nets["G_T_raw"] = kit.generator(model.generator, role="G/teacher")
        nets["G_T"] = kit.average_of(nets["G_T_raw"])
    if files.discriminator:
        nets["D_T"] = teacher_from(kit, files.discriminator, "Discriminator", model.discriminator)
    else:
        nets["D_T"] = kit.discriminator(model.discriminator, role="D/teacher")
    return nets


def stages_of(config: Any, steps_per_epoch: float) -> list[Stage]:
    """The stages in order, each with its end on the one clock; stage 1 is left out when both teachers are given."""
    lengths = {"teacher": config.n1, "naive": config.n1, "supervised": config.n2, "adversarial": config.n3}
    given = config.teacher.generator and config.teacher.discriminator
    stages: list[Stage] = []
    for name in config.stages:
        if name == "teacher" and given:
            continue
        start = stages[-1].end_img if stages else 0
        length = span_img(lengths[name], steps_per_epoch, config.batch_size)
        alone = name == "naive" or not config.teacher.generator  # a given generator needs no L1 stage
        pixel = round(length * config.recipe.pixel_share / config.batch_size) * config.batch_size
        if name in ("teacher", "naive") and alone and pixel:
            stages.append(Stage(name=f"{name}_pixel", end_img=start + pixel))
        stages.append(Stage(name=name, end_img=start + length))
    return shortened(stages, config.total_img)


def shortened(stages: list[Stage], total_img: int | None) -> list[Stage]:
    """The stages up to `total_img` images; None = all of them."""
    if total_img is None:
        return stages
    starts = [0, *(stage.end_img for stage in stages)]
    kept = [stage for start, stage in zip(starts, stages) if start < total_img]
    return [Stage(name=stage.name, end_img=min(stage.end_img, total_img)) for stage in kept]


def hand_over(method: Any, stage: str, best: Mapping[str, dict[str, Tensor]] | None) -> None:
    """Give the networks of a stage their weights and modes. `best` is None inside a stage: modes only.

    Teachers freeze when their stage is over. After an L1 stage the generator is its average, as published; after stage
    2 it is the one validation liked best (`start_from`), and D goes on from its last weights.
    """
    nets, training_teacher = method.nets, stage.startswith("teacher")
    if best is not None:
        take_weights(method, stage, best)
    if not training_teacher:
        for name in ("G_T", "D_T"):
            if name in nets:
                freeze(nets[name].module)
    if stage == "adversarial" and method.o.adversary == "teacher" and method.o.teacher_d == "frozen":
        freeze(nets["D"].module)


def take_weights(method: Any, stage: str, best: Mapping[str, dict[str, Tensor]]) -> None:
    nets = method.nets
    before = next((s.name for s, after in zip(method.stages, method.stages[1:]) if after.name == stage), "")
    chosen = best if method.o.start_from == "best" or before == "teacher" else {}
    if before.endswith("_pixel"):
        source, average = ("G_T_raw", "G_T") if before.startswith("teacher") else ("G", "G_ema")
        nets[source].module.load_state_dict(nets[average].module.state_dict())
    elif before in ("teacher", "supervised"):
        for name, tensors in chosen.items():
            nets[name].module.load_state_dict(tensors)
        if before == "supervised":
            source = nets["G_ema"] if chosen else nets["G"]
            nets["G"].module.load_state_dict(source.module.state_dict())
            nets["G_ema"].module.load_state_dict(source.module.state_dict())
    if stage == "adversarial" and method.o.adversary == "teacher":
        nets["D"].module.load_state_dict(nets["D_T"].module.state_dict())


def narrowed(section: Any, C: Any, **how: Any) -> Any:
    """The options of a student: `section` with the fraction C of its channels. Raises ConfigError when none is left."""
    scaled = schema.model(section.kind).scaled
    assert scaled is not None  # `checks` lets no other model through
    wanted = {k: v for k, v in how.items() if k in scaled.__code__.co_varnames[: scaled.__code__.co_argcount]}
    return scaled(section, C, **wanted)


def teacher_from(kit: Any, path: str, player: str, section: Any) -> Net:
    """A frozen network from a file (or the best of a run folder) that must be the one `section` describes.

    Raises WeightsError naming both when it is another network, another width or scale, or the other player.
    """
    role = "G_ema" if player == "Generator" else "D"
    place = Path(path).expanduser()
    file = file_of_run(place, role) if place.is_dir() else place
    found = load_network(file)
    plain = getattr(importlib.import_module(f"sdtrain.models.{section.kind}.options"), f"{player}Options")
    options = plain(**{name: getattr(section, name) for name in plain.__dataclass_fields__})
    side = kit.resolution if section.kind == "gcfsr" else None
    require(file, found, player=player, kind=section.kind, options=options, resolution=side)  # type: ignore[arg-type]
    net = getattr(kit, player.lower())(section, role=f"{role}/teacher")
    load_into(net.module, found.state, file)
    freeze(net.module)
    return net


def feature_mlp(kit: Any, layer: str, student: Any, teacher: Any) -> Net:
    """MLP of L_MLP between two generators' maps of `layer`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(kit.config.seed, "init", "MLP"))
        mlp = FeatureMLP(student.layer_channels(layer), teacher.layer_channels(layer))
    return Net(mlp.to(kit.device))


def perceptual(kit: Any, which: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual loss of Real-ESRGAN (vgg19, images in [0, 1]) or of GCFSR (vgg16, images in [-1, 1])."""
    state = kit.weights(which, kit.config.weights.perceptual)
    made = PerceptualLoss.for_real_esrgan(state) if which == "vgg19" else PerceptualLoss.for_gcfsr(state)
    return kit.frozen(made)
