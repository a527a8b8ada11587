"""Figure 4 of SDAKD: what the teacher and students of several widths make of the same images, with zooms."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.commands.image_sheets import ImageRow, rows_of_images
from sdtrain.commands.material import Configured, Material
from sdtrain.commands.pages import Figure
from sdtrain.commands.papers import method_of
from sdtrain.commands.source import file_of, of_run
from sdtrain.commands.tables import Table
from sdtrain.config.words import is_address
from sdtrain.engine.ranks import pick_device
from sdtrain.errors import UserError
from sdtrain.interop.loading import load_network
from sdtrain.interop.network import Network
from sdtrain.methods.sdakd.build import teacher_of_run
from sdtrain.models.width import fraction
from sdtrain.restoration.inputs import make_inputs
from sdtrain.tasks.sr_pictures import busiest
from sdtrain.tasks.validation import Setting, ValidationList

FACTOR = 32  # the enlargement that the paper shows, where it is measured


def figure4(material: Material) -> list[Figure]:
    """A sheet for each backbone and scale; [] without a student of SDAKD."""
    students = [(run, config) for run, config in material.saved("sdakd") if method_of(config) == "SDAKD"]
    students.sort(key=lambda item: (-fraction(item[1].student.C), item[1].seed))
    figures = []
    for backbone in dict.fromkeys(backbone_of(config) for _, config in students):
        found = {fraction(c.student.C): (run, c) for run, c in reversed(students) if backbone_of(c) == backbone}
        try:
            figures.append(sheet(material, sorted(found.values(), key=lambda item: -fraction(item[1].student.C))))
        except UserError as problem:
            material.notes.append(f"Figure 4 of SDAKD, {backbone[0]}: {problem}")
    return figures


def backbone_of(config: Any) -> tuple[str, Any]:
    generator = config.model.generator
    return generator.kind, getattr(generator, "scale", config.data.resolution)


def sheet(material: Material, found: Sequence[Configured]) -> Figure:
    """Raises UserError where images or weights cannot be read."""
    device = pick_device(material.args.device)
    networks = [(str(fraction(config.student.C)), load_network(file_of(run.path, "ema"))) for run, config in found]
    teacher = teacher_of(material, found)
    if teacher is None:
        material.notes.append("Figure 4 of SDAKD has no teacher: its weights are not where the configurations say")
    networks = [*([("teacher", teacher)] if teacher else []), *networks]
    run, config = found[0]
    split = "test" if config.data.test else "val"
    source = material.args.data or of_run(getattr(config.data, split), "--data")
    config = replace(config, data=replace(config.data, **{split: source}, cache=None, allow_pipe=False))
    with tempfile.TemporaryDirectory() as scratch:
        has = (run.path / "inputs" / f"{split}.safetensors").is_file() and not material.args.data
        folder = run.path if has else Path(scratch)  # a report writes nothing into a run
        images = ValidationList(config, split, make_inputs(config), folder, device, keep_index=False)
        setting = next((one for one in images.settings if one.factor == FACTOR), images.settings[-1])
        chosen = range(0, len(images), max(len(images) // config.validation.strips, 1))[: config.validation.strips]
        assert images.stored
        columns = [[images.lq(i, setting) for i in chosen]]
        columns += [made(images, network, setting, chosen, device) for _, network in networks]
        columns.append([images.hq(i) for i in chosen])
    heads = [f"LQ 1/{setting.factor}", *(name for name, _ in networks), "ground truth"]
    rows = [row for strip in zip(*columns) for row in zoomed(strip)]
    said = f"Figure 4 of SDAKD: {config.model.generator.kind}, {setting.factor} times, images "
    said += f"{', '.join(map(str, chosen))} of the {split} list of {run.name} (inputs {setting.lq}); below each its "
    said += "busiest part, 3 times."
    lines = [[str(fraction(config.student.C)), run.name] for run, config in found]
    return Figure(said, partial(rows_of_images, rows, heads), Table(said, ["C", "Run"], lines, 2))


def made(
    images: ValidationList, network: Network, setting: Setting, chosen: Sequence[int], device: torch.device
) -> list[Tensor]:
    """uint8 [3, H, W] of each image."""
    net: Any = network.build().to(device)
    return [images.upscale(net, i, setting)[0].cpu() for i in chosen]


def zoomed(strip: Sequence[Tensor]) -> Iterator[ImageRow]:
    """The middle squares of images of one content, and below them the busiest part of the last."""
    height, width = strip[-1].shape[-2:]
    side = min(height, width)
    whole = ((height - side) // 2, (width - side) // 2, side)
    for window in (whole, busiest(strip[-1], whole)):
        yield ImageRow("", [cut(image, window, height).permute(1, 2, 0).numpy() for image in strip])


def cut(image: Tensor, window: tuple[int, int, int], height: int) -> Tensor:
    """A square (top, left, side) of the large image, which in a small one of the same content is smaller."""
    top, left, side = (max(round(x * image.shape[1] / height), int(i == 2)) for i, x in enumerate(window))
    return image[:, top : top + side, left : left + side]


def teacher_of(material: Material, found: Sequence[Configured]) -> Network | None:
    """The teacher that one of the runs has trained, or learnt from."""
    backbone = backbone_of(found[0][1])
    places = [run.path for run, c in material.of("sdakd") if "teacher" in c.stages and backbone_of(c) == backbone]
    named = (config.teacher.generator for _, config in found)
    places += [Path(place).expanduser() for place in named if place and not is_address(place)]
    for place in places:
        if place.is_dir() or place.is_file():
            return load_network(teacher_of_run(place, "generator", "G_ema") if place.is_dir() else place)
    return None
