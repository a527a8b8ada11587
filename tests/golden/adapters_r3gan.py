"""R3GAN: layers, networks, both losses, augmentation, training steps and snapshots against the golden numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from adapters_stylegan2 import gradient_sums, stored_gradients
from torch import Tensor, nn
from torch.nn import functional as F

Augment = Callable[[Tensor], Tensor]


def options_of(config: Mapping[str, Any], player: str) -> Any:
    """Our options of an official constructor's arguments; the discriminator's lists are turned to begin at 4x4."""
    from sdtrain.models.r3gan import networks

    lists = {"widths": "WidthPerStage", "groups": "CardinalityPerStage", "blocks": "BlocksPerStage"}
    turn = -1 if player == "Discriminator" else 1
    values: dict[str, Any] = {own: tuple(config[name][::turn]) for own, name in lists.items()}
    values |= {"expansion": config["ExpansionFactor"], "num_low_precision_res": len(config["FP16Stages"])}
    named = {"z_dim": "NoiseDimension", "embed_dim": "ConditionEmbeddingDimension"}
    values |= {own: config[name] for own, name in named.items() if name in config}
    return getattr(networks, f"{player}Options")(**values)


def build(config: Mapping[str, Any], player: str, state: Mapping[str, Tensor] | None = None, **more: Any) -> Any:
    """A network of official arguments, with weights if given; `more` overrides arguments."""
    from sdtrain.models.r3gan import networks

    config = {**config, **more}
    sizes = {"resolution": config["img_resolution"], "num_classes": config["c_dim"]}
    net = getattr(networks, player)(options_of(config, player), **sizes)
    if state is not None:
        net.load_state_dict(state)
    return net


def stage_outputs(net: nn.Module) -> dict[str, Tensor]:
    """A dict that fills with the outputs of the stages, by index, when the network runs."""
    seen: dict[str, Tensor] = {}
    for name, stage in net.Model["MainLayers"].named_children():
        stage.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    return seen


def units(case) -> Iterator[tuple]:
    from sdtrain.models.r3gan import networks

    t = case.tensors
    x, z, y = t["in.x"], t["in.z"], t["in.y"]
    width, other = x.shape[1], t["out.upsample_4_3"].shape[1]
    up, down = networks.Resampler(up=True), networks.Resampler(up=False)
    yield "out.up", up(x)
    yield "out.down", down(x)
    yield "buf.Kernel", up.Kernel
    activation = networks.BiasedActivation(width)
    activation.load_state_dict({"Bias": t["in.bias"]})
    yield "out.act4d", activation(x)
    yield "out.act2d", activation(x[:, :, 0, 0])
    inner, per_group = t["sd.block.LinearLayer2.Layer.weight"].shape[:2]
    block = networks.ResidualBlock(networks.Stage(width, inner // per_group, 1, inner // width, False), 1)
    for name, value in block.named_parameters():
        if case.entry["fresh_LinearLayer_abs_max"][name] == 0:
            yield f"fresh {name}", value.abs().max(), 0.0, 0.0
    modules = {
        "block": (block, x),
        "upsample_4_3": (networks.UpTransition(width, other), x),
        "downsample_4_3": (networks.DownTransition(width, other), x),
        "gbasis": (networks.GenerativeBasis(z.shape[1], width), z),
        "dbasis": (networks.DiscriminativeBasis(width, t["out.dbasis"].shape[1]), y),
    }
    for name, (module, value) in modules.items():
        module.load_state_dict(case.group(f"sd.{name}."))
        yield f"out.{name}", module(value)


def generator(case) -> Iterator[tuple]:
    t = case.tensors
    G = build(case.entry["config"], "Generator", case.group("sd."))
    seen = stage_outputs(G)
    z = t["in.z"].clone().requires_grad_()
    images = G(z, t.get("in.c"))
    yield "out.img", images
    for name in case.group("mid.stage"):
        yield f"mid.stage{name}", seen[name.removesuffix("_n0")][0]
    (images * t["in.grad_weight"]).sum().backward()
    yield "out.dz", z.grad
    yield from stored_gradients(case, G, "grad.")
    yield from gradient_sums(case, G, case.entry["grad_stats_norm_sum"], "grad")


def discriminator(case) -> Iterator[tuple]:
    from sdtrain.losses.adversarial import gradient_penalty

    t, c = case.tensors, case.tensors.get("in.c")
    D = build(case.entry["config"], "Discriminator", case.group("sd."))
    seen = stage_outputs(D)
    images = t["in.img"].clone().requires_grad_()
    logits = D(images, c)
    yield "out.logits", logits
    for name in case.group("mid.stage"):
        yield f"mid.stage{name}", seen[name.removesuffix("_n0")][0]
    (slope,) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    yield "out.r1_grad_n0", slope[0]
    yield "out.r1_penalty", squared_norms(logits, images)
    gradient_penalty(images, logits).backward()
    yield from gradient_sums(case, D, case.entry["mean_penalty_grad_stats_norm_sum"], "penalty_grad")
    D.zero_grad()
    F.softplus(-D(t["in.img"], c)).mean().backward()
    yield from gradient_sums(case, D, case.entry["softplus_neg_mean_grad_stats_norm_sum"], "grad")


def squared_norms(logits: Tensor, images: Tensor) -> Tensor:
    """Per sample, the squared norm of the slope of the logits at the images."""
    (slope,) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    return slope.float().square().sum((1, 2, 3))


def loss_D(nets: Mapping[str, Any], x: Mapping[str, Any], gamma: float, augment: Augment) -> tuple[Tensor, dict]:
    """The loss of one D phase and its parts; x holds z, real, c."""
    from sdtrain.losses.adversarial import gradient_penalty, relativistic_d

    real = x["real"].clone().requires_grad_()
    fake = nets["G"](x["z"], x["c"]).detach().requires_grad_()
    real_logits, fake_logits = nets["D"](augment(real), x["c"]), nets["D"](augment(fake), x["c"])
    parts = {
        "adv": torch.stack([relativistic_d(*pair)[0] for pair in zip(real_logits[:, None], fake_logits[:, None])]),
        "relativistic_logits": real_logits - fake_logits,
        "r1": squared_norms(real_logits, real),
        "r2": squared_norms(fake_logits, fake),
    }
    (loss,) = relativistic_d(real_logits, fake_logits)
    if gamma:
        loss = loss + gamma / 2 * (gradient_penalty(real, real_logits) + gradient_penalty(fake, fake_logits))
    return loss, parts


def loss_G(nets: Mapping[str, Any], x: Mapping[str, Any], augment: Augment) -> tuple[Tensor, dict]:
    """The loss of one G phase and its parts."""
    from sdtrain.losses.adversarial import relativistic_g

    fake_logits = nets["D"](augment(nets["G"](x["z"], x["c"])), x["c"])
    real_logits = nets["D"](augment(x["real"]), x["c"])
    parts = {
        "adv": torch.stack([relativistic_g(*pair) for pair in zip(fake_logits[:, None], real_logits[:, None])]),
        "relativistic_logits": fake_logits - real_logits,
    }
    return relativistic_g(fake_logits, real_logits), parts


def start_nets(case) -> dict[str, Any]:
    """G and D with the weights that the entry names: in this file, in one other, or in one file each."""
    named = re.findall(r"r3_\w+\.safetensors", case.entry.get("weights", case.entry["what"]))
    if len(named) == 2:
        states = {role: case.other(name).group("sd.") for role, name in zip("GD", named)}
    else:
        holder = case.other(named[0]) if named else case
        states = {role: holder.group(f"sd.{role}.") for role in "GD"}
    return {role: build(case.entry[f"{role}_config"], player, states[role]) for role, player in PLAYERS.items()}


PLAYERS = {"G": "Generator", "D": "Discriminator"}


def inputs(case, phase: str) -> dict[str, Any]:
    held = case.group(f"in.{phase}.")
    if "real_uint8" in held:
        held["real"] = held["real_uint8"] / 127.5 - 1
    return {"c": None, **held}


def steps(case) -> Iterator[tuple]:
    nets, gamma = start_nets(case), case.entry["gamma"]
    augment = augmentation(case)
    x = inputs(case, "D")
    yield from _phase(case, nets, "D", *loss_D(nets, x, gamma, augment))
    if "D_grad_stats_norm_sum_gamma0" in case.entry:
        nets["D"].zero_grad()
        loss_D(nets, x, 0.0, augment)[0].backward()
        yield from gradient_sums(case, nets["D"], case.entry["D_grad_stats_norm_sum_gamma0"], "D, gamma 0")
    yield from _phase(case, nets, "G", *loss_G(nets, inputs(case, "G"), augment))


def augmentation(case) -> Augment:
    """Nothing, or the pipe with every value at the entry's percentile; its multipliers must be those of the entry."""
    from sdtrain.augment.ada import AdaPipe

    if case.entry["debug_percentile"] is None:
        return lambda images: images
    pipe = AdaPipe("r3gan")
    for name, value in case.entry["augment_multipliers"].items():
        if getattr(pipe.options, name) != value:
            raise ValueError(f"the multiplier of {name} is {getattr(pipe.options, name)}, not {value}")
    return lambda images: pipe(images, debug_percentile=case.entry["debug_percentile"])


