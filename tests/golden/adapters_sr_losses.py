"""Super-resolution: losses, their feature networks and the image metrics against the golden numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import rules
import torch
from rules import number
from torch import Tensor, nn


def losses(case: Any) -> Iterator[tuple]:
    yield from _pixel_losses(case)
    yield from _adversarial_losses(case)
    yield from _distillation_losses(case)


def _pixel_losses(case: Any) -> Iterator[tuple]:
    from sdtrain.losses import omgd_dcd
    from sdtrain.losses.distance import l1
    from sdtrain.losses.feature import charbonnier

    a, b = case.tensors["in.a"], case.tensors["in.b"]
    yield "out.l1", l1(a, b).mean()
    yield "out.charbonnier", charbonnier(a, b)
    yield "out.wtv", omgd_dcd.mean_total_variation(a)
    yield "out.omgd_ssim", omgd_dcd.ssim_zero_padded(a * 2 - 1, b * 2 - 1)
    yield "out.omgd_tv_sum", omgd_dcd.total_variation(a * 2 - 1)


def _adversarial_losses(case: Any) -> Iterator[tuple]:
    from sdtrain.losses import adversarial

    games = {"vanilla": "logistic", "wgan_softplus": "logistic", "lsgan": "least_squares", "hinge": "hinge"}
    logit = case.tensors["in.logit"]
    for _, name in case.names(r"out\.(\w+)_d_real"):
        ours = {**games, "wgan": "wasserstein"}[name]
        real, fake = getattr(adversarial, f"{ours}_d")(logit, logit)
        yield f"out.{name}_d_real", real
        yield f"out.{name}_d_fake", fake
        yield f"out.{name}_g_real", case.entry["config"]["gan_loss_weight"] * getattr(adversarial, f"{ours}_g")(logit)


def _distillation_losses(case: Any) -> Iterator[tuple]:
    from sdtrain.losses import feature, omgd_dcd

    t = case.tensors
    yield "out.gram_f1", feature.gram(t["in.f1"])
    yield "out.style_l1", (feature.gram(t["in.f1"]) - feature.gram(t["in.f2"])).abs().mean()
    yield "out.omgd_cd", omgd_dcd.channel_distillation(t["in.f1"], t["in.f2"])
    state = case.group("sd.connector.")
    connector = omgd_dcd.Connector(*state["0.weight"].shape[1::-1])
    connector.load_state_dict(state)
    yield "out.connector_train", connector(t["in.f1"])
    state = case.group("sd.mlp.")
    mlp = feature.FeatureMLP(*state["0.weight"].shape[1::-1])
    mlp.load_state_dict(state)
    yield "out.mlp", mlp(t["in.fs"])
    yield "out.mlp_mse_mean", feature.mlp_loss(mlp, t["in.fs"], t["in.ft"], tiles=3)
    yield "out.mlp_mse_sum_div_batch", feature.mlp_loss(mlp, t["in.fs"], t["in.ft"], "sum")
    yield "out.stage2_D_sigmoid_mse", feature.probability_loss(t["in.ps"], t["in.pt"])
    yield "out.stage2_D_logit_mse", feature.probability_loss(t["in.ps"], t["in.pt"], of="logit")


def _vgg_state(case: Any, net: str) -> dict[str, Tensor]:
    """Procedural weights of the features; the classifier only counts among the sorted keys."""
    from sdtrain.losses.feature import VGGFeatures

    state = VGGFeatures([f"conv5_{4 if net == 'vgg19' else 3}"], net=net).state_dict()
    for position in (0, 3, 6):
        state |= {f"classifier.{position}.{leaf}": torch.zeros(1) for leaf in ("weight", "bias")}
    return rules.procedural(state, case.entry["weights"].split(";")[0])


def perceptual(case: Any) -> Iterator[tuple]:
    """Network, layers and weights are those of the entry; the two published settings are the product's own."""
    from sdtrain.losses import feature

    config, net = case.entry["config"], "vgg16" if "VGG16" in case.entry["module"] else "vgg19"
    x, y = case.tensors["in.x"].requires_grad_(), case.tensors["in.y"]
    layers, ranged = config["layer_weights"], config["range_norm"]
    loss = feature.PerceptualLoss(layers, _vgg_state(case, net), net=net, range_norm=ranged)
    value = config.get("perceptual_weight", 1) * loss(x, y)
    for name, weight in case.names(r"out\.percep(?:_w([\d.]+))?"):
        yield name, float(weight or 1) * value
    for name, weight in case.names(r"out\.style(?:_w([\d.]+))?"):
        yield name, float(weight or 1) * loss.style(x, y)
    for (name,) in case.names(r"out\.grad_x"):
        yield name, torch.autograd.grad(value, x)[0]
    maps, aims = loss.maps(x), loss.maps(y)
    for name, layer in case.names(r"out\.feat_mean_(\w+)"):
        yield name, maps[layer].mean((2, 3))
    for name, layer in case.names(r"out\.l1_(\w+)"):
        yield name, (maps[layer] - aims[layer]).abs().mean()
    if case.manifest.get("set") == "dev":  # the set whose options are the published ones
        published = feature.GCFSR if net == "vgg16" else feature.REAL_ESRGAN
        yield "published setting", published == layers, True, 0.0


