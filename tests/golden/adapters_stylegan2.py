"""StyleGAN2-ADA: networks, losses, operations, ADA and the schedules against the golden numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PL_DECAY, PL_WEIGHT = 0.01, 2.0
R1_GAMMA = 1.5  # of sg2_loss, named in its text


class AmbientDraws:
    """Draws that take torch's seeded stream in call order, as the goldens did."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

        self.ghost_batch = num_samples

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return torch.randn(self.num_samples, *shape)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        return torch.rand(self.num_samples, *shape)


def gradient_sums(case, net: nn.Module, stats: Mapping[str, list[float]], tag: str) -> Iterator[tuple]:
    """Norm and sum of every parameter's gradient against the manifest, both within the norm's tolerance."""
    parameters = dict(net.named_parameters())
    for name, (norm, total) in stats.items():
        grad = parameters[name].grad
        grad = torch.zeros_like(parameters[name]) if grad is None else grad
        yield f"{tag}.norm.{name}", grad.norm(), norm, case.norm_limit(norm)
        yield f"{tag}.sum.{name}", grad.double().sum(), total, case.norm_limit(norm)


def build_generator(case, state: Mapping[str, Tensor], config: Mapping[str, Any], **override: Any):
    from sdtrain.models.stylegan2.networks import generator_from_official

    net = generator_from_official(config, **override).eval()
    net.load_state_dict(state)
    return net


def build_discriminator(case, state: Mapping[str, Tensor], config: Mapping[str, Any], **override: Any):
    from sdtrain.models.stylegan2.networks import discriminator_from_official

    net = discriminator_from_official(config, **override).eval()
    net.load_state_dict(state)
    return net


def generator(case) -> Iterator[tuple]:
    t, config, state = case.tensors, case.entry["config"], case.group("sd.")
    G = build_generator(case, state, config)
    z, c = t["in.z"], t["in.c"]
    with torch.no_grad():
        ws = G.mapping(z, c)
        yield "out.ws", ws
        yield "out.ws_psi0.7", G.mapping(z, c, truncation_psi=0.7)
        yield "out.ws_psi0.5_cut3", G.mapping(z, c, truncation_psi=0.5, truncation_cutoff=3)
        yield "out.img_none.s2", _half(G(z, c, noise="none"))
        yield "out.img_const_psi0.7.s2", _half(G(z, c, noise="const", truncation_psi=0.7))
        mixed = torch.cat([ws[:, :2], ws.flip(0)[:, 2:]], 1)
        yield "out.img_mixed_cut2.s2", _half(G.synthesis(mixed, noise="const"))
        torch.manual_seed(1003)
        yield "out.img_random_seeded.s2", _half(G.synthesis(ws, AmbientDraws(len(z))))
        clamped = build_generator(case, state, config, conv_clamp=0.75)
        yield "out.img_const_clamp0.75.s2", _half(clamped(z, c, noise="const"))
        yield from _blocks(G, ws, t)
    yield from _generator_gradients(case, G, z, c)
    yield from _path_length(case, G, z, c)
    G.train().mapping(z, c)
    yield "out.train_w_avg_after", G.mapping.w_avg


def _half(images: Tensor) -> Tensor:
    return images[:, :, ::2, ::2]


def _blocks(G, ws: Tensor, stored: Mapping[str, Tensor]) -> Iterator[tuple]:
    x = image = None
    first = 0
    for r in G.synthesis.resolutions:
        block = getattr(G.synthesis, f"b{r}")
        x, image = block(x, image, ws[:, first : first + block.num_conv + 1], None, "const")
        first += block.num_conv
        if f"mid.b{r}.x_n0" in stored:
            yield f"mid.b{r}.x_n0", x[0]
            yield f"mid.b{r}.img_n0", image[0]


def _generator_gradients(case, G, z: Tensor, c: Tensor) -> Iterator[tuple]:
    z = z.clone().requires_grad_()
    images = G(z, c, noise="const")
    yield "out.img_const", images
    G.zero_grad()
    (images * case.tensors["in.grad_weight"]).sum().backward()
    yield "out.dz", z.grad
    yield from gradient_sums(case, G, case.entry["grad_stats_norm_sum"], "grad")


