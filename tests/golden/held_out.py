"""A golden folder made by this repository's own networks: same format, other seeds, sizes, options and output names.

    python tests/golden/held_out.py DIR

It proves that check.py reads these facts from the files: whoever types one of them into an adapter fails here. It
proves nothing about the numbers themselves, which come from the code that is checked. Writes DIR/manifest.json and
DIR/NAME.safetensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent.parent, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from adapters_stylegan2 import AmbientDraws  # noqa: E402
from torch import Tensor, nn  # noqa: E402

File = tuple[dict[str, Any], dict[str, Tensor]]
TOL = {"tol": {"max_abs_diff_over_max_abs_ref": 1e-4}}
RTOL = {"rtol": 1e-4, "atol": 1e-5}


def shaken(net: nn.Module) -> nn.Module:
    """The network with every parameter moved, so that none is at its neutral start, in eval mode."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def state(net: nn.Module, prefix: str = "sd.") -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in net.state_dict().items()}


def stylegan2_generator() -> File:
    from sdtrain.losses.regularizers import path_length_penalty, path_lengths
    from sdtrain.models.stylegan2.networks import generator_from_official

    config = {"z_dim": 12, "c_dim": 3, "w_dim": 20, "img_resolution": 16, "img_channels": 3}
    config |= {"mapping_kwargs": {"num_layers": 3}, "synthesis_kwargs": {"channel_base": 128, "channel_max": 12}}
    G = shaken(generator_from_official(config))
    clamped = generator_from_official(config, conv_clamp=0.3).eval()
    clamped.load_state_dict(G.state_dict())
    z, c = torch.randn(3, 12, requires_grad=True), torch.eye(3)
    unit, weight, before = torch.randn(1, 3, 16, 16), torch.randn(3, 3, 16, 16), torch.tensor(0.4)
    out = {"out.ws": G.mapping(z, c), "out.ws_psi0.4": G.mapping(z, c, truncation_psi=0.4)}
    out["out.ws_psi0.3_cut2"] = G.mapping(z, c, truncation_psi=0.3, truncation_cutoff=2)
    ws = out["out.ws"]
    out["out.img_const"] = G.synthesis(ws, noise="const")
    (out["out.dz"],) = torch.autograd.grad((out["out.img_const"] * weight).sum(), z, retain_graph=True)
    out["out.img_none.s4"] = G.synthesis(ws, noise="none")[:, :, ::4, ::4]
    out["out.img_const_psi0.4.s4"] = G.synthesis(out["out.ws_psi0.4"], noise="const")[:, :, ::4, ::4]
    mixed = torch.cat([ws[:, :3], ws.flip(0)[:, 3:]], 1)
    out["out.img_mixed_cut3.s4"] = G.synthesis(mixed, noise="const")[:, :, ::4, ::4]
    out["out.img_const_clamp0.3.s4"] = clamped.synthesis(ws, noise="const")[:, :, ::4, ::4]
    torch.manual_seed(77)
    out["out.img_random_seeded.s4"] = G.synthesis(ws, AmbientDraws(3))[:, :, ::4, ::4]
    some = G.mapping(z[:1], c[:1]).detach().requires_grad_()
    lengths = path_lengths(some, G.synthesis(some, noise="const"), unit)
    penalty, mean = path_length_penalty(lengths, before, 0.05, 3.0)
    out |= {"out.pl_lengths": lengths, "out.pl_loss": penalty, "out.pl_mean_after": mean}
    G.train().mapping(z, c)
    out["out.train_w_avg_after"] = G.mapping.w_avg.clone()
    inputs = {"in.z": z, "in.c": c, "in.grad_weight": weight, "in.pl_noise_unit": unit, "in.pl_mean_before": before}
    calls = {
        "out.img_random_seeded": "torch.manual_seed(77) then synthesis(ws,noise_mode='random')",
        "out.pl_loss": "mean(3*(pl_lengths-pl_mean_after)^2), pl_mean_after = "
        "lerp(pl_mean_before, mean(pl_lengths), 0.05)",
    }
    sums: dict[str, Any] = {"grad_stats_norm_sum": {}, "pl_grad_stats_norm_sum": {}}
    G.eval().load_state_dict({**G.state_dict(), "mapping.w_avg": clamped.mapping.w_avg})
    return {"config": config, "calls": calls, **sums, **TOL}, {**inputs, **out, **state(G)}