def omgd(case: Any) -> Iterator[tuple]:
    from sdtrain.losses import omgd_dcd

    t = case.tensors
    vgg = omgd_dcd.response_network(_vgg_state(case, "vgg16"))
    (terms,) = omgd_dcd.omgd_terms(vgg, t["in.student"], t["in.teacher"])
    yield "out.ssim_term_unweighted", terms["ssim"]
    yield "out.style_unweighted", terms["style"]
    yield "out.feature_unweighted", terms["feature"]
    yield "out.tv_sum_unweighted", terms["tv"]
    weights, fewer = case.entry["config"]["weights_omgd"], case.entry["config"]["weights_dcd_default"]
    yield "out.total_one_teacher", omgd_dcd.weighted(terms, weights)
    response = {name: terms[name] for name in fewer}
    yield "out.total_dcd_published_weights", omgd_dcd.weighted(response, fewer)
    if case.manifest.get("set") == "dev":  # the set whose options are the published ones
        from sdtrain.methods.dcd import options as dcd
        from sdtrain.methods.omgd import options as omgd

        published = ((omgd.Response(), weights), (dcd.Response(), fewer))
        same = all(getattr(ours, name) == value for ours, theirs in published for name, value in theirs.items())
        yield "published weights", same, True, 0.0


def _patch_hidden(state: dict[str, Tensor]) -> nn.Module:
    """The hidden part of the reference's PatchGAN, up to its last leaky ReLU."""
    layers: list[nn.Module] = []
    *hidden, _ = sorted(int(name.split(".")[0]) for name in state if name.endswith(".weight"))
    for position in hidden:
        weight = state[f"{position}.weight"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], 1 if position == hidden[-1] else 2, 1)
        conv.load_state_dict({"weight": weight, "bias": state[f"{position}.bias"]})
        norm = [nn.InstanceNorm2d(weight.shape[0])] if position else []
        layers += [conv, *norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def dcd(case: Any) -> Iterator[tuple]:
    from sdtrain.losses.omgd_dcd import Connector, discriminator_distance

    maps, hidden = {}, _patch_hidden(case.group("sd.netD."))
    for side in "TS":
        f = case.tensors[f"in.f{side}"]
        state = case.group(f"sd.net{side}.")
        connector = Connector(f.shape[1], len(state["0.weight"]))
        connector.load_state_dict({**connector.state_dict(), **state})
        maps[side] = connector(f)
        yield f"out.{side}", maps[side]
        yield f"out.d{side}", hidden(maps[side])
    yield "out.loss", discriminator_distance(hidden, maps["S"], maps["T"])


def metrics(case: Any) -> Iterator[tuple]:
    from sdtrain.metrics import sr_metrics

    a, b = (case.tensors[name].flip(-1).permute(2, 0, 1)[None] for name in ("in.a_bgr_hwc_u8", "in.b_bgr_hwc_u8"))
    for name, value in case.entry["expected"].items():
        if name.startswith("y_of_bgr_pixel_"):
            bgr = [float(part) for part in name.split("_")[-3:]]
            got = sr_metrics.luminance(torch.tensor(bgr).flip(0).view(1, 3, 1, 1))
        else:
            kind, *_ = name.split("_")
            border, luma = int(number(name, "crop")), name.endswith("_y")
            got = getattr(sr_metrics, kind)(a, b, crop_border=border, luma=luma)
            if name.startswith("psnr_pt_"):  # upstream's PSNR of tensors in [0, 1] adds 1e-8 to the squared error
                got = -10 * torch.log10(10 ** (-got / 10) + 1e-8)
        yield name, got.squeeze(), value, case.limit(value)


ADAPTERS = {
    "losses*.safetensors": losses,
    "perceptual_vgg*.safetensors": perceptual,
    "omgd_student_loss*.safetensors": omgd,
    "dcd_fm_loss*.safetensors": dcd,
}
