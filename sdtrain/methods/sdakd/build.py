"""How SDAKD is put together: which networks a configuration needs, and its stages as data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdtrain.config.declare import Role
from sdtrain.config.options import span_img
from sdtrain.contracts import Net, Stage, Start
from sdtrain.engine.ema import freeze
from sdtrain.engine.shared import shared_network
from sdtrain.interop.architectures import require
from sdtrain.interop.loading import file_of_run, load_network
from sdtrain.interop.network import load_into
from sdtrain.losses.feature import FeatureMLP
from sdtrain.methods.sdakd.method import SDAKD
from sdtrain.restoration.inputs import make_inputs
from sdtrain.restoration.networks import narrowed, perceptual, shortened
from sdtrain.rng import seed_of

if TYPE_CHECKING:
    from sdtrain.builder import Builder
    from sdtrain.methods.sdakd.options import Loaded

Modules = dict[str, nn.Module]


def build(config: Loaded, builder: Builder) -> SDAKD:
    """The method of this configuration. Raises WeightsError for teacher files that do not fit it."""
    trained, given = students(config, builder), teachers_given(config, builder)
    averages = {"G_ema": "G"}
    if set(config.stages) != {"naive"}:
        trained |= teachers_trained(config, builder)
        averages |= {"G_T": "G_T_raw"} if "G_T_raw" in trained else {}
    layers: tuple[str, ...] = ()
    if config.lambda_1 and set(config.stages) != {"naive"}:
        teacher = given.get("G_T", trained.get("G_T_raw"))
        layers = (config.fm_layer or str(teacher.fm_layer),)  # type: ignore[union-attr]
        widths = [int(net.layer_channels(layers[0])) for net in (trained["G"], teacher)]  # type: ignore[operator, union-attr]
        trained["MLP"] = feature_mlp(config.seed, "MLP", *widths)
    if config.lambda_D and "supervised" in config.stages and config.adversary == "student":
        judges = (trained["D"], given.get("D_T", trained.get("D_T")))
        trained["MLP_D"] = feature_mlp(config.seed, "MLP_D", *(judge.hidden_channels for judge in judges))  # type: ignore
    nets: dict[str, Net] = builder.nets(trained, averages)
    nets |= {name: builder.engine.net(module, trained=False) for name, module in given.items()}
    uses_vgg, sd = config.recipe.perceptual or config.supervision.perceptual, bool(config.sd.alpha)
    return SDAKD(
        config,
        nets,
        stages_of(config, set(nets), builder.steps_per_epoch, config.batch_size),
        make_inputs(config),
        given=tuple(given),
        layers=layers,
        perceptual=perceptual(builder) if uses_vgg else None,
        distance=builder.distance(config.sd) if sd else None,
        T=builder.paired_augment(config.sd) if sd else None,
    )


def students(config: Loaded, builder: Builder) -> Modules:
    """G and D at the widths of `student`; the judge of Ablations 1 to 3 has the teacher's."""
    model, student = config.model, config.student
    D_C = student.C if student.D_C is None else student.D_C
    small = narrowed(model.generator, student.C, growth=student.growth, style=student.style)
    judge = narrowed(model.discriminator, 1 if config.adversary == "teacher" else D_C)
    return {"G": builder.generator(small), "D": builder.discriminator(judge)}


def teachers_given(config: Loaded, builder: Builder) -> Modules:
    """Teachers that come from files."""
    files, model = config.teacher, config.model
    if set(config.stages) == {"naive"}:
        return {}
    given = {}
    if files.generator:
        given["G_T"] = teacher_from(builder, files.generator, "generator", model.generator)
    if files.discriminator:
        given["D_T"] = teacher_from(builder, files.discriminator, "discriminator", model.discriminator)
    return given


def teachers_trained(config: Loaded, builder: Builder) -> Modules:
    """Teachers of stage 1: G_T is the average of G_T_raw."""
    files, model, made = config.teacher, config.model, Modules()
    if not files.generator:
        made["G_T_raw"] = builder.generator(model.generator, "G/teacher")
    if not files.discriminator:
        made["D_T"] = builder.discriminator(model.discriminator, "D/teacher")
    return made


def stages_of(config: Loaded, nets: set[str], steps_per_epoch: float, batch_size: int) -> list[Stage]:
    """The stages in order, each with its end on the one clock; stage 1 is left out when both teachers are given."""
    lengths = {"teacher": config.n1, "naive": config.n1, "supervised": config.n2, "adversarial": config.n3}
    stages: list[Stage] = []
    for name in config.stages:
        if name == "teacher" and config.teacher.generator and config.teacher.discriminator:
            continue
        begin = stages[-1].end_img if stages else 0
        length = span_img(lengths[name], steps_per_epoch, batch_size)
        alone = name == "naive" or not config.teacher.generator  # a given generator needs no L1 stage
        pixel = round(length * config.recipe.pixel_share / batch_size) * batch_size
        if name in ("teacher", "naive") and alone and pixel:
            stages.append(stage_of(config, nets, f"{name}_pixel", begin + pixel, stages))
        stages.append(stage_of(config, nets, name, begin + length, stages))
    return shortened(stages, config.total_img)