def stylegan2_discriminator() -> File:
    from sdtrain.models.stylegan2.networks import discriminator_from_official

    config = {"c_dim": 0, "img_resolution": 16, "img_channels": 3, "channel_base": 128, "channel_max": 12}
    config |= {"epilogue_kwargs": {"mbstd_group_size": 3}}
    D, clamped = shaken(discriminator_from_official(config)), discriminator_from_official(config, conv_clamp=0.2)
    clamped.eval().load_state_dict(D.state_dict())
    images, c = torch.randn(6, 3, 16, 16, requires_grad=True), torch.zeros(6, 0)
    logits = D(images, c)
    (slope,) = torch.autograd.grad(logits.sum(), images)
    statistics: list[Tensor] = []
    D.b4.mbstd.register_forward_hook(lambda module, given, found: statistics.append(found[:, -1:, 0, 0]))
    out = {"out.logits": logits, "out.logits_clamp0.2": clamped(images, c), "out.r1_grad_n2": slope[2]}
    out |= {"out.r1_penalty": slope.square().sum((1, 2, 3)), "mid.b8.x_n1": D.b8(*D.b16(None, images))[0][1]}
    D(images, c)
    out["mid.mbstd_extra_channels"] = statistics[0]
    sums: dict[str, Any] = {"r1_weight_grad_stats_norm_sum": {}, "softplus_neg_mean_grad_stats_norm_sum": {}}
    return {"config": config, "r1_gamma": 2.5, **sums, **TOL}, {"in.img": images, "in.c": c, **out, **state(D)}


def stylegan2_architectures() -> File:
    from sdtrain.models.stylegan2.networks import Discriminator, DiscriminatorOptions

    images, tensors = torch.randn(2, 1, 32, 32), {}
    for name in ("skip", "resnet"):
        options = DiscriminatorOptions(architecture=name, channel_base=96, channel_max=6, mbstd_group=2, img_channels=1)
        D = shaken(Discriminator(options, resolution=32))
        tensors |= {f"out.{name}.logits": D(images), **state(D, f"sd.{name}.")}
    what = "Discriminator res32 channel_base=96 channel_max=6, mbstd group 2"
    return {"what": what, **TOL}, {"in.img": images, **tensors}


def augmentation() -> File:
    from sdtrain.augment.ada import AdaOptions, AdaPipe

    specs = {"turn": {"rotate": 1, "xint": 0.5}, "tone": {"hue": 1, "contrast": 1}}
    pipes = {name: AdaPipe(AdaOptions(**spec)) for name, spec in specs.items()}
    images, gray = torch.rand(5, 3, 20, 20), torch.rand(1, 1, 20, 20)
    turn = pipes["turn"]
    tensors = {"in.img": images, "in.img_gray": gray, "buf.Hz_geom": turn.Hz_geom.clone()}
    tensors |= {"out.turn.dp0.35": turn(images[:1], 1.0, None, 0.35), "out.turn_gray.dp": turn(gray, 1.0, None, 0.65)}
    for name, pipe in pipes.items():
        torch.manual_seed(55)
        tensors[f"out.{name}.seeded_p0.4"] = pipe(images, 0.4, AmbientDraws(5))
    calls = {"out.{group}.dp{v}": "AugmentPipe(**specs[group])(img[:1], debug_percentile=v)"}
    calls |= {"out.turn_gray.dp": "debug_percentile=0.65", "out.{group}.seeded_p0.4": "torch.manual_seed(55), p=0.4"}
    return {"specs": specs, "calls": calls, **TOL}, tensors


def fastgan() -> File:
    from sdtrain.models.fastgan.networks import Generator, GeneratorOptions

    config = {"z_dim": 10, "img_resolution": 64, "ngf": 2, "lite": True, "cond": 0, "num_classes": None}
    net = shaken(Generator(GeneratorOptions(z_dim=10, ngf=2, lite=True, num_embeddings=1), resolution=64))
    z, before = torch.randn(3, 10), state(net)
    with torch.no_grad():
        image, trained = net(z, None)[:, :, ::8, ::8], net.train()(z, None)[:, :, ::8, ::8]
    after = {name: value for name, value in state(net, "after_train.").items() if name.endswith("init.1.running_mean")}
    tensors = {"in.z": z, "in.c": torch.zeros(3, 0), "out.eval.img_strided": image, "out.train.img_strided": trained}
    return {"config": config, "stride": 8, **TOL}, {**tensors, **after, **before}


