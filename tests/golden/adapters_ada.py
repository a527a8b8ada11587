"""StyleGAN2's operations, ADA and the schedules against the golden numbers."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from adapters_stylegan2 import AmbientDraws
from rules import number
from torch import Tensor, nn


def operations(case) -> Iterator[tuple]:
    """What each call does is written in the manifest: one text a name, or in the name itself."""
    from sdtrain.models.stylegan2 import ops

    t, calls = case.tensors, dict(case.entry["calls"])
    x = t["in.x"]
    for name, function in case.names(r"out\.(\w+2d)(?:_\w+)?"):
        if function.startswith(("up", "down", "filter")):
            taps = re.search(r"\(x,\s*f?(\w+)", calls[name.removeprefix("out.")])
            yield name, getattr(ops, function)(x, t[f"filter.{taps[1]}"])
    for name, call in case.names(r"out\.(upfirdn_\w+)"):
        # only a separable filter is named; the others use the asymmetric one
        taps = next(n for n, v in case.group("filter.").items() if (v.ndim == 1) == ("separable" in calls[call]))
        taps = taps if "separable" in calls[call] else "asym"
        yield name, ops.upfirdn2d(x, t[f"filter.{taps}"], **_resampling(calls[call]))
    for name, act in case.names(r"out\.bias_act\.(\w+)"):
        said, terms = calls[f"bias_act.{act}"], {"alpha": "slope", "gain": "gain", "clamp": "clamp"}
        options = {ours: number(said, theirs) for theirs, ours in terms.items() if f"{theirs}=" in said}
        yield name, ops.bias_act(x, t["in.b"], act.split("_")[0], **options)
    for name, group, channels in case.names(r"out\.mbstd\.g(\w+)\.c(\d+)"):
        yield name, ops.minibatch_stddev(t["in.mb"], None if group == "None" else int(group), int(channels))
    yield from _convolutions(case, calls)


def _resampling(text: str) -> dict[str, Any]:
    """'up=[x2,y1] down2 padding=[1,-1,2,0] flip_filter gain=.5' as arguments of upfirdn2d."""
    options: dict[str, Any] = {"flip_filter": "flip_filter" in text}
    for name in ("up", "down", "padding"):
        if hit := re.search(rf"\b{name}=?(\[[^]]*\]|\d+)", text):
            values = tuple(int(part) for part in re.findall(r"-?\d+", hit[1]))
            options[name] = values if hit[1].startswith("[") else values[0]
    return {**options, "gain": number(text, "gain")} if "gain=" in text else options


def _convolutions(case, calls: Mapping[str, str]) -> Iterator[tuple]:
    from sdtrain.models.stylegan2 import ops

    t, f = case.tensors, case.tensors["filter.1331"]
    for name, call in case.names(r"out\.(conv2d_resample\.\w+)"):
        options = ast.literal_eval(re.search(r"\{.*\}", calls[call])[0])
        height, width = map(int, re.search(r"x\[:,:,:(\d+),:(\d+)\]", calls[call]).groups())
        x, weight = t["in.x"][:, :, :height, :width], t[f"in.w{number(call, 'c'):.0f}"]
        if options.get("up"):  # ours is a correlation: the flipped true convolution
            yield name, ops.conv_up(x, weight.flip(2, 3) if options.get("flip_weight", True) else weight, f)
        else:
            yield name, ops.conv_down(x, weight, f) if options.get("down") else ops.conv_same(x, weight)
    x, w = t["in.x"][:, :, : t["in.noise"].shape[2], : t["in.noise"].shape[3]], t["in.w3"]
    for name, demodulate in case.names(r"out\.modconv\.demod(\d)\.fused\d"):  # two official ways of one thing
        yield name, ops.modulated_conv2d(x, w, t["in.styles"], demodulate=demodulate == "1", noise=t["in.noise"])
    yield "out.modconv.up", ops.modulated_conv2d(x, w, t["in.styles"], f=f)


def augmentation(case) -> Iterator[tuple]:
    from sdtrain.augment import ada

    pipes = {name: ada.AdaPipe(ada.AdaOptions(**spec)) for name, spec in case.entry["specs"].items()}
    for name, buffer in case.names(r"buf\.(\w+)"):
        yield name, getattr(next(iter(pipes.values())), buffer)
    parts = r"out\.([a-z]+)(_gray)?\.(dp|seeded_p)([\d.]*?)(?:\.(G_inv|C|grad))?"
    for name, group, gray, kind, value, part in case.names(parts):
        images = case.tensors["in.img" + gray][: len(case.tensors[name])]
        if kind == "dp":
            quantile = float(value or number(case.said(name), "debug_percentile"))
            chance = ada.Chance(None, torch.ones([]), len(images), quantile)
            yield name, _augmented(case, pipes[group], images, part, chance, (1.0, None, quantile))
            continue
        torch.manual_seed(int(number(case.said(name), "manual_seed")))
        draws = AmbientDraws(len(images))
        chance = ada.Chance(draws, torch.tensor(float(value)), len(images), None)
        yield name, _augmented(case, pipes[group], images, part, chance, (float(value), draws))


def _augmented(case, pipe: nn.Module, images: Tensor, part: str, chance: Any, arguments: tuple) -> Tensor:
    """The augmented images, or the `part` of it that the name asks for."""
    from sdtrain.augment import ada

    if part in ("G_inv", "C"):
        geometry = ada.inverse_geometry(pipe.options, chance, images.shape[3], images.shape[2])  # draws first
        return geometry if part == "G_inv" else ada.color_matrix(pipe.options, chance, images.shape[1])
    if part == "":
        return pipe(images, *arguments)
    x = images.clone().requires_grad_()
    return torch.autograd.grad((pipe(x, *arguments) * case.tensors["in.grad_weight"]).sum(), x)[0]


def schedules(case) -> Iterator[tuple]:
    """Every table of the file; one that is unknown and not empty is an error."""
    if "ada" not in case.json:  # R3GAN's file has the same name
        from adapters_r3gan_files import schedules as r3gan

        yield from r3gan(case)
        return
    tables: dict[str, Callable[[list], Iterator[tuple]]] = {
        "ada": _controller,
        "lazy_reg": _lazy_adam,
        "auto_cfg": _auto,
        "ema": _ema,
    }
    for name, rows in case.json.items():
        if rows:
            yield from tables[name](rows)


def _controller(rows: list) -> Iterator[tuple]:
    from sdtrain.augment.ada import update_p

    for i, trace in enumerate(rows):
        p = trace["p0"]
        for step, (rt, reference) in enumerate(zip(trace["rt_sequence"], trace["p_sequence"], strict=True)):
            p = update_p(p, rt, 1, trace["batch"], trace["interval"], trace["target"], trace["ada_kimg"])
            yield f"ada.{i}.{step}", p, reference, 1e-7  # the reference rounds p to float32


def _lazy_adam(rows: list) -> Iterator[tuple]:
    from sdtrain.losses.regularizers import lazy_adam

    betas = next(tuple(row["betas_eff"]) for row in rows if row["interval"] is None)
    for row in rows:
        lr, changed = lazy_adam(row["lr"], betas, row["interval"])
        yield f"lazy_reg.{row['lr']}.{row['interval']}", (lr, *changed), (row["lr_eff"], *row["betas_eff"]), 1e-12


def _auto(rows: list) -> Iterator[tuple]:
    from sdtrain.models.stylegan2.networks import auto_preset

    for row in rows:
        own = auto_preset(row["res"], row["gpus"])
        names = [name for name in row if name not in ("gpus", "res")]
        got, reference = [own[name] for name in names], [row[name] for name in names]
        yield f"auto.{row['res']}.{row['gpus']}", got, reference, 1e-12


def _ema(rows: list) -> Iterator[tuple]:
    from sdtrain.engine.ema import ema_beta

    for i, row in enumerate(rows):
        beta = ema_beta(row["ema_kimg"] * 1000, row["rampup"], row["cur_nimg"], row["batch"])
        yield f"ema.{i}", beta, row["beta"], 1e-9


ADAPTERS = {
    "sg2_ops*.safetensors": operations,
    "ada*.safetensors": augmentation,
    "schedules.json": schedules,
}
