"""StyleGAN2-ADA: networks, their losses and key lists against the golden numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from rules import number
from torch import Tensor, nn
from torch.nn import functional as F


class AmbientDraws:
    """Draws that take torch's seeded stream in call order, as the goldens did."""

    def __init__(self, num_samples: int):
        self.num_samples = self.ghost_batch = num_samples

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


def stored_gradients(case, net: nn.Module, prefix: str) -> Iterator[tuple]:
    """The gradients of the parameters that the file has whole."""
    for name in case.group(prefix):
        yield f"{prefix}{name}", net.get_parameter(name).grad


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
        for name, psi, cut in case.names(r"out\.ws(?:_psi([\d.]+))?(?:_cut(\d+))?"):
            cutoff = int(cut) if cut else None
            yield name, G.mapping(z, c, truncation_psi=float(psi or 1), truncation_cutoff=cutoff)
        kinds = r"out\.img_(none|const|random_seeded|mixed_cut\d+)(?:_psi([\d.]+?))?(?:_clamp([\d.]+?))?(?:\.s(\d+))?"
        for name, kind, psi, clamp, stride in case.names(kinds):
            net = build_generator(case, state, config, conv_clamp=float(clamp)) if clamp else G
            image = _image(case, net, name, kind, net.mapping(z, c, truncation_psi=float(psi or 1)))
            yield name, image[:, :, :: int(stride or 1), :: int(stride or 1)]
        yield from _blocks(case, G, G.mapping(z, c))
    yield from _generator_gradients(case, G, z, c)
    yield from _path_length(case, G, z, c)
    G.train().mapping(z, c)
    yield "out.train_w_avg_after", G.mapping.w_avg


def _image(case, G, name: str, kind: str, ws: Tensor) -> Tensor:
    """One image of styles ws; `kind` is none, const, random_seeded or mixed_cutN."""
    if kind.startswith("mixed_cut"):
        cut = int(kind.removeprefix("mixed_cut"))
        return G.synthesis(torch.cat([ws[:, :cut], ws.flip(0)[:, cut:]], 1), noise="const")
    if kind != "random_seeded":
        return G.synthesis(ws, noise=kind)
    torch.manual_seed(int(number(case.said(name), "manual_seed")))
    return G.synthesis(ws, AmbientDraws(len(ws)))


def _blocks(case, G, ws: Tensor) -> Iterator[tuple]:
    x = image = None
    first = 0
    for r in G.synthesis.resolutions:
        block = getattr(G.synthesis, f"b{r}")
        x, image = block(x, image, ws[:, first : first + block.num_conv + 1], None, "const")
        first += block.num_conv
        for name, part, item in case.names(rf"mid\.b{r}\.(x|img)_n(\d+)"):
            yield name, (x if part == "x" else image)[int(item)]


def _generator_gradients(case, G, z: Tensor, c: Tensor) -> Iterator[tuple]:
    z = z.clone().requires_grad_()
    images = G(z, c, noise="const")
    G.zero_grad()
    (images * case.tensors["in.grad_weight"]).sum().backward()
    yield "out.dz", z.grad
    yield from gradient_sums(case, G, case.entry["grad_stats_norm_sum"], "grad")


def _path_length(case, G, z: Tensor, c: Tensor) -> Iterator[tuple]:
    from sdtrain.losses.regularizers import path_length_penalty, path_lengths

    unit, said = case.tensors["in.pl_noise_unit"], case.said("out.pl_loss")
    ws = G.mapping(z[: len(unit)], c[: len(unit)]).detach().requires_grad_()
    lengths = path_lengths(ws, G.synthesis(ws, noise="const"), unit)
    decay, weight = number(said, r"lerp\(pl_mean_before, mean\(pl_lengths\),"), number(said, r"mean\(")
    penalty, mean = path_length_penalty(lengths, case.tensors["in.pl_mean_before"], decay, weight)
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
    for name, block, item in case.names(r"mid\.(b\d+)\.x_n(\d+)"):
        yield name, seen[block][0][int(item)]
    num_statistics = t["mid.mbstd_extra_channels"].shape[1]
    yield "mid.mbstd_extra_channels", seen["b4.mbstd"][:, -num_statistics:, 0, 0]
    if "mid.cmap" in t:
        yield "mid.cmap", seen["mapping"]
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    penalty = slope.square().sum((1, 2, 3))
    for name, item in case.names(r"out\.r1_grad_n(\d+)"):
        yield name, slope[int(item)]
    yield "out.r1_penalty", penalty
    D.zero_grad()
    (penalty.mean() * (case.entry["r1_gamma"] / 2)).backward()
    yield from gradient_sums(case, D, case.entry["r1_weight_grad_stats_norm_sum"], "r1_grad")
    D.zero_grad()
    F.softplus(-D(t["in.img"], t["in.c"])).mean().backward()
    yield from gradient_sums(case, D, case.entry["softplus_neg_mean_grad_stats_norm_sum"], "grad")
    for name, clamp in case.names(r"out\.logits_clamp([\d.]+)"):
        yield name, build_discriminator(case, state, config, conv_clamp=float(clamp))(t["in.img"], t["in.c"])


def architectures(case) -> Iterator[tuple]:
    from sdtrain.models.stylegan2.networks import Discriminator, DiscriminatorOptions

    images, what = case.tensors["in.img"], case.entry["what"]
    sizes = {name: int(number(what, name)) for name in ("channel_base", "channel_max")}
    group = int(number(what, "mbstd group"))
    for output, name in case.names(r"out\.(\w+)\.logits"):
        options = DiscriminatorOptions(architecture=name, mbstd_group=group, img_channels=images.shape[1], **sizes)
        D = Discriminator(options, resolution=images.shape[-1]).eval()
        D.load_state_dict(case.group(f"sd.{name}."))
        yield output, D(images)