def stylenat_units() -> File:
    from sdtrain.models.stylenat import networks as snat
    from sdtrain.models.stylenat.attention import neighborhood_attention

    nets = {
        "hydra_z": snat.HydraAttention(18, 6, (3, 5), (2, 1)),
        "legacy": snat.HydraAttention(12, 4, (5, 3), (1, 3)),
        "mhsarpb": snat.FullAttention(10, 2, 3),
        "adain": snat.AdaIN(7, 5),
        "upsample": snat.Upsample(3, 8, 12),
        "natlayer": snat.Block(12, 7, snat.HydraAttention(12, 2, (3, 5), (1, 1)), 6, 3),
        "torgb": snat.ToRGB(8, upsample=True),
        "fromrgb": snat.FromRGB(7, downsample=True),
        "convblock": snat.ConvBlock(3, 6),
    }
    nets = {name: shaken(net) for name, net in nets.items()}
    t = {"in.hydra_z": torch.randn(1, 12, 12, 18), "in.hydra_z.gw": torch.randn(1, 12, 12, 18)}
    t |= {"in.legacy": torch.randn(2, 9, 9, 12), "in.mhsarpb": torch.randn(1, 3, 3, 10)}
    t |= {"in.adain.x": torch.randn(3, 5, 9), "in.adain.style": torch.randn(3, 7), "in.upsample": torch.randn(1, 9, 8)}
    t |= {"in.natlayer.x": torch.randn(1, 49, 12), "in.natlayer.style": torch.randn(1, 6)}
    t |= {"in.torgb.x": torch.randn(2, 8, 6, 6), "in.torgb.skip": torch.randn(2, 3, 3, 3)}
    t |= {"in.haar": torch.randn(2, 3, 8, 8), "in.fromrgb.skip": torch.randn(2, 7, 2, 2)}
    t |= {"in.convblock": torch.randn(2, 3, 12, 12)}
    t |= {f"in.na_z.{part}": torch.randn(1, 3, 8, 8, 2) for part in "qkv"} | {"in.na_z.rpb": torch.randn(3, 5, 5)}
    with torch.no_grad():
        t |= {f"out.{name}": nets[name](t[f"in.{name}"]) for name in ("legacy", "mhsarpb", "upsample", "convblock")}
        t["out.adain"] = nets["adain"](t["in.adain.x"].transpose(1, 2), t["in.adain.style"]).transpose(1, 2)
        t["out.natlayer"] = nets["natlayer"](t["in.natlayer.x"], t["in.natlayer.style"])
        t["out.torgb"] = nets["torgb"](t["in.torgb.x"], t["in.torgb.skip"])
        t |= {"out.torgb_noskip": nets["torgb"](t["in.torgb.x"]), "out.pos_grid_6x4_dim5": snat.position_grid(6, 4, 5)}
        t["out.haar"] = snat.Haar()(t["in.haar"])
        t["out.haar_inv"] = snat.InverseHaar()(t["out.haar"])
        t["out.fromrgb.input"], t["out.fromrgb.out"] = nets["fromrgb"](t["out.haar"], t["in.fromrgb.skip"])
        q, k, v = (t[f"in.na_z.{part}"].permute(0, 2, 3, 1, 4).flatten(3) for part in "qkv")
        out = neighborhood_attention(q, k, v, t["in.na_z.rpb"], 2).unflatten(3, (3, -1))
        t["out.na_z.av"] = out.permute(0, 3, 1, 2, 4)
    x = t["in.hydra_z"].clone().requires_grad_()
    t["out.hydra_z"] = nets["hydra_z"](x)
    t["out.hydra_z.dx_n0"] = torch.autograd.grad((t["out.hydra_z"] * t["in.hydra_z.gw"]).sum(), x)[0][0]
    for name, net in nets.items():
        stored = {key: value for key, value in state(net, f"sd.{name}.").items() if not key.endswith("_float_tensor")}
        t |= {key.replace("rpb.", "rpb") if name == "legacy" else key: value for key, value in stored.items()}
    calls = {"hydra_z": {"dim": 18, "num_heads": 6, "kernel_sizes": [3, 5], "dilations": [2, 1]}}
    calls["na_z"] = {"kernel": 3, "dilation": 2, "size": 8}
    natlayer = "dim12, 7x7, heads2, kernels [3,5], dilations [1,1], style_dim6, mlp_ratio3"
    return {"calls": calls, "other": {"legacy": "kernel 5/3, dilation 1/3", "natlayer": natlayer}, **TOL}, t