def _phase(case, nets: Mapping[str, Any], role: str, loss: Tensor, parts: Mapping[str, Tensor]) -> Iterator[tuple]:
    yield f"out.{role}.loss", loss
    for name, value in parts.items():
        yield f"out.{role}.{name}", value
    nets[role].zero_grad()
    loss.backward()
    yield from stored_gradients(case, nets[role], f"grad.{role}.")
    yield from gradient_sums(case, nets[role], case.entry[f"{role}_grad_stats_norm_sum"], role)


def schedule(values: Mapping[str, float], seen_img: int) -> float:
    """The product's schedule from the base to the final value."""
    from sdtrain.config.schedule import Schedule, value_at

    points = (("0", values["base_value"]), (f"{values['total_nimg']:.0f}", values["final_value"]))
    return value_at(Schedule(points=points, curve="cosine"), seen_img)


def training(case) -> Iterator[tuple]:
    """Each iteration: schedules, D phase and step, G phase and step with the new D, average."""
    from sdtrain.engine.ema import ema_beta, update_ema

    nets = start_nets(case)
    start = {role: deepcopy(nets[role].state_dict()) for role in "GD"}
    nets["G_ema"], start["G_ema"] = deepcopy(nets["G"]), start["G"]
    optimizers = {role: torch.optim.Adam(nets[role].parameters(), betas=(0.0, 0.9), eps=1e-8) for role in "GD"}
    tolerance = case.entry["tol"]
    for i, expected in enumerate(case.entry["iterations"]):
        seen_img = expected["cur_nimg"]
        now = {name: schedule(values, seen_img) for name, values in case.entry["schedulers"].items()}
        for name, value in now.items():
            yield f"{i}: {name}", value, expected[name], 1e-9 * abs(expected[name])
        for role in "DG":
            batch_size = _train_step(case, nets, optimizers[role], role, i, now)
            norm = torch.stack([p.grad.norm() for p in nets[role].parameters()]).norm()
            reference = expected[f"grad_norm_{role}"]
            yield f"{i}: gradient of {role}", norm, reference, tolerance["grad_norm_relative"] * reference
        beta = ema_beta(now["ema"], None, seen_img, batch_size)
        yield f"{i}: ema_beta", beta, expected["ema_beta"], 1e-9
        update_ema(nets["G_ema"], nets["G"], beta)
    for role, net in nets.items():
        state = net.state_dict()
        for name, reference in case.group(f"out.delta.{role}.").items():
            off = (state[name] - start[role][name] - reference).norm()
            yield f"out.delta.{role}.{name}", off, 0.0, tolerance["relative_rms"] * float(reference.norm())


