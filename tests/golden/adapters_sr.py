"""Super-resolution: networks, checkpoints and training steps against the golden numbers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from adapters_stylegan2 import stored_gradients
from rules import number
from torch import Tensor, nn


def _options(cls: type, config: dict[str, Any]) -> Any:
    return cls(**{name: value for name, value in config.items() if name in cls.__dataclass_fields__})


def _rrdbnet(config: dict[str, Any]) -> nn.Module:
    from sdtrain.models.rrdbnet.networks import Generator, GeneratorOptions

    return Generator(_options(GeneratorOptions, config)).eval()


def rrdbnet(case: Any) -> Iterator[tuple]:
    net, x = _rrdbnet(case.entry["config"]), case.tensors["in.x"].requires_grad_()
    net.load_state_dict(case.group("sd."))
    blocks = [name for name in net.layer_names if name.startswith("body.")]
    layers = {output: blocks[-1] if layer == "body" else layer for output, layer in case.names(r"out\.feat_(\w+)")}
    y, maps = net(x, tuple(layers.values()))
    yield "out.y", y
    yield "out.grad_x_of_mean_y2", torch.autograd.grad(y.square().mean(), x)[0]
    for output, layer in layers.items():
        yield output, maps[layer]


def rrdbnet_full(case: Any) -> Iterator[tuple]:
    net = case.procedural(_rrdbnet(case.entry["config"]))
    yield "n_params", sum(p.numel() for p in net.parameters()), case.entry["n_params"], 0.0
    with torch.no_grad():
        yield "out.y", net(case.tensors["in.x"])


def rrdbnet_init(case: Any) -> Iterator[tuple]:
    """Mean and standard deviation of fresh weights: four standard errors of either draw."""
    torch.manual_seed(0)
    state = _rrdbnet({"num_feat": int(number(case.name, "nf"))}).state_dict()
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
    for name, _ in case.names(r"out\.y_eval(_fresh)?"):
        yield name, y
    done = 0
    for calls in sorted({int(calls) for _, calls in case.names(r"out\.(?:y_train_call|y_eval_after|after)(\d+).*")}):
        for _ in range(calls - done):
            y = net.train().logit_map(x)
        done = calls
        yield f"out.y_train_call{calls}", y
        for name in case.group(f"out.after{calls}."):
            yield f"out.after{calls}.{name}", net.state_dict()[name]
        for (name,) in case.names(rf"out\.y_eval_after{calls}"):
            yield name, net.eval().logit_map(x)


def _gcfsr(config: dict[str, Any]) -> nn.Module:
    from sdtrain.models.gcfsr.networks import Generator, GeneratorOptions

    return Generator(_options(GeneratorOptions, config), resolution=config["out_size"]).eval()


def _noise(case: Any) -> list[Tensor]:
    maps = case.group("aux.noise")
    return [maps[str(i)] for i in range(len(maps))]


def _factors(case: Any) -> Tensor:
    """The stored in_size is a factor over a number that the text names; 64 in a file whose text does not."""
    said = case.entry["call"]
    return case.tensors["in.in_size"] * (number(said, "downscale factor /") if "downscale factor" in said else 64)


def gcfsr(case: Any) -> Iterator[tuple]:
    net, t = _gcfsr(case.entry["config"]), case.tensors
    if "weights" in case.entry:
        case.procedural(net)
    else:
        unused = {name: value for name, value in net.state_dict().items() if name.startswith("noises.")}
        net.load_state_dict({**unused, **case.group("sd.")})
    names = {"style_conv1": "style_conv.16"}
    wanted = case.names(r"out\.feat_(\w+?)(?:_item(\d+))?")
    layers = {output: names.get(layer, layer.replace("enc_", "enc.")) for output, layer, _ in wanted}
    with torch.no_grad():
        y, maps = net(t["in.x"], _factors(case), noise=_noise(case), layers=("codes", *layers.values()))
        yield "out.y", y
        yield "out.latent", maps["codes"]
        for output, _, item in wanted:
            value = maps[layers[output]]
            yield output, value[int(item)][None] if item else value
        for name, item in case.names(r"out\.y_zero_noise_item(\d+)"):
            yield name, net(t["in.x"][int(item)][None], _factors(case)[int(item)][None])


def gcfsr_discriminator(case: Any) -> Iterator[tuple]:
    from sdtrain.models.gcfsr.networks import Discriminator, DiscriminatorOptions

    config = case.entry["config"]
    options = _options(DiscriminatorOptions, config)
    net, x = Discriminator(options, resolution=config["out_size"]), case.tensors["in.x"].requires_grad_()
    net.load_state_dict(case.group("sd."))
    logit = net(x)
    (grad,) = torch.autograd.grad(logit.sum(), x, create_graph=True)
    r1 = grad.square().sum((1, 2, 3)).mean()
    yield "out.logit", logit
    yield "out.grad_x_of_sum_logit", grad
    yield "out.r1", r1
    weight, half, interval = re.search(r"d\(([\d.]+)/(\d+) \* r1 \* (\d+)\)", case.entry["call"]).groups()
    (float(weight) / int(half) * int(interval) * r1).backward()
    yield from stored_gradients(case, net, "out.r1grad.")


def gcfsr_parts(case: Any) -> Iterator[tuple]:
    from sdtrain.models.gcfsr.networks import EqualLinear, ModulatedConv2d, fir, unit_scales

    t, x, config = case.tensors, case.tensors["in.x"], case.entry["config"]
    yield "out.upsample", fir(x, (2, 1), up=True)
    yield "out.downsample", fir(x, (1, 1))[:, :, ::2, ::2]
    for name, where, kernel in case.names(r"out\.smooth_(after_transposed|before_down)(\d)"):
        extra = int(kernel) - 1 if where == "before_down" else 1 - int(kernel)  # official padding rules, four taps
        first, second = (2 + extra + 1) // 2, (2 + extra) // 2
        pad = (first, second) if where == "before_down" else (first + 1, second + 1)
        yield name, fir(x if where == "before_down" else 4 * x, pad)
    sizes = [config[name] for name in ("in_channels", "out_channels", "kernel_size", "num_style_feat")]
    for output, name, sample, off in case.names(r"out\.(modconv_(none|upsample|downsample)_(no)?demod)"):
        way = None if sample == "none" else sample.removesuffix("sample")
        conv = ModulatedConv2d(*sizes, demodulate=not off, sample=way)
        conv.load_state_dict(case.group(f"sd.{name}."))
        yield output, conv(x, t["in.style"])
    for output, name, lr_mul, activate in case.names(r"out\.(equal_linear_lr([\d.]+)(_lrelu)?)"):
        state = case.group(f"sd.{name}.")
        linear = EqualLinear(*state["weight"].shape[::-1], lr_mul=float(lr_mul), activate=bool(activate))
        linear.load_state_dict(state)
        yield output, linear(t["in.style"])
    yield from zip(("out.norm_scale1", "out.norm_scale2"), unit_scales(t["in.scale1"], t["in.scale2"]), strict=True)


def pth_expected(case: Any) -> Iterator[tuple]:
    """The .pth files that must give this output are named in the entry."""
    from sdtrain.interop.loading import load_network

    for name in re.findall(r"\S+\.pth", case.entry["module"]):
        yield "out.y", load_network(case.folder / name).build()(case.tensors["in.x"])


def pth_generator(case: Any) -> Iterator[tuple]:
    """Recognised with the sizes that the manifest states; averaged weights are the stated share of the raw ones."""
    from sdtrain.interop.loading import load_network

    said = case.entry["what"]
    found = load_network(case.path)
    net, options = found.build(), found.typed_options
    for name, ours in {"nf": "num_feat", "gc": "num_grow_ch", "nb": "num_block", "x": "scale"}.items():
        if re.search(rf"\b{name} ?\d", said):
            yield ours, getattr(options, ours), number(said, name), 0.0
    yield "side", net(torch.zeros(1, 3, 4, 6)).shape[-1], 6 * options.scale, 0.0
    if "*params" in said:
        raw, average = load_network(case.path, prefer="params").state, found.state
        share = number(said, "ema =")
        worst = max(float((average[name] - share * raw[name]).abs().max()) for name in raw)
        yield f"ema is {share} params", worst, 0.0, 1e-6
    for name in case.manifest["files"]:
        if case.name in case.manifest["files"][name].get("module", ""):
            expected = case.other(name)
            reference = expected.tensors["out.y"]
            yield f"out.y of {name}", net(expected.tensors["in.x"]), reference, expected.limit(reference)


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
    torch.manual_seed(case.entry["seed"])  # the stored state is that after the steps; they started from fresh weights
    net = _rrdbnet(config).train()
    average = copy.deepcopy(net)
    options = {**config["adam"], "betas": tuple(config["adam"]["betas"])}
    adam = torch.optim.Adam(net.parameters(), **options)
    for output, _ in sorted(case.names(r"out\.loss(\d+)"), key=lambda name: int(name[1])):
        loss = l1(net(t["in.x"]), t["in.y"]).mean()
        yield output, loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - config["ema"])
    for side, player in (("net", net), ("ema", average)):
        for name in case.group(f"out.{side}."):
            yield f"out.{side}.{name}", player.state_dict()[name]


ADAPTERS = {
    "rrdbnet_x*.safetensors": rrdbnet,
    "rrdbnet_x*_full_procedural.safetensors": rrdbnet_full,
    "init_statistics_RRDBNet_*": rrdbnet_init,
    "srvgg*.safetensors": srvgg,
    "unet_disc_sn*.safetensors": unet_sn,
    "gcfsr_g*.safetensors": gcfsr,
    "gcfsr_d*.safetensors": gcfsr_discriminator,
    "stylegan2_d*.safetensors": gcfsr_discriminator,
    "gcfsr_parts*.safetensors": gcfsr_parts,
    "pth_expected*.safetensors": pth_expected,
    "RRDBNet_x*.pth": pth_generator,
    "ESRGAN_oldarch_x*.pth": pth_generator,
    "UNetD_*.pth": pth_other,
    "GCFSR_*.pth": pth_other,
    "train_step_esrnet*.safetensors": train_step,
}