def gcfsr_parts() -> File:
    from sdtrain.models.gcfsr.networks import EqualLinear, ModulatedConv2d, fir, unit_scales

    x, style = torch.randn(1, 3, 8, 10), torch.randn(1, 7)
    t = {"in.x": x, "in.style": style, "in.scale1": torch.randn(1, 4), "in.scale2": torch.randn(1, 4)}
    t |= {"out.upsample": fir(x, (2, 1), up=True), "out.downsample": fir(x, (1, 1))[:, :, ::2, ::2]}
    t |= {"out.smooth_before_down3": fir(x, (2, 2)), "out.smooth_after_transposed3": fir(4 * x, (1, 1))}
    t["out.norm_scale1"], t["out.norm_scale2"] = unit_scales(t["in.scale1"], t["in.scale2"])
    nets = {"modconv_downsample_demod": ModulatedConv2d(3, 5, 5, 7, sample="down")}
    nets["modconv_none_nodemod"] = ModulatedConv2d(3, 5, 5, 7, demodulate=False)
    nets["equal_linear_lr0.2"] = EqualLinear(7, 2, lr_mul=0.2)
    for name, net in nets.items():
        value = shaken(net)(style) if name.startswith("equal") else shaken(net)(x, style)
        t |= {f"out.{name}": value, **state(net, f"sd.{name}.")}
    config = {"in_channels": 3, "out_channels": 5, "kernel_size": 5, "num_style_feat": 7}
    return {"config": config, **RTOL}, t


def rrdbnet() -> File:
    from sdtrain.models.rrdbnet.networks import Generator, GeneratorOptions

    config = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 6, "num_grow_ch": 3, "num_block": 3, "scale": 2}
    net, x = shaken(Generator(GeneratorOptions(**config))), torch.rand(2, 3, 8, 12, requires_grad=True)
    y, maps = net(x, ("conv_first", net.layer_names[-4]))
    (slope,) = torch.autograd.grad(y.square().mean(), x)
    out = {"out.y": y, "out.feat_conv_first": maps["conv_first"], "out.feat_body": maps[net.layer_names[-4]]}
    return {"config": config, **RTOL}, {"in.x": x, **out, "out.grad_x_of_mean_y2": slope, **state(net)}


def train_step() -> File:
    from sdtrain.losses.distance import l1
    from sdtrain.models.rrdbnet.networks import Generator, GeneratorOptions

    config: dict[str, Any] = {"num_feat": 3, "num_grow_ch": 2, "num_block": 1, "scale": 2}
    x, y, out = torch.rand(1, 3, 4, 6), torch.rand(1, 3, 8, 12), {}
    torch.manual_seed(4321)
    net = Generator(GeneratorOptions(**config)).train()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.9), eps=1e-6)
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(2):
        adam.zero_grad()
        loss = l1(net(x), y).mean()
        loss.backward()
        adam.step()
        ema = {name: 0.9 * ema[name] + 0.1 * value for name, value in net.state_dict().items()}
        out[f"out.loss{step}"] = loss.detach()
    out |= {"out.net.conv_last.bias": net.conv_last.bias, "out.ema.conv_last.bias": ema["conv_last.bias"]}
    adam_config = {"adam": {"lr": 1e-3, "betas": [0.5, 0.9], "eps": 1e-6}, "ema": 0.9}
    return {"config": {**config, **adam_config}, "seed": 4321, **RTOL}, {"in.x": x, "in.y": y, **out}


def unet() -> File:
    from sdtrain.models.unet_sn.networks import Discriminator, DiscriminatorOptions

    config = {"num_in_ch": 3, "num_feat": 3, "skip_connection": True}
    net, x = shaken(Discriminator(DiscriminatorOptions(num_feat=3, skip_connection=True))), torch.rand(1, 3, 16, 16)
    tensors = {"in.x": x, "out.y_eval_fresh": net.logit_map(x), **state(net)}
    for calls in range(1, 5):
        y = net.train().logit_map(x)
        if calls in (2, 4):
            tensors |= {f"out.y_train_call{calls}": y, f"out.after{calls}.conv1.weight_u": net.conv1.weight_u.clone()}
    return {"config": config, **RTOL}, {**tensors, "out.y_eval_after4": net.eval().logit_map(x)}


