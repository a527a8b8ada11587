"""Super-resolution: networks, checkpoints, losses, metrics and three training steps against the golden numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import rules
import torch
from torch import Tensor, nn

FACTOR_MAX = 64
START_SEED = 123423  # train_step_esrnet stores the state after its steps; it started from upstream's fresh weights


def _options(cls: type, config: dict[str, Any]) -> Any:
    return cls(**{name: value for name, value in config.items() if name in cls.__dataclass_fields__})


def _rrdbnet(config: dict[str, Any]) -> nn.Module:
    from sdtrain.models.rrdbnet.networks import Generator, GeneratorOptions

    return Generator(_options(GeneratorOptions, config)).eval()


def rrdbnet(case: Any) -> Iterator[tuple]:
    net, x = _rrdbnet(case.entry["config"]), case.tensors["in.x"].requires_grad_()
    net.load_state_dict(case.group("sd."))
    last = net.layer_names[-4]
    y, maps = net(x, ("conv_first", last, "conv_body", "trunk"))
    yield "out.y", y
    yield "out.grad_x_of_mean_y2", torch.autograd.grad(y.square().mean(), x)[0]
    yield "out.feat_body", maps[last]
    for layer in ("conv_first", "conv_body", "trunk"):
        yield f"out.feat_{layer}", maps[layer]


def rrdbnet_full(case: Any) -> Iterator[tuple]:
    net = case.procedural(_rrdbnet(case.entry["config"]))
    yield "n_params", sum(p.numel() for p in net.parameters()), case.entry["n_params"], 0.0
    with torch.no_grad():
        yield "out.y", net(case.tensors["in.x"])


def rrdbnet_init(case: Any) -> Iterator[tuple]:
    """Mean and standard deviation of fresh weights: four standard errors of either draw."""
    torch.manual_seed(0)
    state = _rrdbnet({}).state_dict()
    for name, (mean, std) in case.entry["values"].items():
        value = state[name].double()
        error = 4 * math.sqrt(2) * max(std, float(value.std())) / math.sqrt(value.numel())
        yield f"{name}.mean", value.mean(), mean, error
        yield f"{name}.std", value.std(), std, error


def srvgg(case: Any) -> Iterator[tuple]:
    from sdtrain.models.srvgg.networks import Generator, GeneratorOptions

    net = Generator(_options(GeneratorOptions, case.entry["config"]))
    net.load_state_dict(case.group("sd."))
    yield "out.y", net(case.tensors["in.x"])


def unet_sn(case: Any) -> Iterator[tuple]:
    from sdtrain.models.unet_sn.networks import Discriminator, DiscriminatorOptions

    net, x = Discriminator(_options(DiscriminatorOptions, case.entry["config"])), case.tensors["in.x"]
    net.load_state_dict(case.group("sd."))
    y = net.eval().logit_map(x)
    if "out.y_eval" in case.tensors:
        yield "out.y_eval", y
        return
    yield "out.y_eval_fresh", y
    for calls in (1, 3):
        for _ in range(calls if calls == 1 else 2):
            y = net.train().logit_map(x)
        yield f"out.y_train_call{calls}", y
        for name in case.group(f"out.after{calls}."):
            yield f"out.after{calls}.{name}", net.state_dict()[name]
    yield "out.y_eval_after3", net.eval().logit_map(x)


def _gcfsr(config: dict[str, Any]) -> nn.Module:
    from sdtrain.models.gcfsr.networks import Generator, GeneratorOptions

    return Generator(_options(GeneratorOptions, config), resolution=config["out_size"]).eval()


def _noise(case: Any) -> list[Tensor]:
    maps = case.group("aux.noise")
    return [maps[str(i)] for i in range(len(maps))]


def gcfsr(case: Any) -> Iterator[tuple]:
    net, t = _gcfsr(case.entry["config"]), case.tensors
    unused = {name: value for name, value in net.state_dict().items() if name.startswith("noises.")}
    net.load_state_dict({**unused, **case.group("sd.")})
    layers = ("codes", "enc.16", "final_conv", "last_style_conv")
    with torch.no_grad():
        y, maps = net(t["in.x"], t["in.in_size"] * FACTOR_MAX, noise=_noise(case), layers=layers)
        yield "out.y", y
        yield "out.latent", maps["codes"]
        yield "out.feat_enc_16", maps["enc.16"]
        yield "out.feat_final_conv", maps["final_conv"]
        yield "out.feat_last_style_conv_item0", maps["last_style_conv"][:1]
        yield "out.y_zero_noise_item0", net(t["in.x"][:1], t["in.in_size"][:1] * FACTOR_MAX)


def gcfsr_full(case: Any) -> Iterator[tuple]:
    net, t = case.procedural(_gcfsr(case.entry["config"])), case.tensors
    with torch.no_grad():
        y, maps = net(t["in.x"], t["in.in_size"] * FACTOR_MAX, noise=_noise(case), layers=("codes",))
    yield "out.y", y
    yield "out.latent", maps["codes"]


def gcfsr_discriminator(case: Any) -> Iterator[tuple]:
    from sdtrain.models.gcfsr.networks import Discriminator, DiscriminatorOptions

    config = case.entry["config"]
    options = DiscriminatorOptions(narrow=config["narrow"], stddev_group=config.get("stddev_group", 0))
    net, x = Discriminator(options, resolution=config["out_size"]), case.tensors["in.x"].requires_grad_()
    net.load_state_dict(case.group("sd."))
    logit = net(x)
    (grad,) = torch.autograd.grad(logit.sum(), x, create_graph=True)
    r1 = grad.square().sum((1, 2, 3)).mean()
    yield "out.logit", logit
    yield "out.grad_x_of_sum_logit", grad
    yield "out.r1", r1
    (10 / 2 * 16 * r1).backward()
    parameters = dict(net.named_parameters())
    for name in case.group("out.r1grad."):
        yield f"out.r1grad.{name}", parameters[name].grad


def gcfsr_parts(case: Any) -> Iterator[tuple]:
    from sdtrain.models.gcfsr.networks import EqualLinear, ModulatedConv2d, fir, unit_scales

    t, x = case.tensors, case.tensors["in.x"]
    yield "out.upsample", fir(x, (2, 1), up=True)
    yield "out.downsample", fir(x, (1, 1))[:, :, ::2, ::2]
    yield "out.smooth_after_transposed3", fir(4 * x, (1, 1))
    yield "out.smooth_before_down3", fir(x, (2, 2))
    yield "out.smooth_before_down1", fir(x, (1, 1))
    for sample in (None, "up", "down"):
        for demodulate in (True, False):
            name = f"modconv_{sample or 'none'}{'sample' if sample else ''}_{'' if demodulate else 'no'}demod"
            conv = ModulatedConv2d(4, 6, 3, 5, demodulate=demodulate, sample=sample)
            conv.load_state_dict(case.group(f"sd.{name}."))
            yield f"out.{name}", conv(x, t["in.style"])
    linear = EqualLinear(5, 4, lr_mul=0.5, activate=True)
    linear.load_state_dict(case.group("sd.equal_linear_lr0.5_lrelu."))
    yield "out.equal_linear_lr0.5_lrelu", linear(t["in.style"])
    a, b = unit_scales(t["in.scale1"], t["in.scale2"])
    yield "out.norm_scale1", a
    yield "out.norm_scale2", b


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

    games = {"vanilla": "logistic", "wgan_softplus": "logistic", "lsgan": "least-squares", "hinge": "hinge"}
    logit = case.tensors["in.logit"]
    for name, ours in {**games, "wgan": "wasserstein"}.items():
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
    connector = omgd_dcd.Connector(8, 12)
    connector.load_state_dict(case.group("sd.connector."))
    yield "out.connector_train", connector(t["in.f1"])
    mlp = feature.FeatureMLP(8, 16)
    mlp.load_state_dict(case.group("sd.mlp."))
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


def perceptual_vgg19(case: Any) -> Iterator[tuple]:
    from sdtrain.losses.feature import PerceptualLoss

    x, y = case.tensors["in.x"].requires_grad_(), case.tensors["in.y"]
    loss = PerceptualLoss.for_real_esrgan(_vgg_state(case, "vgg19"))
    value = loss(x, y)
    yield "out.percep", value
    yield "out.percep_w0.5", 0.5 * value
    yield "out.grad_x", torch.autograd.grad(value, x)[0]
    yield "out.style_w2", 2 * loss.style(x, y)
    maps, aims = loss.maps(x), loss.maps(y)
    for name, value in maps.items():
        yield f"out.feat_mean_{name}", value.mean((2, 3))
        yield f"out.l1_{name}", (value - aims[name]).abs().mean()


def perceptual_vgg16(case: Any) -> Iterator[tuple]:
    from sdtrain.losses.feature import PerceptualLoss

    t = case.tensors
    loss = PerceptualLoss.for_gcfsr(_vgg_state(case, "vgg16"))
    yield "out.percep", case.entry["config"]["perceptual_weight"] * loss(t["in.x"], t["in.y"])
    yield "out.feat_mean_conv4_3", loss.maps(t["in.x"])["conv4_3"].mean((2, 3))


def omgd(case: Any) -> Iterator[tuple]:
    from sdtrain.losses import omgd_dcd

    t = case.tensors
    vgg = omgd_dcd.response_network(_vgg_state(case, "vgg16"))
    terms = omgd_dcd.omgd_terms(vgg, t["in.student"], t["in.teacher"])
    yield "out.ssim_term_unweighted", terms["ssim"]
    yield "out.style_unweighted", terms["style"]
    yield "out.feature_unweighted", terms["feature"]
    yield "out.tv_sum_unweighted", terms["tv"]
    yield "out.total_one_teacher", omgd_dcd.weighted(terms, omgd_dcd.OMGD_WEIGHTS)
    response = {name: terms[name] for name in omgd_dcd.DCD_WEIGHTS}
    yield "out.total_dcd_published_weights", omgd_dcd.weighted(response, omgd_dcd.DCD_WEIGHTS)


def _patch_hidden(state: dict[str, Tensor]) -> nn.Module:
    """The hidden part of the reference's PatchGAN, up to its last leaky ReLU."""
    layers: list[nn.Module] = []
    for position, stride in ((0, 2), (2, 2), (5, 2), (8, 1)):
        weight = state[f"{position}.weight"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 4, stride, 1)
        conv.load_state_dict({"weight": weight, "bias": state[f"{position}.bias"]})
        norm = [nn.InstanceNorm2d(weight.shape[0])] if position else []
        layers += [conv, *norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def dcd(case: Any) -> Iterator[tuple]:
    from sdtrain.losses.omgd_dcd import Connector, discriminator_distance

    maps, hidden = {}, _patch_hidden(case.group("sd.netD."))
    for side in "TS":
        f = case.tensors[f"in.f{side}"]
        connector = Connector(f.shape[1], 3)
        connector.load_state_dict({**connector.state_dict(), **case.group(f"sd.net{side}.")})
        maps[side] = connector(f)
        yield f"out.{side}", maps[side]
        yield f"out.d{side}", hidden(maps[side])
    yield "out.loss", discriminator_distance(hidden, maps["S"], maps["T"])


def metrics(case: Any) -> Iterator[tuple]:
    from sdtrain.metrics import sr_metrics

    if "in.a_bgr_hwc_u8" not in case.tensors:
        return
    a, b = (case.tensors[name].flip(-1).permute(2, 0, 1)[None] for name in ("in.a_bgr_hwc_u8", "in.b_bgr_hwc_u8"))
    for name, value in case.entry["expected"].items():
        if name.startswith("y_of_bgr_pixel_"):
            bgr = [float(part) for part in name.split("_")[-3:]]
            got = sr_metrics.luminance(torch.tensor(bgr).flip(0).view(1, 3, 1, 1))
        else:
            kind, *_ = name.split("_")
            border, luma = int(name.split("crop")[1][0]), name.endswith("_y")
            got = getattr(sr_metrics, kind)(a, b, crop_border=border, luma=luma)
            if name.startswith("psnr_pt_"):  # upstream's PSNR of tensors in [0, 1] adds 1e-8 to the squared error
                got = -10 * torch.log10(10 ** (-got / 10) + 1e-8)
        yield name, got.squeeze(), value, case.limit(value)


def pth_x4(case: Any) -> Iterator[tuple]:
    """The .pth files of the x4 network, and the file that holds what they must give."""
    from sdtrain.interop.loading import load_network

    expected = case.other("pth_expected.safetensors")
    name = "RRDBNet_x4_nf8_params_ema.pth" if case.path.suffix == ".safetensors" else case.name
    net = load_network(case.folder / name).build()
    reference = expected.tensors["out.y"]
    yield "out.y", net(expected.tensors["in.x"]), reference, expected.limit(reference)


def pth_x2(case: Any) -> Iterator[tuple]:
    from sdtrain.interop.loading import load_network

    found = load_network(case.path)
    raw, average = load_network(case.path, prefer="params").state, found.state
    worst = max(float((average[name] - 0.99 * raw[name]).abs().max()) for name in raw)
    yield "ema is 0.99 params", worst, 0.0, 1e-6
    net = found.build()
    yield "scale", found.typed_options.scale, 2, 0.0
    yield "side", net(torch.zeros(1, 3, 4, 6)).shape[-1], 12, 0.0


def pth_other(case: Any) -> Iterator[tuple]:
    """Recognised, loaded strictly, and the discriminator refused where a generator is needed."""
    from sdtrain.errors import WeightsError
    from sdtrain.interop.architectures import require
    from sdtrain.interop.loading import load_network

    found = load_network(case.path)
    yield "recognised", found.kind == ("unet_sn" if case.name.startswith("UNetD") else "gcfsr"), True, 0.0
    refused = False
    try:
        require(case.path, found, player="Generator")
    except WeightsError:
        refused = True
    yield "refused as a generator", refused, found.player == "Discriminator", 0.0


def train_step(case: Any) -> Iterator[tuple]:
    """Three whole steps: L1, Adam, average."""
    from sdtrain.losses.distance import l1

    config, t = case.entry["config"], case.tensors
    torch.manual_seed(START_SEED)
    net = _rrdbnet(config).train()
    average = copy.deepcopy(net)
    adam = torch.optim.Adam(net.parameters(), config["adam"]["lr"], tuple(config["adam"]["betas"]))
    for step in range(3):
        loss = l1(net(t["in.x"]), t["in.y"]).mean()
        yield f"out.loss{step}", loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - config["ema"])
    for side, player in (("net", net), ("ema", average)):
        for name in case.group(f"out.{side}."):
            yield f"out.{side}.{name}", player.state_dict()[name]


