"""Golden outputs of the StyleNAT networks: building blocks, full width at small resolution, key lists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from check import Case
from torch import Tensor, nn


def _loaded(case: Case, name: str, module: nn.Module) -> nn.Module:
    """`module` in eval mode with the weights stored under sd.NAME; buffers of ours must equal the official ones."""
    module.load_state_dict({**_placeholder(module), **case.group(f"sd.{name}.")})
    return module.eval()


def _placeholder(module: nn.Module) -> dict[str, Tensor]:
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

    for name in ("hydra_a", "hydra_b"):
        call, x = case.entry["calls"][name], case.tensors[f"in.{name}"].requires_grad_()
        sizes = tuple(call["kernel_sizes"]), tuple(call["dilations"])
        net = _loaded(case, name, stylenat.HydraAttention(call["dim"], call["num_heads"], *sizes))
        out = net(x)
        yield f"out.{name}", out
        yield f"out.{name}.dx_n0", torch.autograd.grad((out * case.tensors[f"in.{name}.gw"]).sum(), x)[0][0]
    for name in ("na_a", "na_b", "na_c"):
        call, rpb = case.entry["calls"][name], case.tensors[f"in.{name}.rpb"]
        q, k, v = (case.tensors[f"in.{name}.{part}"].permute(0, 2, 3, 1, 4).flatten(3) for part in "qkv")
        out = neighborhood_attention(q, k, v, rpb, call["dilation"]).unflatten(3, (len(rpb), -1))
        yield f"out.{name}.av", out.permute(0, 3, 1, 2, 4)
        yield f"out.{name}.qk_n0h0", _window_scores(q, k, rpb, call)
    net = stylenat.HydraAttention(16, 4, (3, 5), (1, 2))
    state = {key.replace("rpb", "rpb."): value for key, value in case.group("sd.legacy.").items()}
    net.load_state_dict(state)
    yield "out.legacy", net(case.tensors["in.legacy"])
    full = stylenat.FullAttention(16, 4)
    yield "constants.mhsarpb", _constants(case, "mhsarpb", full), 0.0, 0.0
    yield "out.mhsarpb", _loaded(case, "mhsarpb", full)(case.tensors["in.mhsarpb"])


def _window_scores(q: Tensor, k: Tensor, rpb: Tensor, call: dict) -> Tensor:
    """Scores with bias of image 0, head 0 for the keys of each window [H, W, kernel^2], by loops."""
    from sdtrain.models.stylenat.attention import window_start

    size, kernel, d, dim = call["size"], call["kernel"], call["dilation"], q.shape[3] // len(rpb)
    scores = torch.empty(size, size, kernel, kernel)

    def keys(i: int) -> list[tuple[int, int]]:
        start = window_start(i // d, kernel, -(-(size - i % d) // d))
        return [((start + t) * d + i % d, start + t - i // d + kernel - 1) for t in range(kernel)]

    for y in range(size):
        for x in range(size):
            for a, (ky, by) in enumerate(keys(y)):
                for b, (kx, bx) in enumerate(keys(x)):
                    scores[y, x, a, b] = q[0, y, x, :dim] @ k[0, ky, kx, :dim] + rpb[0, by, bx]
    return scores.flatten(2)


def _generator_parts(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat

    t = case.tensors
    adain = _loaded(case, "adain", stylenat.AdaIN(10, 6))
    yield "out.adain", adain(t["in.adain.x"].transpose(1, 2), t["in.adain.style"]).transpose(1, 2)
    yield "out.upsample", _loaded(case, "upsample", stylenat.Upsample(4, 8, 12))(t["in.upsample"])
    yield "out.pos_grid_8x8_dim6", stylenat.position_grid(8, 8, 6)
    block = stylenat.Block(16, 9, stylenat.HydraAttention(16, 4, (3, 3), (1, 2)), 10, 2)
    yield "out.natlayer", _loaded(case, "natlayer", block)(t["in.natlayer.x"], t["in.natlayer.style"])
    to_rgb = stylenat.ToRGB(6, upsample=True)
    yield "constants.torgb", _constants(case, "torgb", to_rgb), 0.0, 0.0
    yield "out.torgb", _loaded(case, "torgb", to_rgb)(t["in.torgb.x"], t["in.torgb.skip"])
    yield "out.torgb_noskip", to_rgb(t["in.torgb.x"])


def _discriminator_parts(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat

    t = case.tensors
    yield "out.haar", stylenat.Haar()(t["in.haar"])
    yield "out.haar_inv", stylenat.InverseHaar()(t["out.haar"])
    from_rgb = stylenat.FromRGB(5, downsample=True)
    yield "constants.fromrgb", _constants(case, "fromrgb", from_rgb), 0.0, 1e-7
    x, out = _loaded(case, "fromrgb", from_rgb)(t["out.haar"], t["in.fromrgb.skip"])
    yield "out.fromrgb.input", x
    yield "out.fromrgb.out", out
    yield "out.convblock", _loaded(case, "convblock", stylenat.ConvBlock(4, 5))(t["in.convblock"])


def full_width(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat

    entry = case.entry
    options = stylenat.GeneratorOptions(
        kernels=tuple(map(tuple, entry["kernels"])),
        dilations=tuple(map(tuple, entry["dilations"])),
        channel_multiplier=entry["channel_multiplier"],
        min_heads=entry["min_heads"],
    )
    g = case.fill(stylenat.Generator(options, resolution=entry["size"]), "snat").eval()
    d = stylenat.Discriminator(stylenat.DiscriminatorOptions(), resolution=entry["size"])
    case.fill(d, "snat").eval()
    inputs = case.rnd_in_text(entry["inputs"])
    with torch.no_grad():
        w = g.mapping(inputs["snat.z"])
        yield "out.latent0_32", w[:, :32]
        yield "mid.layer0", g.layers[0](g.input(len(w)), w)[:, :16, :8]
        yield "out.img", g.render(w)
    x = inputs["snat.dimg"].requires_grad_()
    logits = d.score(x)
    yield "out.D_logits", logits
    yield "out.r1", torch.autograd.grad(logits.sum(), x)[0].square().sum((1, 2, 3))


def _schema(net: nn.Module, state: dict[str, Tensor] | None = None) -> set[tuple]:
    state = net.state_dict() if state is None else state
    return {(name, tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()}


def keys(case: Case) -> Iterator[tuple]:
    from sdtrain.models.stylenat import networks as stylenat

    if "D256" in case.name:
        net: nn.Module = stylenat.Discriminator(stylenat.DiscriminatorOptions(), resolution=256)
    else:
        net = stylenat.Generator(stylenat.GeneratorOptions(), resolution=256)
    state = stylenat.to_legacy(net.state_dict()) if "legacy" in case.name else net.state_dict()
    expected = {(name, tuple(shape), dtype) for name, shape, dtype, _ in case.json}
    yield "keys that differ", len(_schema(net, state) ^ expected), 0, 0.0


ADAPTERS = {"snat_units.safetensors": units, "snat_big.safetensors": full_width, "keys_snat_*.json": keys}
