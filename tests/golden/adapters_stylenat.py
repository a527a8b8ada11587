"""Golden outputs of the StyleNAT networks: building blocks, full width at small resolution, key lists."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator

import torch
from check import Case
from rules import number
from torch import Tensor, nn

BASE = 16384  # width times resolution of the official networks at channel_multiplier 1


def _loaded(case: Case, name: str, module: nn.Module) -> nn.Module:
    """`module` in eval mode with the weights stored under sd.NAME; buffers of ours must equal the official ones."""
    module.load_state_dict({**_uninitialised(module), **case.group(f"sd.{name}.")})
    return module.eval()


def _uninitialised(module: nn.Module) -> dict[str, Tensor]:
    """The buffer that official code leaves uninitialised is not in the golden files."""
    return {name: value for name, value in module.state_dict().items() if name.endswith("_float_tensor")}


def _constants(case: Case, name: str, module: nn.Module) -> Tensor:
    """Largest difference of our constant buffers from the official ones."""
    leaves = ("kernel", "ll", "lh", "hl", "hh", "relative_position_index")
    pairs = [(v, case.tensors[f"sd.{name}.{k}"]) for k, v in module.state_dict().items() if k.split(".")[-1] in leaves]
    return torch.stack([(a - b).abs().max().double() for a, b in pairs]).max()


def units(case: Case) -> Iterator[tuple]:
    yield from _attention(case)
    yield from _generator_parts(case)
    yield from _discriminator_parts(case)


def _attention(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat
    from sdtrain.models.stylenat.attention import neighborhood_attention

    calls, other = case.entry["calls"], case.entry["other"]
    for name in [name for name, call in calls.items() if "kernel_sizes" in call]:
        call, x = calls[name], case.tensors[f"in.{name}"].requires_grad_()
        sizes = tuple(call["kernel_sizes"]), tuple(call["dilations"])
        net = _loaded(case, name, stylenat.HydraAttention(call["dim"], call["num_heads"], *sizes))
        out = net(x)
        yield f"out.{name}", out
        (dx,) = torch.autograd.grad((out * case.tensors[f"in.{name}.gw"]).sum(), x)
        for output, item in case.names(rf"out\.{name}\.dx_n(\d+)"):
            yield output, dx[int(item)]
    for name in [name for name, call in calls.items() if "kernel" in call]:
        call, rpb = calls[name], case.tensors[f"in.{name}.rpb"]
        q, k, v = (case.tensors[f"in.{name}.{part}"].permute(0, 2, 3, 1, 4).flatten(3) for part in "qkv")
        out = neighborhood_attention(q, k, v, rpb, call["dilation"]).unflatten(3, (len(rpb), -1))
        yield f"out.{name}.av", out.permute(0, 3, 1, 2, 4)
        for output, item, head in case.names(rf"out\.{name}\.qk_n(\d+)h(\d+)"):
            one = slice(int(head) * q.shape[3] // len(rpb), (int(head) + 1) * q.shape[3] // len(rpb))
            yield output, _window_scores(q[int(item), :, :, one], k[int(item), :, :, one], rpb[int(head)], call)
    state = {key.replace("rpb", "rpb."): value for key, value in case.group("sd.legacy.").items()}
    kernels, dilations = (
        tuple(map(int, re.search(rf"{word} (\d+)/(\d+)", other["legacy"]).groups())) for word in ("kernel", "dilation")
    )
    heads = sum(len(value) for key, value in state.items() if key.startswith("rpb."))
    net = stylenat.HydraAttention(state["proj.weight"].shape[0], heads, kernels, dilations)
    net.load_state_dict(state)
    yield "out.legacy", net(case.tensors["in.legacy"])
    rpb = case.tensors["sd.mhsarpb.rpb"]
    full = stylenat.FullAttention(case.tensors["in.mhsarpb"].shape[-1], len(rpb), (rpb.shape[1] + 1) // 2)
    yield "constants.mhsarpb", _constants(case, "mhsarpb", full), 0.0, 0.0
    yield "out.mhsarpb", _loaded(case, "mhsarpb", full)(case.tensors["in.mhsarpb"])


def _window_scores(q: Tensor, k: Tensor, rpb: Tensor, call: dict) -> Tensor:
    """q, k [H, W, C] of one image and head, bias [2k - 1, 2k - 1] -> scores of each window [H, W, k^2], by loops."""
    from sdtrain.models.stylenat.attention import window_start

    size, kernel, d = call["size"], call["kernel"], call["dilation"]
    scores = torch.empty(size, size, kernel, kernel)

    def keys(i: int) -> list[tuple[int, int]]:
        start = window_start(i // d, kernel, -(-(size - i % d) // d))
        return [((start + t) * d + i % d, start + t - i // d + kernel - 1) for t in range(kernel)]

    for y in range(size):
        for x in range(size):
            for a, (ky, by) in enumerate(keys(y)):
                for b, (kx, bx) in enumerate(keys(x)):
                    scores[y, x, a, b] = q[y, x] @ k[ky, kx] + rpb[by, bx]
    return scores.flatten(2)


def _generator_parts(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat

    t = case.tensors
    adain = _loaded(case, "adain", stylenat.AdaIN(t["in.adain.style"].shape[1], t["in.adain.x"].shape[1]))
    yield "out.adain", adain(t["in.adain.x"].transpose(1, 2), t["in.adain.style"]).transpose(1, 2)
    c_out, c_in = t["sd.upsample.reduction.weight"].shape
    net = stylenat.Upsample(math.isqrt(t["in.upsample"].shape[1]), c_in, c_out)
    yield "out.upsample", _loaded(case, "upsample", net)(t["in.upsample"])
    for name, *sizes in case.names(r"out\.pos_grid_(\d+)x(\d+)_dim(\d+)"):
        yield name, stylenat.position_grid(*map(int, sizes))
    yield "out.natlayer", _block(case)(t["in.natlayer.x"], t["in.natlayer.style"])
    to_rgb = stylenat.ToRGB(t["in.torgb.x"].shape[1], upsample=True)
    yield "constants.torgb", _constants(case, "torgb", to_rgb), 0.0, 0.0
    yield "out.torgb", _loaded(case, "torgb", to_rgb)(t["in.torgb.x"], t["in.torgb.skip"])
    yield "out.torgb_noskip", to_rgb(t["in.torgb.x"])


def _block(case: Case) -> nn.Module:
    from sdtrain.models.stylenat import networks as stylenat

    said, (_, length, dim) = case.entry["other"]["natlayer"], case.tensors["in.natlayer.x"].shape
    kernels, dilations = (
        tuple(ast.literal_eval(re.search(rf"{word} (\[.*?\])", said)[1])) for word in ("kernels", "dilations")
    )
    attention = stylenat.HydraAttention(dim, int(number(said, "heads")), kernels, dilations)
    style_dim = case.tensors["in.natlayer.style"].shape[1]
    block = stylenat.Block(dim, math.isqrt(length), attention, style_dim, number(said, "mlp_ratio"))
    return _loaded(case, "natlayer", block)


def _discriminator_parts(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat

    t = case.tensors
    yield "out.haar", stylenat.Haar()(t["in.haar"])
    yield "out.haar_inv", stylenat.InverseHaar()(t["out.haar"])
    from_rgb = stylenat.FromRGB(t["in.fromrgb.skip"].shape[1], downsample=True)
    yield "constants.fromrgb", _constants(case, "fromrgb", from_rgb), 0.0, 1e-7
    x, out = _loaded(case, "fromrgb", from_rgb)(t["out.haar"], t["in.fromrgb.skip"])
    yield "out.fromrgb.input", x
    yield "out.fromrgb.out", out
    c_in, c_out = t["in.convblock"].shape[1], t["out.convblock"].shape[1]
    yield "out.convblock", _loaded(case, "convblock", stylenat.ConvBlock(c_in, c_out))(t["in.convblock"])


def full_width(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat

    entry, t = case.entry, case.tensors
    inputs = case.rnd_in_text(entry["inputs"], res=entry["size"], size=entry["size"])
    options = stylenat.GeneratorOptions(
        style_dim=inputs["snat.z"].shape[1],
        kernels=tuple(map(tuple, entry["kernels"])),
        dilations=tuple(map(tuple, entry["dilations"])),
        channel_multiplier=entry["channel_multiplier"],
        min_heads=entry["min_heads"],
    )
    g = case.fill(stylenat.Generator(options, resolution=entry["size"]), "snat").eval()
    d = stylenat.Discriminator(stylenat.DiscriminatorOptions(), resolution=entry["size"])
    case.fill(d, "snat").eval()
    with torch.no_grad():
        w = g.mapping(inputs["snat.z"])
        for name, length in case.names(r"out\.latent0_(\d+)"):
            yield name, w[:, : int(length)]
        x = g.input(len(w))
        for i, layer in enumerate(g.layers):
            x = layer(x, w)
            for name, _ in case.names(rf"mid\.(layer{i})"):
                yield name, x[:, : t[name].shape[1], : t[name].shape[2]]
        yield "out.img", g.render(w)
    x = inputs["snat.dimg"].requires_grad_()
    logits = d.score(x)
    yield "out.D_logits", logits
    yield "out.r1", torch.autograd.grad(logits.sum(), x)[0].square().sum((1, 2, 3))


def _schema(net: nn.Module, state: dict[str, Tensor] | None = None) -> set[tuple]:
    state = net.state_dict() if state is None else state
    return {(name, tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()}


def keys(case: Case) -> Iterator[tuple]:
    """A key list of one network; sizes are read off the shapes, only dilations have none."""
    from sdtrain.models.stylenat import networks as stylenat

    shapes = {name: tuple(shape) for name, shape, *_ in case.json}
    if "style.1.weight" in shapes:
        net: nn.Module = _generator_of_keys(shapes)
    else:
        levels = sum(re.fullmatch(r"convs\.\d+\.conv2\.2\.bias", name) is not None for name in shapes)
        size, width = 8 * 2**levels, shapes["from_rgbs.0.conv.0.weight_orig"][0]
        options = stylenat.DiscriminatorOptions(channel_multiplier=width * size / BASE)
        net = stylenat.Discriminator(options, resolution=size)
    state = stylenat.to_legacy(net.state_dict()) if stylenat.is_legacy(shapes) else net.state_dict()
    expected = {(name, tuple(shape), dtype) for name, shape, dtype, _ in case.json}
    yield "keys that differ", len(_schema(net, state) ^ expected), 0, 0.0


def _generator_of_keys(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A generator whose head groups have the kernels of the keys and some dilations, which no key tells."""
    from sdtrain.models.stylenat import networks as stylenat

    size = 4 * 2 ** max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    width = shapes[f"to_rgbs.{size.bit_length() - 3}.conv.weight"][1]
    mlp_layers = sum(re.fullmatch(r"style\.\d+\.weight", name) is not None for name in shapes)
    kernels: list[tuple[int, ...]] = []
    heads = []
    for i in range(size.bit_length() - 2):
        stem = f"layers.{i}.blocks.0.attn.rpb"
        groups = [shape for name, shape in sorted(shapes.items()) if name.startswith(stem)]
        heads.append(sum(shape[0] for shape in groups))
        kernels.append(tuple((shape[-1] + 1) // 2 for shape in groups))
    options = stylenat.GeneratorOptions(
        style_dim=shapes["style.1.weight"][1],
        mlp_layers=mlp_layers,
        channel_multiplier=width * size / BASE,
        min_heads=min(heads),
        kernels=tuple(kernels),
        dilations=tuple(tuple(1 for _ in groups) for groups in kernels),
    )
    return stylenat.Generator(options, resolution=size)


ADAPTERS = {"snat_units*.safetensors": units, "snat_big*.safetensors": full_width, "keys_snat_*.json": keys}
