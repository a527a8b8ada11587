"""Metrics, LPIPS, MS-SSIM, the paired augmentation and one whole step of SD-GAN against the golden numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import rules
import torch
from rules import number
from torch import Tensor
from torch.nn import functional as F


def metrics(case: Any) -> Iterator[tuple]:
    """Two folders have a file of this name; the other one holds PSNR and SSIM."""
    if "fid.real" not in case.tensors:
        from adapters_sr_losses import metrics as other

        yield from other(case)
        return
    expected = case.entry["expected"]
    yield from _distances(case, expected)
    yield from _coverage(case, expected)
    yield from _lpips(case, expected)
    yield from _ms_ssim(case, expected["msssim"])
    yield from _variation(case, expected["variation"])
    yield from _sampling(case)


def _sampling(case: Any) -> Iterator[tuple]:
    from sdtrain.commands.sample import slerp
    from sdtrain.sampling import to_uint8

    t = case.tensors
    yield "quant.out_u8", to_uint8(t["quant.in"]), t["quant.out_u8"], 0.0
    # the reference moves on the unit sphere; ours keeps the lengths, which are one there
    a, b = (F.normalize(t[f"slerp.{name}"], dim=1) for name in "ab")
    yield "slerp.out", slerp(a, b, t["slerp.t"]), t["slerp.out"], 1e-5


def _distances(case: Any, expected: dict[str, Any]) -> Iterator[tuple]:
    from sdtrain.metrics.fid import fid_of_features, fid_of_sums
    from sdtrain.metrics.sums import FeatureSums

    t, tol = case.tensors, case.entry["tol"]["fid_rel"]
    real, fake = (FeatureSums(rows.shape[1]).add(rows) for rows in (t["fid.real"], t["fid.gen"]))
    mean, cov = real.moments(0)
    yield "fid.mu_real", mean, t["fid.mu_real"], 1e-7
    yield "fid.cov_real", cov, t["fid.cov_real"], 1e-6
    unbiased = "fid_with_unbiased_cov_for_comparison"
    for name, ddof in (("fid", 0), ("fid_check_eigh", 0), (unbiased, 1)):
        yield name, fid_of_sums(real, fake, ddof), expected[name], tol * expected[name]
    yield "fid_self", fid_of_sums(real, real, 0), expected["fid_self"], 1e-6
    for name in ("fid_rank_deficient", "fid_rank_deficient_check_eigh"):
        yield name, fid_of_features(t["fid.real_rd"], t["fid.gen_rd"], ddof=0), expected[name], 1e-4 * expected[name]


def _coverage(case: Any, expected: dict[str, Any]) -> Iterator[tuple]:
    from sdtrain.metrics.prc import precision_recall

    real, fake = case.tensors["pr.real"], case.tensors["pr.gen"]
    for hit in filter(None, (re.fullmatch(r"pr_(self_)?k(\d+)(?:_(float32|half))?", name) for name in expected)):
        found = precision_recall(real, real if hit[1] else fake, k=int(hit[2]), half=hit[3] == "half")
        for part, value in zip(("precision", "recall"), found, strict=True):
            yield f"{hit[0]}.{part}", value, expected[hit[0]][part], 0.0 if hit[1] else 1e-7


def lpips_of(case: Any) -> Any:
    """LPIPS with the trunk of the fill rule (family pg, the seed of metrics.safetensors)."""
    from sdtrain.losses.perceptual import LPIPS

    entry = case.other("metrics.safetensors").entry
    keys = entry["expected"]["lpips_vgg_keys"]
    return LPIPS(rules.fill({key: torch.zeros(shape) for key, shape in keys}, entry["seed"], "pg"))


def _lpips(case: Any, expected: dict[str, Any]) -> Iterator[tuple]:
    t, tol = case.tensors, case.entry["tol"]["lpips"]
    net = lpips_of(case)
    for name in case.group("lpips.lin"):
        yield f"lpips.lin{name}", net.state_dict()[f"lin{name}"], t[f"lpips.lin{name}"], 0.0
    scaling = expected["lpips_scaling"]
    yield "lpips_scaling.shift", net.shift.flatten(), torch.tensor(scaling["shift"]), 1e-7
    yield "lpips_scaling.scale", net.scale.flatten(), torch.tensor(scaling["scale"]), 1e-7
    x = t["lpips.in0"].clone().requires_grad_()
    layers = net.per_layer(x, t["lpips.in1"])
    for name, got in (("lpips.per_layer", layers), ("lpips.out", layers.sum(0))):
        yield name, got, t[name], tol["atol"] + tol["rtol"] * t[name].abs().max().item()
    layers.sum(0).mean().backward()
    assert x.grad is not None
    for name, stride in case.names(r"lpips\.grad_in0_s(\d+)"):
        # in norm: one ReLU of the reference lies within fp32 rounding of zero
        gap = (x.grad[:, :, :: int(stride), :: int(stride)] - t[name]).norm() / t[name].norm()
        yield f"{name} (relative norm of the gap)", gap, 0.0, 5e-3
    with torch.no_grad():
        yield "lpips_identical", net(x, x), torch.tensor(expected["lpips_identical"]), 0.0


def _ms_ssim(case: Any, expected: dict[str, Any]) -> Iterator[tuple]:
    from sdtrain.errors import ConfigError
    from sdtrain.losses.ms_ssim import gaussian as taps
    from sdtrain.losses.ms_ssim import ms_ssim, ssim_terms

    tol, x, y = case.entry["tol"]["msssim"], *_ms_ssim_inputs(case, expected["inputs"])
    for name, value in expected.items():
        hit = re.fullmatch(r"(ms_ssim_|ssim_)?win(\d+)(?:_res(\d+))?", name)
        if hit is None:
            continue
        window, side = int(hit[2]), int(hit[3] or x.shape[-1])
        a, b = x[..., :side, :side], y[..., :side, :side]
        if hit[1]:
            found = ms_ssim(a, b, window=window) if hit[1] == "ms_ssim_" else ssim_terms(a, b, taps(window))[0]
            yield f"msssim.{name}", found.mean(), value, tol
            continue
        refused = False
        try:
            ms_ssim(a, b, window=window)
        except ConfigError:
            refused = True
        yield f"{name} is refused", refused, "Error" in value, 0.0


def _ms_ssim_inputs(case: Any, said: str) -> tuple[Tensor, Tensor]:
    """A = avg_poolN(rnd a) * gain and A + share * avg_poolN(rnd b), clamped to [-1, 1] and moved to [0, 1]."""
    key, *shape = re.search(r"rnd\('([^']+)',([\d,]+)\)", said).groups()
    shape = [int(part) for part in shape[0].split(",")]
    window, gain, share = (int(number(said, "avg_pool")), number(said, r"\)\)\*"), number(said, r"A\+"))
    other = re.search(r"\*avg_pool\d+\(rnd\('([^']+)'", said)[1]
    a, b = (F.avg_pool2d(case.rnd(name, *shape), window, 1) for name in (key, other))
    return ((a * gain).clamp(-1, 1) + 1) / 2, ((a * gain + share * b).clamp(-1, 1) + 1) / 2


def _variation(case: Any, expected: dict[str, Any]) -> Iterator[tuple]:
    from check import Skip

    from sdtrain.metrics.variation import perceptual_variation

    rows = [row.view(-1, 1) for row in case.tensors["variation.values"]]
    over_latents_only = Skip("this repository has no spread over checkpoints, only that over latents")
    yield "variation.consecutive.std_over_steps", over_latents_only
    for mode in ("consecutive", "all_pairs"):
        for ddof, name in ((0, "std_over_latents_of_per_latent_mean"), (1, "std_over_latents_ddof1")):
            found = perceptual_variation(rows, lambda x, y: (x - y).abs().flatten(), mode=mode, ddof=ddof)
            yield f"variation.{mode}.mean", found[0], expected[mode]["mean"], 1e-9
            yield f"variation.{mode}.{name}", found[1], expected[mode][name], 1e-9


def paired(case: Any) -> Iterator[tuple]:
    from sdtrain.augment.paired import PairedAugment, affine_grid, rotation, translation, warp
    from sdtrain.rng import Draws

    t = case.tensors
    maps = {name: rotation(torch.deg2rad(t[full])) for full, name in case.names(r"param\.(\w+)\.angle_deg")}
    maps |= {name: translation(t[full]) for full, name in case.names(r"param\.(\w+)\.px")}
    centre = torch.eye(3)
    centre[:2, 2] = (t["in.x"].shape[-1] - 1) / 2
    for name, matrix in maps.items():
        yield f"out.{name}", warp(t["in.x"], affine_grid(matrix, t["in.x"]), "reflection")
        if f"out.{name}.matrix" in t:
            yield f"out.{name}.matrix", centre @ matrix @ torch.linalg.inv(centre)
    draws = Draws(seed=0, step=0, ghosts=tuple(range(len(t["in.x"]))), ghost_batch=1)
    a, b = PairedAugment()(t["in.x"], t["in.x"].clone(), draws)
    yield "both_inputs_get_identical_transform", torch.equal(a, b), True, 0.0


def sd_step(case: Any) -> Iterator[tuple]:
    """Values and every gradient of the generator objective, for each distance and weight."""
    from adapters_stylegan2 import build_discriminator, build_generator, gradient_sums, stored_gradients

    from sdtrain.losses.distance import l1, l2

    t, entry, c = case.tensors, case.entry, case.tensors.get("in.c")
    distances = {"lpips": lpips_of(case), "l1": l1, "l2": l2}
    G_ema = build_generator(case, case.group("sd.G_ema."), entry["G_config"])
    D = build_discriminator(case, case.group("sd.D."), entry["D_config"])
    with torch.no_grad():
        teacher = G_ema(t["in.z"], c, noise="const")
    yield "out.img_teacher", teacher
    for name, wanted in entry["results"].items():
        G = build_generator(case, case.group("sd.G."), entry["G_config"])
        student: Tensor = G(t["in.z"], c, noise="const")
        yield "out.img_student", student
        loss, alpha = name.split("_alpha")
        adv = F.softplus(-D(student, c)).mean()
        sd = distances[loss](student, teacher).mean()
        total = adv + float(alpha) * sd
        for part, value in (("adv", adv), ("sd", sd), ("total", total)):
            yield f"{name}.{part}", value, wanted[part], 1e-5 * abs(wanted[part])
        total.backward()
        yield from gradient_sums(case, G, wanted["grad_norm_sum"], name)
        yield from stored_gradients(case, G, f"grad.{name.removesuffix('.0')}.")


def frechet_files(case: Any) -> Iterator[tuple]:
    from sdtrain.metrics.fid import fid_of_features

    wanted = case.entry["expected"]["fid"]
    yield "fid", fid_of_features(case.tensors["in.x"], case.tensors["in.y"], ddof=1), wanted, case.limit(wanted)


ADAPTERS = {
    "metrics.safetensors": metrics,
    "sd_aug*.safetensors": paired,
    "sd_step*.safetensors": sd_step,
    "fid_formula.safetensors": frechet_files,
    "fid_rank_deficient.safetensors": frechet_files,
}