def gcfsr_discriminator() -> File:
    from sdtrain.models.gcfsr.networks import Discriminator, DiscriminatorOptions

    config = {"out_size": 32, "channel_multiplier": 1, "narrow": 1 / 64, "stddev_group": 2}
    options = DiscriminatorOptions(channel_multiplier=1, narrow=1 / 64, stddev_group=2)
    net, x = shaken(Discriminator(options, resolution=32)), torch.randn(2, 3, 32, 32, requires_grad=True)
    logit = net(x)
    (slope,) = torch.autograd.grad(logit.sum(), x, create_graph=True)
    r1 = slope.square().sum((1, 2, 3)).mean()
    (7 / 2 * r1 * 8).backward()
    name, parameter = next((n, p) for n, p in net.named_parameters() if p.grad is not None)
    out = {"out.logit": logit, "out.r1": r1, "out.grad_x_of_sum_logit": slope, f"out.r1grad.{name}": parameter.grad}
    return {"config": config, "call": "r1grad.<key> = d(7/2 * r1 * 8)/d<key>", **RTOL}, {"in.x": x, **out, **state(net)}


def compression() -> File:
    from sdtrain.data.degrade.jpeg import jpeg, soft_round

    x, odd, q = torch.rand(2, 3, 32, 16), torch.rand(2, 3, 21, 35), torch.tensor([20.0, 60.0])
    out = {"out.hard_q35": jpeg(x, torch.full((2,), 35.0)), "out.soft_qvec": jpeg(x, q, soft_round)}
    out["out.hard_odd_q75"] = jpeg(odd, torch.full((2,), 75.0))
    return RTOL, {"in.x": x, "in.x_odd": odd, "in.q_vec": q, **out}


def noises() -> File:
    from sdtrain.data.degrade.noise import FixedSource, Noise, add_noise, eight_bit, luminance, photon_count

    x = 0.25 + 0.5 * torch.rand(2, 3, 24, 16)

    def added(kind: Any, level: list[float], gray: tuple[bool, ...], maps: dict[str, Tensor]) -> Tensor:
        return add_noise(x, Noise(kind=kind, level=torch.tensor(level), gray=gray, source=FixedSource(maps)))

    def counts(images: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(eight_bit(images) * photon_count(eight_bit(images)), generator=generator)

    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(98))
    out = {"out.gauss_color_s7": added("gaussian", [7.0, 7.0], (False, False), {"colour": normal})}
    out["out.gauss_vec"] = x + normal * torch.tensor([3.0, 11.0]).view(-1, 1, 1, 1) / 255
    shot = counts(x, torch.Generator().manual_seed(98))
    out["out.poisson_color_s0.5"] = added("poisson", [0.5, 0.5], (False, False), {"colour": shot})
    generator = torch.Generator().manual_seed(98)
    gray, colour = counts(luminance(x), generator), counts(x, generator)
    maps = {"gray": gray[1:], "colour": colour[:1]}
    out["out.poisson_gray_vec"] = added("poisson", [0.75, 1.25], (False, True), maps)
    out["out.poisson_vals"] = photon_count(eight_bit(x)).flatten()
    return {"seed": 98, **RTOL}, {"in.x": x, **out}


def resizing() -> File:
    from sdtrain.data.degrade.resize_matlab import down_up, imresize

    x = torch.rand(36, 24, 3)
    image = x.permute(2, 0, 1)
    out = {"out.down3": imresize(image, 1 / 3), "out.downup6": down_up(image, 6)}
    out["out.down_noaa4"] = imresize(image, 1 / 4, antialias=False)
    return RTOL, {"in.img_hwc": x, **{name: value.permute(1, 2, 0).contiguous() for name, value in out.items()}}


FILES: dict[str, Callable[[], File]] = {
    "sg2_G": stylegan2_generator,
    "sg2_D": stylegan2_discriminator,
    "sg2_Darch": stylegan2_architectures,
    "ada": augmentation,
    "pg_fastgan_lite": fastgan,
    "snat_units": stylenat_units,
    "gcfsr_parts": gcfsr_parts,
    "rrdbnet_x2": rrdbnet,
    "train_step_esrnet": train_step,
    "unet_disc_sn": unet,
    "gcfsr_d_std": gcfsr_discriminator,
    "diffjpeg": compression,
    "noise": noises,
    "imresize_matlab_bicubic": resizing,
}


def write(folder: Path) -> None:
    """Write all FILES and their manifest into an existing folder."""
    from safetensors.torch import save_file

    entries = {}
    for i, (name, make) in enumerate(FILES.items()):
        torch.manual_seed(500 + i)
        entry, tensors = make()
        stored = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(stored, folder / f"{name}.safetensors")
        listed = {key: [list(value.shape), str(value.dtype)] for key, value in tensors.items() if key[:3] != "sd."}
        entries[f"{name}.safetensors"] = {**entry, "tensors": listed}
    rule = "rnd(key, *shape, scale); base_seed = 7"
    (folder / "manifest.json").write_text(json.dumps({"set": "held_out", "rnd_rule": rule, "files": entries}))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
