"""Adapters for the second-order degradation and for MATLAB's bicubic resizing."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rules import number
from torch import Tensor


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def kernels(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.kernels import KINDS, gaussian_kernels, sinc_kernels

    for call in case.entry["calls"]:
        output, size = f"out.{call['name']}", torch.tensor([call["kernel_size"]])
        canvas = case.tensors[output].shape[-1]
        if call["kind"] == "sinc":
            yield output, sinc_kernels(one(call["cutoff"]), size, canvas)[0]
            continue
        kind = torch.tensor([KINDS.index(call["kind"])])
        sigmas = one(call["sigma_x"]), one(call.get("sigma_y", 1.0))
        shape = one(call.get("theta", 0.0)), one(call.get("beta", 1.0))
        yield output, gaussian_kernels(kind, size, *sigmas, *shape, canvas)[0]


def mixed_kernels(case: Any) -> Iterator[tuple]:
    """Repeats the recorded order of calls to Python's and numpy's generators."""
    from sdtrain.data.degrade.kernels import KINDS, gaussian_kernels

    config = case.entry["config"]
    low_angle, high_angle = _range(config["rotation_range"])
    for output, draw in case.names(r"out\.k(\d+)"):
        random.seed(case.entry["seed"] + int(draw))
        rng = np.random.RandomState(case.entry["seed"] + int(draw))
        kind = random.choices(config["kernel_list"], config["kernel_prob"])[0]
        sigma_x = rng.uniform(*config["sigma_x_range"])
        anisotropic = kind.endswith("aniso")
        sigma_y = rng.uniform(*config["sigma_y_range"]) if anisotropic else sigma_x
        theta = rng.uniform(low_angle, high_angle) if anisotropic else 0.0
        beta = 1.0
        if kind not in ("iso", "aniso"):
            low, high = config["betag_range" if kind.startswith("generalized") else "betap_range"]
            beta = rng.uniform(low, 1) if rng.uniform() < 0.5 else rng.uniform(1, high)
        size = config["kernel_size"]
        numbers = (one(sigma_x), one(sigma_y), one(theta), one(beta))
        index = torch.tensor([KINDS.index(kind)])
        yield output, gaussian_kernels(index, torch.tensor([size]), *numbers, size)[0]


def _range(text: str | list[float]) -> tuple[float, float]:
    """'[-pi,pi]' or a list of two numbers."""
    if isinstance(text, list):
        return text[0], text[1]
    low, high = (math.pi * float(part.replace("pi", "1").replace("/", "")) for part in text.strip("[]").split(","))
    return low, high


def filters(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.kernels import filter2d, sharpen, usm_kernel

    t = case.tensors
    for output, name in case.names(r"out\.filter2d_(\w+)"):
        yield output, filter2d(t["in.x_small"], t[f"in.k_{name}"])
    weight = number(case.entry["call"], "weight")
    yield "out.usm", sharpen(t["in.x"], weight)
    yield "out.usm_smooth", sharpen(t["in.smooth"], weight)
    kernel = usm_kernel(torch.device("cpu"))[0]
    yield "out.usm_kernel_row", kernel[len(kernel) // 2]


def compression(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.jpeg import jpeg, soft_round

    found = re.search(r"allow <=([\d.]+)% of pixels", case.entry.get("note", ""))
    flipped = float(found[1]) / 100 if found else 0.0
    for name, kind, odd, quality in case.names(r"out\.(hard|soft)(_odd)?_q(vec|\d+)"):
        x = case.tensors["in.x" + odd]
        q = case.tensors["in.q_vec"] if quality == "vec" else torch.full((len(x),), float(quality))
        if kind == "soft":
            yield name, jpeg(x, q, soft_round)
            continue
        # hard rounding flips a coefficient at ties: the worst pixels may deviate by any amount
        gap = (jpeg(x, q) - case.tensors[name]).abs().flatten().sort().values
        yield name, gap[: len(gap) - int(flipped * len(gap))].max(), 0.0, case.limit(case.tensors[name])


def noises(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.noise import FixedSource, Noise, add_noise, eight_bit, luminance, photon_count

    x, seed = case.tensors["in.x"], case.entry["seed"]
    count, gray_count = photon_count(eight_bit(x)), photon_count(eight_bit(luminance(x)))

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def noise(kind: Any, level: Tensor, gray: Tensor, maps: dict[str, Tensor]) -> Noise:
        return Noise(kind=kind, level=level, gray=tuple(gray.tolist()), source=FixedSource(maps))

    plain, maps = torch.zeros(len(x), dtype=torch.bool), torch.randn(x.shape, generator=seeded())
    counts = torch.poisson(eight_bit(x) * count, generator=seeded())
    for name, kind, level in case.names(r"out\.(gauss|poisson)_color_s([\d.]+)"):
        fixed, word = (maps, "gaussian") if kind == "gauss" else (counts, "poisson")
        levels = torch.full((len(x),), float(level))
        yield name, add_noise(x, noise(word, levels, plain, {"colour": fixed}))
    # stored without the clip; the strengths of the two `_vec` outputs are in no file, but in the outputs
    sigma = _strength(case.tensors["out.gauss_vec"] - x, maps / 255)
    yield "out.gauss_vec", x + maps * sigma.view(-1, 1, 1, 1) / 255
    stored = case.tensors["out.poisson_gray_vec"]
    has_gray = ((stored - x) - (stored - x).mean(1, keepdim=True)).abs().flatten(1).median(1).values < 1e-4
    generator = seeded()
    gray = torch.poisson(eight_bit(luminance(x)) * gray_count, generator=generator)
    colour = torch.poisson(eight_bit(x) * count, generator=generator)
    shot = torch.where(
        has_gray.view(-1, 1, 1, 1),
        (gray / gray_count - eight_bit(luminance(x))).expand_as(x),
        colour / count - eight_bit(x),
    )
    mixed = {"gray": gray[has_gray], "colour": colour[~has_gray]}
    yield "out.poisson_gray_vec", add_noise(x, noise("poisson", _strength(stored - x, shot), has_gray, mixed))
    yield "out.poisson_vals", count.flatten()


def _strength(added: Tensor, unit: Tensor) -> Tensor:
    """The factor of each sample [N] on `unit` that is in `added` for most pixels, to three decimals."""
    ratio = (added / unit).flatten(1)
    return torch.stack([row[row.isfinite()].median() for row in ratio]).mul(1000).round() / 1000


def resizing(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.resize_matlab import down_up, imresize

    x = case.tensors["in.img_hwc"].permute(2, 0, 1)
    for name, kind, factor in case.names(r"out\.down(up|_noaa)?(\d+)"):
        if kind == "up":
            yield name, down_up(x, int(factor)).permute(1, 2, 0)
        else:
            yield name, imresize(x, 1 / int(factor), antialias=not kind).permute(1, 2, 0)


def fixed_decisions(case: Any) -> Any:
    """The decisions that the manifest's `config` records."""
    from sdtrain.data.degrade.chain import Decisions, Order
    from sdtrain.data.degrade.noise import FixedSource, Noise

    config, t = case.entry["config"], case.tensors
    colour = tuple(False for _ in t["in.gt"])

    def order(i: int) -> Order:
        source = FixedSource({"colour": t[f"aux.noise{i}"]})
        return Order(
            kernel=t[f"in.kernel{i}"],
            scale=config[f"scale{i}"],
            mode=config[f"mode{i}"],
            noise=Noise(kind="gaussian", level=torch.tensor(config[f"sigma{i}"]), gray=colour, source=source),
            quality=torch.tensor(config[f"q{i}"]),
        )

    jpeg_last = config["order"].rindex("JPEG") > config["order"].rindex("sinc")
    return Decisions(
        first=order(1), second=order(2), sinc=t["in.sinc_kernel"], final_mode=config["mode3"], jpeg_last=jpeg_last
    )