def _path_length(case, G, z: Tensor, c: Tensor) -> Iterator[tuple]:
    from sdtrain.losses.regularizers import path_length_penalty, path_lengths

    ws = G.mapping(z, c).detach().requires_grad_()
    images = G.synthesis(ws, noise="const")
    lengths = path_lengths(ws, images, case.tensors["in.pl_noise_unit"])
    penalty, mean = path_length_penalty(lengths, case.tensors["in.pl_mean_before"], PL_DECAY, PL_WEIGHT)
    yield "out.pl_lengths", lengths
    yield "out.pl_loss", penalty
    yield "out.pl_mean_after", mean
    G.zero_grad()
    penalty.backward()
    yield from gradient_sums(case, G.synthesis, case.entry["pl_grad_stats_norm_sum"], "pl_grad")


def discriminator(case) -> Iterator[tuple]:
    t, config, state = case.tensors, case.entry["config"], case.group("sd.")
    D = build_discriminator(case, state, config)
    seen: dict[str, Tensor] = {}
    for name, module in D.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    images = t["in.img"].clone().requires_grad_()
    logits = D(images, t["in.c"])
    yield "out.logits", logits
    for r in D.resolutions:
        yield f"mid.b{r}.x_n0", seen[f"b{r}"][0][0]
    yield "mid.mbstd_extra_channels", seen["b4.mbstd"][:, -1:, 0, 0]
    if "mid.cmap" in t:
        yield "mid.cmap", seen["mapping"]
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    penalty = slope.square().sum((1, 2, 3))
    yield "out.r1_grad_n0", slope[0]
    yield "out.r1_penalty", penalty
    D.zero_grad()
    (penalty.mean() * (case.entry["r1_gamma"] / 2)).backward()
    yield from gradient_sums(case, D, case.entry["r1_weight_grad_stats_norm_sum"], "r1_grad")
    D.zero_grad()
    F.softplus(-D(t["in.img"], t["in.c"])).mean().backward()
    yield from gradient_sums(case, D, case.entry["softplus_neg_mean_grad_stats_norm_sum"], "grad")
    clamped = build_discriminator(case, state, config, conv_clamp=0.6)
    yield "out.logits_clamp0.6", clamped(t["in.img"], t["in.c"])


def architectures(case) -> Iterator[tuple]:
    from sdtrain.models.stylegan2.networks import Discriminator, DiscriminatorOptions

    for name in ("orig", "skip"):
        options = DiscriminatorOptions(architecture=name, channel_base=128, channel_max=8, mbstd_group=32)
        D = Discriminator(options, resolution=16).eval()
        D.load_state_dict(case.group(f"sd.{name}."))
        yield f"out.{name}.logits", D(case.tensors["in.img"])


def _full_size(config: Mapping[str, Any], **widths: Any) -> tuple:
    """Generator and discriminator of a preset, built from official arguments."""
    from sdtrain.models.stylegan2.networks import discriminator_from_official, generator_from_official

    sizes = {"c_dim": 0, "img_resolution": config["res"]}
    widths = {"channel_base": config["channel_base"], "channel_max": 512, "num_fp16_res": 0, **widths}
    nested = {"mapping_kwargs": {"num_layers": config["map"]}, "synthesis_kwargs": widths}
    G = generator_from_official({"z_dim": 512, "w_dim": 512, **sizes, **nested})
    return G, discriminator_from_official({**sizes, **widths, "epilogue_kwargs": {"mbstd_group_size": 4}})


def big(case) -> Iterator[tuple]:
    config, stride = case.entry["config"], case.entry["stride"]
    G, D = _full_size(case.entry["config"], conv_clamp=256)
    G.eval(), D.eval()
    with torch.no_grad():
        image = case.fill(G, "sg2")(case.rnd("bigG.z", 1, 512), noise="const")
        yield "out.img_strided", image[:, :, ::stride, ::stride]
        yield "out.img_mean", image.mean(), case.tensors["out.img_mean"], case.limit(case.tensors["out.img_std"])
        yield "out.img_std", image.std()
        yield "out.logits", case.fill(D, "sg2")(0.5 * case.rnd("bigD.img", 2, 3, config["res"], config["res"]))