def _full_size(config: Mapping[str, Any], z_dim: int, w_dim: int, mbstd: int, **widths: Any) -> tuple:
    """Generator and discriminator of a preset, built from official arguments."""
    from sdtrain.models.stylegan2.networks import discriminator_from_official, generator_from_official

    sizes = {"c_dim": 0, "img_resolution": config["res"]}
    widths = {"channel_base": config["channel_base"], "num_fp16_res": 0, **widths}
    nested = {"mapping_kwargs": {"num_layers": config["map"]}, "synthesis_kwargs": widths}
    G = generator_from_official({"z_dim": z_dim, "w_dim": w_dim, **sizes, **nested})
    return G, discriminator_from_official({**sizes, **widths, "epilogue_kwargs": {"mbstd_group_size": mbstd}})


def big(case) -> Iterator[tuple]:
    config, stride, said = case.entry["config"], case.entry["stride"], case.entry["calls"]
    inputs = case.rnd_in_text(case.entry["inputs"], res=config["res"])
    z = inputs["bigG.z"]
    group, w_dim, widest = (int(number(said, name)) for name in ("mbstd_group_size", "w_dim", "channel_max"))
    clamp = number(said, "conv_clamp")
    G, D = _full_size(config, z.shape[1], w_dim, group, channel_max=widest, conv_clamp=clamp)
    G.eval(), D.eval()
    with torch.no_grad():
        image = case.fill(G, "sg2")(z, noise="const")
        yield "out.img_strided", image[:, :, ::stride, ::stride]
        yield "out.img_mean", image.mean(), case.tensors["out.img_mean"], case.limit(case.tensors["out.img_std"])
        yield "out.img_std", image.std()
        yield "out.logits", case.fill(D, "sg2")(inputs["bigD.img"])


def keys(case) -> Iterator[tuple]:
    """The key list has the sizes that its `config` leaves out; minibatch stddev groups have no key."""
    shapes = {key: shape for key, shape, *_ in case.json["G"]}
    w_dim, z_dim = shapes["mapping.fc0.weight"]
    with torch.device("meta"):
        G, D = _full_size(case.json["config"], z_dim, w_dim, mbstd=1, channel_max=shapes["synthesis.b4.const"][0])
    for name, net in (("G", G), ("D", D)):
        different = set(map(str, key_rows(net))) ^ set(map(str, case.json[name]))
        yield f"{name}.keys that differ", len(different), 0, 0.0
        yield f"{name}.parameters", sum(p.numel() for p in net.parameters()), _count(case.json[name]), 0.0


def key_rows(net: nn.Module) -> list[list]:
    """[name, shape, format, param or buffer] of a state dict, as key lists have them."""
    parameters = dict(net.named_parameters())
    return [
        [key, list(v.shape), str(v.dtype).removeprefix("torch."), "param" if key in parameters else "buffer"]
        for key, v in net.state_dict().items()
    ]


def _count(rows: list[list]) -> int:
    return sum(prod(shape) for _, shape, _, kind in rows if kind == "param")


def losses(case) -> Iterator[tuple]:
    """The four phases in order, no optimizer step in between.

    The noise is random and was not kept: as its strength is zero it moves nothing but the strengths' own gradients,
    which are left out. The stored w_avg is that after all phases, so the first one is found by going back.
    """
    from sdtrain.losses.regularizers import path_length_penalty, path_lengths

    t, what = case.tensors, case.entry["what"]
    pl_weight, pl_decay, r1_gamma = (number(what, name) for name in ("pl_weight", "pl_decay", "r1_gamma"))
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
    loss, mean = path_length_penalty(lengths, number(what, "pl_mean starts at"), pl_decay, pl_weight)
    penalty = (lengths - mean).square()
    reports = {"Loss/pl_penalty": penalty, "Loss/G/reg": pl_weight * penalty}
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
    reports = {"Loss/scores/real": logits, "Loss/r1_penalty": penalty, "Loss/D/reg": penalty * r1_gamma / 2}
    yield from _phase(case, "Dreg", D, penalty.mean() * r1_gamma / 2, reports)
    yield "out.w_avg_after_all", G.mapping.w_avg


def _phase(case, name: str, net: nn.Module, loss: Tensor, reports: Mapping[str, Tensor]) -> Iterator[tuple]:
    """Backward of gain * loss; gradients and reported numbers against the manifest and the stored tensors."""
    from check import Skip

    expected = case.entry["phases"][name]
    net.zero_grad()
    (loss * expected["gain"]).backward()
    drawn = Skip("it depends on the noise that was drawn, which the file does not hold")
    known = {key: value for key, value in expected["grad_norm_sum"].items() if not key.endswith("noise_strength")}
    for key in [key for key in expected["grad_norm_sum"] if key not in known]:
        yield f"{name}.norm and sum.{key}", drawn
    yield from gradient_sums(case, net, known, name)
    parameters = dict(net.named_parameters())
    for key in [key for key in case.group(f"grad.{name}.") if key in known]:
        grad = parameters[key].grad
        yield f"grad.{name}.{key}", torch.zeros_like(parameters[key]) if grad is None else grad
    for key in [key for key in case.group(f"grad.{name}.") if key not in known]:
        yield f"grad.{name}.{key}", drawn
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


ADAPTERS = {
    "sg2_G*.safetensors": generator,
    "sg2_D*.safetensors": discriminator,
    "sg2_Darch*.safetensors": architectures,
    "sg2_big*.safetensors": big,
    "sg2_loss*.safetensors": losses,
    "keys_sg2_*.json": keys,
}