def pipeline(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade import chain as degrade
    from sdtrain.data.degrade.kernels import filter2d, sharpen

    decisions, t = fixed_decisions(case), case.tensors
    usm = sharpen(t["in.gt"])
    yield "out.gt_usm", usm
    first = decisions.first
    blurred = filter2d(usm, first.kernel)
    resized = torch.nn.functional.interpolate(blurred, scale_factor=first.scale, mode=first.mode)
    yield "out.s2_resize_item0", resized[:1]
    compressed = degrade.first_order(usm, first)
    yield "out.s3_jpeg1_item0", compressed[:1]
    second = decisions.second
    size = int(t["out.lq"].shape[-1] * second.scale)
    shrunk = torch.nn.functional.interpolate(filter2d(compressed, second.kernel), size=size, mode=second.mode)
    yield "out.s4_resize2_item0", shrunk[:1]
    yield "out.s5_final_float", degrade.apply_chain(usm, decisions, rounded=False)
    lq = degrade.apply_chain(usm, decisions)
    yield "out.lq", lq, t["out.lq"], 1.001 / 255
    flipped = (lq - t["out.lq"]).abs() > 0.5 / 255
    yield "out.lq share of flipped levels", flipped.double().mean(), 0.0, number(case.entry["note"], "<=") / 100


ADAPTERS = {
    "degradation_kernels*.safetensors": kernels,
    "degradation_random_mixed_kernels*.safetensors": mixed_kernels,
    "filter_usm*.safetensors": filters,
    "diffjpeg*.safetensors": compression,
    "noise*.safetensors": noises,
    "imresize_matlab_bicubic*.safetensors": resizing,
    "degradation_pipeline_fixed*.safetensors": pipeline,
}
