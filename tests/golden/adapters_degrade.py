"""Adapters for the second-order degradation and for MATLAB's bicubic resizing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# what the manifest leaves out about noise.safetensors, read off the stored outputs
GAUSS_VEC_SIGMA = (5.0, 25.0)
POISSON_GRAY_SCALE = (0.5, 2.5)
FLIPPED_SHARE = 0.005  # of 8-bit pixels that may differ by one level


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
    for i in range(8):
        random.seed(case.entry["seed"] + i)
        rng = np.random.RandomState(case.entry["seed"] + i)
        kind = random.choices(config["kernel_list"], config["kernel_prob"])[0]
        sigma_x = rng.uniform(*config["sigma_x_range"])
        anisotropic = kind.endswith("aniso")
        sigma_y = rng.uniform(*config["sigma_y_range"]) if anisotropic else sigma_x
        theta = rng.uniform(-math.pi, math.pi) if anisotropic else 0.0
        beta = 1.0
        if kind not in ("iso", "aniso"):
            low, high = config["betag_range" if kind.startswith("generalized") else "betap_range"]
            beta = rng.uniform(low, 1) if rng.uniform() < 0.5 else rng.uniform(1, high)
        size = config["kernel_size"]
        numbers = (one(sigma_x), one(sigma_y), one(theta), one(beta))
        index = torch.tensor([KINDS.index(kind)])
        yield f"out.k{i}", gaussian_kernels(index, torch.tensor([size]), *numbers, size)[0]


def filters(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.kernels import filter2d, sharpen, usm_kernel

    t = case.tensors
    yield "out.filter2d_shared", filter2d(t["in.x_small"], t["in.k_shared"])
    yield "out.filter2d_per_sample", filter2d(t["in.x_small"], t["in.k_per_sample"])
    yield "out.usm", sharpen(t["in.x"])
    yield "out.usm_smooth", sharpen(t["in.smooth"])
    yield "out.usm_kernel_row", usm_kernel(torch.device("cpu"))[0, 25]


def compression(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.jpeg import jpeg, soft_round

    x, odd = case.tensors["in.x"], case.tensors["in.x_odd"]
    for quality in (10.0, 50.0, 90.0):
        yield f"out.hard_q{quality:.0f}", jpeg(x, torch.full((len(x),), quality))
        yield f"out.soft_q{quality:.0f}", jpeg(x, torch.full((len(x),), quality), soft_round)
    yield "out.hard_qvec", jpeg(x, case.tensors["in.q_vec"])
    yield "out.hard_odd_q50", jpeg(odd, torch.full((len(odd),), 50.0))


def noises(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.noise import FixedSource, Noise, add_noise, eight_bit, luminance, photon_count

    x, seed = case.tensors["in.x"], case.entry["seed"]
    count, gray_count = photon_count(eight_bit(x)), photon_count(eight_bit(luminance(x)))

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def noise(kind: Any, level: tuple[float, ...], gray: tuple[bool, ...], maps: dict[str, Tensor]) -> Noise:
        return Noise(kind=kind, level=torch.tensor(level), gray=gray, source=FixedSource(maps))

    plain, maps = (False, False), torch.randn(x.shape, generator=seeded())
    yield "out.gauss_color_s15", add_noise(x, noise("gaussian", (15.0, 15.0), plain, {"colour": maps}))
    sigma = torch.tensor(GAUSS_VEC_SIGMA).view(-1, 1, 1, 1)
    yield "out.gauss_vec", x + maps * sigma / 255  # stored without the clip
    counts = torch.poisson(eight_bit(x) * count, generator=seeded())
    yield "out.poisson_color_s1", add_noise(x, noise("poisson", (1.0, 1.0), plain, {"colour": counts}))
    generator = seeded()
    gray = torch.poisson(eight_bit(luminance(x)) * gray_count, generator=generator)[:1]
    colour = torch.poisson(eight_bit(x) * count, generator=generator)[1:]
    mixed = noise("poisson", POISSON_GRAY_SCALE, (True, False), {"gray": gray, "colour": colour})
    yield "out.poisson_gray_vec", add_noise(x, mixed)
    yield "out.poisson_vals", count.flatten()


def resizing(case: Any) -> Iterator[tuple]:
    from sdtrain.data.degrade.resize_matlab import down_up, imresize

    x = case.tensors["in.img_hwc"].permute(2, 0, 1)
    for factor in (4, 8, 16):
        yield f"out.down{factor}", imresize(x, 1 / factor).permute(1, 2, 0)
        yield f"out.downup{factor}", down_up(x, factor).permute(1, 2, 0)
    yield "out.down_noaa2", imresize(x, 0.5, antialias=False).permute(1, 2, 0)


def fixed_decisions(case: Any) -> Any:
    """The decisions that the manifest's `config` records."""
    from sdtrain.data.degrade.chain import Decisions, Order
    from sdtrain.data.degrade.noise import FixedSource, Noise

    config, t = case.entry["config"], case.tensors

    def order(i: int) -> Order:
        source = FixedSource({"colour": t[f"aux.noise{i}"]})
        return Order(
            kernel=t[f"in.kernel{i}"],
            scale=config[f"scale{i}"],
            mode=config[f"mode{i}"],
            noise=Noise(kind="gaussian", level=torch.tensor(config[f"sigma{i}"]), gray=(False, False), source=source),
            quality=torch.tensor(config[f"q{i}"]),
        )

    return Decisions(
        first=order(1), second=order(2), sinc=t["in.sinc_kernel"], final_mode=config["mode3"], jpeg_last=True
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
    size = int(16 * decisions.second.scale)
    shrunk = torch.nn.functional.interpolate(filter2d(compressed, decisions.second.kernel), size=size, mode="area")
    yield "out.s4_resize2_item0", shrunk[:1]
    yield "out.s5_final_float", degrade.apply_chain(usm, decisions, rounded=False)
    lq = degrade.apply_chain(usm, decisions)
    yield "out.lq", lq, t["out.lq"], 1.001 / 255
    yield "out.lq share of flipped levels", (lq != t["out.lq"]).double().mean(), 0.0, FLIPPED_SHARE


ADAPTERS = {
    "degradation_kernels.safetensors": kernels,
    "degradation_random_mixed_kernels.safetensors": mixed_kernels,
    "filter_usm.safetensors": filters,
    "diffjpeg.safetensors": compression,
    "noise.safetensors": noises,
    "imresize_matlab_bicubic.safetensors": resizing,
    "degradation_pipeline_fixed.safetensors": pipeline,
}