def stage_of(config: Loaded, nets: set[str], name: str, end_img: int, earlier: list[Stage]) -> Stage:
    """One stage as data. Teachers only look on once their stage is over."""
    teaching = name.startswith("teacher")
    average = {"G_T": "G_T_raw"} if "G_T_raw" in nets else {}
    judge_frozen = name == "adversarial" and config.adversary == "teacher" and config.teacher_d == "frozen"
    frozen = [net for net in ("G_T", "D_T") if net in nets and not teaching]
    return Stage(
        name=name,
        end_img=end_img,
        players=players_of(config, nets, name),
        averages=average if teaching else {"G_ema": "G"},
        frozen=(*frozen, *(["D"] if judge_frozen else [])),
        evaluated="G_T" if teaching else "G_ema",
        starts=starts_of(config, nets, name, earlier[-1].name if earlier else ""),
    )


def players_of(config: Loaded, nets: set[str], name: str) -> dict[str, tuple[str, ...]]:
    student: tuple[str, ...] = ("G", "MLP") if "MLP" in nets else ("G",)
    judged_by_teacher = config.adversary == "teacher"
    if name == "supervised":
        judge = ("D", "MLP_D") if "MLP_D" in nets else ("D",)
        return {"G_sup": student} if judged_by_teacher else {"G_sup": student, "D_sup": judge}
    if name == "adversarial":
        frozen = judged_by_teacher and config.teacher_d == "frozen"
        return {"G": student} if frozen else {"G": student, "D": ("D",)}
    teaching, pixel = name.startswith("teacher"), name.endswith("_pixel")
    G = "G_T_raw" if teaching else "G"
    generator: dict[str, tuple[str, ...]] = {"G_pixel" if pixel else "G_original": (G,)} if G in nets else {}
    return generator if pixel else {**generator, "D_original": ("D_T" if teaching else "D",)}


def starts_of(config: Loaded, nets: set[str], name: str, before: str) -> dict[str, Start]:
    """After an L1 stage the generator is its average, as published; a trained teacher is its best.

    After stage 2 the student is the one validation liked best (`start_from`), or its last; D goes on from its last
    weights. The judge of Ablations 1 to 3 begins as the teacher's.
    """
    starts = {}
    if before.endswith("_pixel"):
        teaching = before.startswith("teacher")
        starts["G_T_raw" if teaching else "G"] = Start(net="G_T" if teaching else "G_ema")
    if before == "teacher" and "G_T_raw" in nets:
        starts["G_T"] = Start(net="G_T", best=True)
    if before == "supervised":
        best = config.start_from == "best"
        student = Start(net="G_ema", best=True, otherwise="G") if best else Start(net="G")
        starts |= {"G": student, "G_ema": student}
        if best and "MLP" in nets:
            starts["MLP"] = Start(net="MLP", best=True)
    if name == "adversarial" and config.adversary == "teacher":
        starts["D"] = Start(net="D_T")
    return starts


def teacher_from(builder: Builder, path: str, which: Role, section: Any) -> nn.Module:
    """A frozen network from a file (or a run folder) that must be the one `section` describes.

    Raises WeightsError naming both when it is another network, another width or scale, or the other player.
    """
    role, player = ("G_ema", "Generator") if which == "generator" else ("D", "Discriminator")
    place = Path(path).expanduser()
    file = teacher_of_run(place, which, role) if place.is_dir() else place
    found, sha256 = shared_network(lambda: load_network(file), file)
    builder.teachers[f"teacher.{which}"] = {"place": str(file), "sha256": sha256}
    plain = getattr(importlib.import_module(f"sdtrain.models.{section.kind}.options"), f"{player}Options")
    options = plain(**{name: getattr(section, name) for name in plain.__dataclass_fields__})
    side = builder.resolution if section.kind == "gcfsr" else None
    require(file, found, player=player, kind=section.kind, options=options, resolution=side)  # type: ignore[arg-type]
    module = builder.module(which, section, f"{role}/teacher")
    load_into(module, found.state, file)
    return freeze(module)


def teacher_of_run(run: Path, which: Role, role: str) -> Path:
    """What a run distilled itself: the best generator of its stage 1 and the last discriminator; else its only ones."""
    names = {"generator": ("teacher_G", "teacher_last_G"), "discriminator": ("teacher_last_D",)}[which]
    found = [file for name in names if (file := run / "best" / f"{name}.safetensors").is_file()]
    return found[0] if found else file_of_run(run, role)


def feature_mlp(seed: int, name: str, c_s: int, c_t: int) -> nn.Module:
    """MLP of L_MLP from maps of `c_s` channels to those of `c_t`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "init", name))
        return FeatureMLP(c_s, c_t)