def keys(case) -> Iterator[tuple]:
    with torch.device("meta"):
        G, D = _full_size(case.json["config"])
    for name, net in (("G", G), ("D", D)):
        parameters = dict(net.named_parameters())
        own = {
            (key, tuple(v.shape), str(v.dtype).removeprefix("torch."), "param" if key in parameters else "buffer")
            for key, v in net.state_dict().items()
        }
        official = {(key, tuple(shape), dtype, kind) for key, shape, dtype, kind in case.json[name]}
        yield f"{name}.keys that differ", len(own ^ official), 0, 0.0
        yield f"{name}.parameters", sum(p.numel() for p in net.parameters()), _count(case.json[name]), 0.0


def _count(rows: list[list]) -> int:
    return sum(prod(shape) for _, shape, _, kind in rows if kind == "param")


def operations(case) -> Iterator[tuple]:
    from sdtrain.models.stylegan2 import ops

    t = case.tensors
    x, f, asym, sep = t["in.x"], t["filter.1331"], t["filter.asym"], t["filter.sep8"]
    yield "out.upsample2d", ops.upsample2d(x, f)
    yield "out.downsample2d", ops.downsample2d(x, f)
    yield "out.filter2d", ops.filter2d(x, f)
    yield "out.filter2d_asym", ops.filter2d(x, asym)
    yield "out.upfirdn_a", ops.upfirdn2d(x, asym, up=2, padding=(2, 1, 0, 3), gain=1.7)
    crop = {"up": (2, 1), "down": (1, 2), "padding": (1, -1, 2, 0)}
    yield "out.upfirdn_b", ops.upfirdn2d(x, asym, **crop, flip_filter=True, gain=0.5)
    yield "out.upfirdn_sep", ops.upfirdn2d(x, sep, up=2, down=2, padding=4)
    for act in ops.ACTIVATIONS:
        yield f"out.bias_act.{act}", ops.bias_act(x, t["in.b"], act)
    yield "out.bias_act.lrelu_g_c", ops.bias_act(x, t["in.b"], "lrelu", slope=0.3, gain=0.9, clamp=0.4)
    yield from _resampling_convolutions(case)
    for group, channels in ((2, 1), (3, 2), (None, 1), (6, 4)):
        yield f"out.mbstd.g{group}.c{channels}", ops.minibatch_stddev(t["in.mb"], group, channels)


def _resampling_convolutions(case) -> Iterator[tuple]:
    from sdtrain.models.stylegan2 import ops

    t = case.tensors
    x, w3, w1, f = t["in.x"][:, :, :6, :10], t["in.w3"], t["in.w1"], t["filter.1331"]
    yield "out.conv2d_resample.c3", ops.conv_same(x, w3)
    yield "out.conv2d_resample.c3_up", ops.conv_up(x, w3.flip(2, 3), f)  # correlation: the flipped true convolution
    yield "out.conv2d_resample.c3_up_noflip", ops.conv_up(x, w3, f)
    yield "out.conv2d_resample.c3_down", ops.conv_down(x, w3, f)
    yield "out.conv2d_resample.c1_up", ops.conv_up(x, w1, f)
    yield "out.conv2d_resample.c1_down", ops.conv_down(x, w1, f)
    for demod in (True, False):
        out = ops.modulated_conv2d(x, w3, t["in.styles"], demodulate=demod, noise=t["in.noise"])
        for fused in (0, 1):  # two official ways of computing one thing
            yield f"out.modconv.demod{int(demod)}.fused{fused}", out
    yield "out.modconv.up", ops.modulated_conv2d(x, w3, t["in.styles"], f=f)