ADAPTERS = {
    "rrdbnet_x[124].safetensors": rrdbnet,
    "rrdbnet_x4_full_procedural.safetensors": rrdbnet_full,
    "init_statistics_RRDBNet_nf64": rrdbnet_init,
    "srvgg.safetensors": srvgg,
    "unet_disc_sn*.safetensors": unet_sn,
    "gcfsr_g[36][24].safetensors": gcfsr,
    "gcfsr_g32_full_procedural.safetensors": gcfsr_full,
    "gcfsr_d_nostd.safetensors": gcfsr_discriminator,
    "stylegan2_d_std.safetensors": gcfsr_discriminator,
    "gcfsr_parts.safetensors": gcfsr_parts,
    "losses.safetensors": losses,
    "perceptual_vgg19_procedural.safetensors": perceptual_vgg19,
    "perceptual_vgg16_gcfsr_procedural.safetensors": perceptual_vgg16,
    "omgd_student_loss.safetensors": omgd,
    "dcd_fm_loss.safetensors": dcd,
    "metric[s].safetensors": metrics,  # a pattern: another folder has a file of this name
    "pth_expected.safetensors": pth_x4,
    "RRDBNet_x4_nf8_params_ema.pth": pth_x4,
    "ESRGAN_oldarch_x4_nf8.pth": pth_x4,
    "RRDBNet_x2_nf8_params_and_ema.pth": pth_x2,
    "UNetD_nf4_params.pth": pth_other,
    "GCFSR_32_narrow32_params_and_ema.pth": pth_other,
    "train_step_esrnet.safetensors": train_step,
}