def _train_step(
    case, nets: Mapping[str, Any], optimizer: torch.optim.Adam, role: str, i: int, now: Mapping[str, float]
) -> int:
    """One optimizer step of one player in two rounds of accumulation; returns the batch size."""
    optimizer.zero_grad()
    x = inputs(case, f"{role}{i}")
    for half in range(2):
        part = {name: None if value is None else value.chunk(2)[half] for name, value in x.items()}
        if role == "D":
            loss, _ = loss_D(nets, part, now["gamma"], lambda images: images)
        else:
            loss, _ = loss_G(nets, part, lambda images: images)
        (loss / 2).backward()
    optimizer.param_groups[0].update(lr=now["lr"], betas=(0.0, now["beta2"]))
    optimizer.step()
    return len(x["z"])


def low_precision(case) -> Iterator[tuple]:
    """The networks of r3_G and r3_D with bfloat16 stages; our images are float32, so R2 is too."""
    G_case, D_case = case.other("r3_G.safetensors"), case.other("r3_D.safetensors")
    nets = {}
    for role, other in (("G", G_case), ("D", D_case)):
        config = {**other.entry["config"], "FP16Stages": case.entry[f"{role}_FP16Stages"]}
        nets[role] = build(config, PLAYERS[role], other.group("sd."))
    images = nets["G"](G_case.tensors["in.z"])
    stride = images.shape[2] // case.tensors["out.img_s2"].shape[2]
    yield "out.img_s2", images[:, :, ::stride, ::stride]
    logits = nets["D"](D_case.tensors["in.img"])
    yield "out.logits", logits
    yield "images and logits are float32", {images.dtype, logits.dtype} == {torch.float32}, True, 0.0
    x = {"z": G_case.tensors["in.z"], "real": D_case.tensors["in.img"], "c": None}
    loss, parts = loss_D(nets, x, case.entry["gamma"], lambda images: images)
    for name, value in parts.items():
        yield f"out.D.{name}", value
    loss.backward()
    dtypes = {str(p.grad.dtype) for p in nets["D"].parameters()}
    yield "gradients of D", dtypes == {case.entry["dtypes"]["D param grads"]}, True, 0.0


def big(case) -> Iterator[tuple]:
    t, c = case.tensors, case.tensors["in.c"]
    known = case.rnd_in_text(case.entry["inputs"])
    with torch.no_grad():
        G = case.fill(build(case.entry["G_config"], "Generator"), "r3_G")
        image = G(known["bigG.z"], c)
        stride = image.shape[2] // t["out.img_s4"].shape[2]
        yield "out.img_s4", image[:, :, ::stride, ::stride]
        yield "out.img_mean", image.mean(), t["out.img_mean"], case.limit(t["out.img_std"])
        yield "out.img_std", image.std()
        D = case.fill(build(case.entry["D_config"], "Discriminator"), "r3_D")
        yield "out.logits", D(known["bigD.img"], c)


ADAPTERS = {
    "r3_units.safetensors": units,
    "r3_G.safetensors": generator,
    "r3_Gc.safetensors": generator,
    "r3_D.safetensors": discriminator,
    "r3_Dc.safetensors": discriminator,
    "r3_step*.safetensors": steps,
    "r3_train.safetensors": training,
    "r3_bf16.safetensors": low_precision,
    "r3_big.safetensors": big,
}