def losses(case) -> Iterator[tuple]:
    """The four phases in order, no optimizer step in between.

    The noise is random and was not kept: as its strength is zero it moves nothing but the strengths' own gradients,
    which are left out. The stored w_avg is that after all phases, so the first one is found by going back.
    """
    from sdtrain.losses.regularizers import path_length_penalty, path_lengths

    t = case.tensors
    G = build_generator(case, case.group("sd.G."), case.entry["G_config"]).train()
    D = build_discriminator(case, case.group("sd.D."), case.entry["D_config"]).train()
    z, c, real, real_c = t["in.z"], t["in.c"], t["in.real"].clone().requires_grad_(), t["in.real_c"]

    few = len(t["in.pl_noise_unit"])
    _rewind_w_avg(G, [(z, c), (z[:few], c[:few]), (z, c)])
    fake_logits = D(G(z, c, noise="none"), c)
    per_sample = F.softplus(-fake_logits)
    reports = {"Loss/scores/fake": fake_logits, "Loss/G/loss": per_sample}
    yield from _phase(case, "Gmain", G, per_sample.mean(), reports)
    yield "out.w_avg_after_Gmain", G.mapping.w_avg

    images, ws = G(z[:few], c[:few], noise="none", return_ws=True)
    lengths = path_lengths(ws, images, t["in.pl_noise_unit"])
    loss, mean = path_length_penalty(lengths, 0.0, PL_DECAY, PL_WEIGHT)
    penalty = (lengths - mean).square()
    reports = {"Loss/pl_penalty": penalty, "Loss/G/reg": PL_WEIGHT * penalty}
    yield from _phase(case, "Greg", G, loss, reports)
    yield "out.pl_mean", mean

    with torch.no_grad():
        fake = G(z, c, noise="none")
    fake_logits, real_logits = D(fake, c), D(real, real_c)
    per_sample = F.softplus(fake_logits) + F.softplus(-real_logits)
    reports = {"Loss/scores/fake": fake_logits, "Loss/scores/real": real_logits, "Loss/D/loss": per_sample}
    yield from _phase(case, "Dmain", D, per_sample.mean(), reports)

    logits = D(real, real_c)
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    penalty = slope.square().sum((1, 2, 3))
    reports = {"Loss/scores/real": logits, "Loss/r1_penalty": penalty, "Loss/D/reg": penalty * R1_GAMMA / 2}
    yield from _phase(case, "Dreg", D, penalty.mean() * R1_GAMMA / 2, reports)
    yield "out.w_avg_after_all", G.mapping.w_avg


def _phase(case, name: str, net: nn.Module, loss: Tensor, reports: Mapping[str, Tensor]) -> Iterator[tuple]:
    """Backward of gain * loss; gradients and reported numbers against the manifest and the stored tensors."""
    from check import Skip

    expected = case.entry["phases"][name]
    net.zero_grad()
    (loss * expected["gain"]).backward()
    known = {key: value for key, value in expected["grad_norm_sum"].items() if not key.endswith("noise_strength")}
    yield from gradient_sums(case, net, known, name)
    parameters = dict(net.named_parameters())
    for key in [key for key in case.group(f"grad.{name}.") if key in known]:
        grad = parameters[key].grad
        yield f"grad.{name}.{key}", torch.zeros_like(parameters[key]) if grad is None else grad
    for key in [key for key in case.group(f"grad.{name}.") if key not in known]:
        yield f"grad.{name}.{key}", Skip("it depends on the noise that was drawn, which the file does not hold")
    for report, rows in expected["reports"].items():
        value = reports[report.replace("signs", "scores")]
        reference = torch.tensor(rows[0])
        value = value.sign() if "signs" in report else value
        yield f"{name} {report}", value.flatten(), reference, case.limit(reference)


@torch.no_grad()
def _rewind_w_avg(G, passes: list[tuple[Tensor, Tensor]]) -> None:
    """Undo the given passes, w_avg <- (w_avg - (1 - beta) mean w) / beta, last one first."""
    mapping = G.mapping
    for z, c in reversed(passes):
        mean = mapping(z, c, update_w_avg=False)[:, 0].mean(0)
        mapping.w_avg.copy_((mapping.w_avg - (1 - mapping.w_avg_beta) * mean) / mapping.w_avg_beta)


