"""R3GAN: names, first weights, presets, schedules and snapshots against the golden files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

import torch
from adapters_r3gan import PLAYERS, build, options_of, schedule
from adapters_stylegan2 import key_rows
from torch import nn


def _preset_net(case, role: str) -> nn.Module:
    """The network of a file named like keys_r3_cifar10_G.json, from presets.json."""
    wanted = case.name.split("_")[-2]
    presets = case.other("presets.json").json
    preset = next(preset for name, preset in presets.items() if name.replace("-", "").lower() == wanted)
    return _net_of(preset, role)


def _net_of(preset: Mapping[str, Any], role: str) -> nn.Module:
    sizes = {name: preset[name] for name in ("c_dim", "img_resolution")}
    return build({**preset[f"{role}_kwargs"], **sizes}, PLAYERS[role])


def keys(case) -> Iterator[tuple]:
    with torch.device("meta"):
        net = _preset_net(case, case.name[-6])
    yield "keys in official order", key_rows(net) == case.json, True, 0.0


def initial_deviations(case) -> Iterator[tuple]:
    """Standard deviations of fresh weights: each tensor within five standard errors of their difference."""
    torch.manual_seed(0)
    for name, parameter in _preset_net(case, case.name[-6]).named_parameters():
        reference = case.json[name]
        value = parameter.std() if reference else parameter.abs().max()
        yield name, value, reference, 5 * reference / sqrt(parameter.numel())


def presets(case) -> Iterator[tuple]:
    for name, preset in case.json.items():
        for role in PLAYERS:
            with torch.device("meta"):
                net = _net_of(preset, role)
            count = sum(p.numel() for p in net.parameters())
            yield f"{name}: parameters of {role}", count, preset[f"{role}_params"], 0.0
            dtypes = ["bfloat16" if stage.low else "float32" for stage in net.Model["MainLayers"]]
            yield f"{name}: formats of {role}", dtypes == preset[f"{role}_stage_dtypes"], True, 0.0


def schedules(case) -> Iterator[tuple]:
    from sdtrain.engine.ema import ema_beta

    known = {name.removesuffix("-uncond"): preset for name, preset in case.other("presets.json").json.items()}
    for name, held in case.json.items():
        for row in held["rows"]:
            seen_img = row["cur_nimg"]
            for key, values in known[name.removesuffix("-uncond")]["schedulers"].items():
                key = key.removesuffix("_scheduler")
                limit = 1e-9 * max(abs(values["base_value"]), abs(values["final_value"]))
                yield f"{name} {seen_img} {key}", schedule(values, seen_img), row[key], limit
            yield (
                f"{name} {seen_img} ema_beta",
                ema_beta(row["ema"], None, seen_img, held["batch"]),
                row["ema_beta"],
                1e-9,
            )


def snapshot_expected(case) -> Iterator[tuple]:
    """Both generations of module names: every tensor, the facts beside them, outputs in float32, and the way back."""
    from adapters_interop import _round_trip, _states

    from sdtrain.interop.official import read_official

    names = [name for name in case.manifest["files"] if name.endswith(".pkl") and (case.folder / name).is_file()]
    for name in names:
        yield from ((f"{name}: {what}", *rest) for what, *rest in _states(case, name))
        yield from ((f"{name}: {what}", *rest) for what, *rest in _round_trip(case, name))
        found = read_official(case.folder / name, num_low_precision_res=0)
        yield f"{name}: cur_nimg", found.extras["cur_nimg"], case.entry["cur_nimg"], 0.0
        facts = found.extras["training_set_kwargs"] == case.entry["training_set_kwargs"]
        yield f"{name}: training_set_kwargs", facts, True, 0.0
        z, c = case.tensors["in.z"], case.tensors["in.c"]
        with torch.no_grad():
            images = found.networks["G_ema"].build()(z, c)
            yield "out.G_ema_img", images
            yield "out.G_img", found.networks["G"].build()(z, c)
            yield "out.D_logits_on_it", found.networks["D"].build()(images, c)


def snapshot(case) -> Iterator[tuple]:
    """The architecture as the entry of the expected tensors gives it, number formats included."""
    from adapters_interop import snapshot as any_snapshot

    from sdtrain.interop.official import read_official
    from sdtrain.interop.safe_pickle import read_checkpoint

    wanted = case.other("r3_snapshot_expected.safetensors").entry
    yield from any_snapshot(case)
    for role, network in read_official(case.path).networks.items():
        player = PLAYERS[role[0]]
        config = wanted[f"{role[0]}_kwargs"]
        same = network.fresh("meta").options == options_of(config, player)
        yield f"{role}: options", same, True, 0.0
        sizes = (network.resolution, network.num_classes) == (config["img_resolution"], config["c_dim"])
        yield f"{role}: sizes", sizes, True, 0.0
    globals_found = {name for name in read_checkpoint(case.path).globals if not name.endswith("Storage")}
    yield "globals, less those of inner blobs", globals_found == set(case.entry["globals"]), True, 0.0


ADAPTERS = {
    "keys_r3_*.json": keys,
    "init_std_r3_*.json": initial_deviations,
    "presets.json": presets,
    "r3_snapshot_expected.safetensors": snapshot_expected,
    "r3_snapshot*.pkl": snapshot,
}