def augmentation(case) -> Iterator[tuple]:
    from sdtrain.augment import ada

    t, images = case.tensors, case.tensors["in.img"]
    pipes = {name: ada.AdaPipe(ada.preset(name)) for name in case.entry["specs"]}
    yield "buf.Hz_geom", pipes["bgc"].Hz_geom
    yield "buf.Hz_fbank", pipes["bgc"].Hz_fbank
    for name in [
        name for name in t if ".dp" in name and name.startswith("out.") and not name.startswith("out.bgc_gray")
    ]:
        group, quantile = name.removeprefix("out.").split(".dp", 1)
        value, _, part = quantile.rpartition(".") if quantile.endswith(("G_inv", "C")) else (quantile, "", "")
        chance = ada.Chance(None, torch.ones([]), 1, float(value))
        options = pipes[group].options
        if part == "G_inv":
            yield name, ada.inverse_geometry(options, chance, images.shape[3], images.shape[2])
        elif part == "C":
            yield name, ada.color_matrix(options, chance, 3)
        else:
            yield name, pipes[group](images[:1], 1.0, None, float(value))
    yield "out.bgc_gray.dp", pipes["bgc"](t["in.img_gray"][:1], 1.0, None, 0.85)
    yield from _seeded_augmentation(case, pipes)


def _seeded_augmentation(case, pipes: Mapping[str, nn.Module]) -> Iterator[tuple]:
    from sdtrain.augment import ada

    t, images = case.tensors, case.tensors["in.img"]
    for group in ("bgc", "filter", "cutout"):
        torch.manual_seed(1021)
        yield f"out.{group}.seeded_p0.7", pipes[group](images, 0.7, AmbientDraws(len(images)))
    torch.manual_seed(1021)
    chance = ada.Chance(AmbientDraws(len(images)), torch.tensor(0.7), len(images), None)
    yield "out.bgc.seeded_p0.7.G_inv", ada.inverse_geometry(pipes["bgc"].options, chance, 24, 24)
    yield "out.bgc.seeded_p0.7.C", ada.color_matrix(pipes["bgc"].options, chance, 3)
    torch.manual_seed(1022)
    x = images[:2].clone().requires_grad_()
    out = pipes["bgc"](x, 1.0, AmbientDraws(2))
    yield "out.bgc.seeded_p1", out
    (out * t["in.grad_weight"]).sum().backward()
    yield "out.bgc.seeded_p1.grad", x.grad


def schedules(case) -> Iterator[tuple]:
    if "ada" not in case.json:  # R3GAN's file has the same name
        from adapters_r3gan_files import schedules as r3gan

        return (yield from r3gan(case))
    from sdtrain.augment.ada import update_p
    from sdtrain.losses.regularizers import lazy_adam
    from sdtrain.models.stylegan2.networks import auto_preset

    for i, trace in enumerate(case.json["ada"]):
        p = trace["p0"]
        for step, (rt, reference) in enumerate(zip(trace["rt_sequence"], trace["p_sequence"], strict=True)):
            p = update_p(p, rt, 1, trace["batch"], trace["interval"], trace["target"], trace["ada_kimg"])
            yield f"ada.{i}.{step}", p, reference, 1e-7  # the reference rounds p to float32
    for row in case.json["lazy_reg"]:
        lr, betas = lazy_adam(row["lr"], (0.0, 0.99), row["interval"])
        yield f"lazy_reg.{row['lr']}.{row['interval']}", (lr, *betas), (row["lr_eff"], *row["betas_eff"]), 1e-12
    for row in case.json["auto_cfg"]:
        own = auto_preset(row["res"], row["gpus"])
        names = [name for name in row if name not in ("gpus", "res")]
        got, reference = [own[name] for name in names], [row[name] for name in names]
        yield f"auto.{row['res']}.{row['gpus']}", got, reference, 1e-12
    yield from _ema(case)


def _ema(case) -> Iterator[tuple]:
    from sdtrain.engine.ema import ema_beta

    for i, row in enumerate(case.json["ema"]):
        beta = ema_beta(row["ema_kimg"] * 1000, row["rampup"], row["cur_nimg"], row["batch"])
        yield f"ema.{i}", beta, row["beta"], 1e-9


ADAPTERS = {
    "sg2_G.safetensors": generator,
    "sg2_Gc.safetensors": generator,
    "sg2_D.safetensors": discriminator,
    "sg2_Dc.safetensors": discriminator,
    "sg2_Darch.safetensors": architectures,
    "sg2_big.safetensors": big,
    "sg2_ops.safetensors": operations,
    "sg2_loss.safetensors": losses,
    "ada.safetensors": augmentation,
    "schedules.json": schedules,
    "keys_sg2_paper256.json": keys,
}
