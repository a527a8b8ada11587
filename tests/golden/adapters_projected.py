"""Adapters for ProjectedGAN: FastGAN generators, projected discriminators, their blocks, DiffAugment, hinge loss, keys.

What the manifest says only in prose (single heads) is read off the shapes of the stored weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# some files hold the state dict as it was after the train-mode call; v and running statistics before it are lost
OVERWRITTEN = "the file stores the state after the train call"


def fastgan(case: Any) -> Iterator[tuple]:
    """One generator: eval image, one train-mode call and the state after it, gradient to z."""
    net = _fastgan_net(case)
    stride, has = case.entry["stride"], case.tensors
    z, c = has["in.z"].clone().requires_grad_(), has["in.c"]
    image = net.eval()(z, c if c.shape[1] else None)
    strided = image[:, :, ::stride, ::stride]
    yield "out.eval.img_strided", strided
    for name, value in (("out.eval.mean", image.mean()), ("out.eval.std", image.std())):
        if name in has:
            yield name, value
    if "out.eval.dz" in has:
        (dz,) = torch.autograd.grad((strided * has["in.grad_weight_strided"]).sum(), z)
        yield "out.eval.dz", dz
    with torch.no_grad():
        yield "out.train.img_strided", net.train()(z, c if c.shape[1] else None)[:, :, ::stride, ::stride]
    state = net.state_dict()
    for name in case.group("after_train."):
        yield f"after_train.{name}", state[name]


def _fastgan_net(case: Any) -> nn.Module:
    from sdtrain.models.fastgan.networks import Generator, GeneratorOptions

    config, state = case.entry["config"], case.group("sd.")
    num_embeddings = len(state["synthesis.embed.weight"]) if config.get("cond") else 1
    num_classes = (config.get("num_classes") or num_embeddings) if config.get("cond") else 0
    options = GeneratorOptions(
        z_dim=config["z_dim"], ngf=config["ngf"], lite=config["lite"], num_embeddings=num_embeddings
    )
    net = Generator(options, resolution=config["img_resolution"], num_classes=num_classes)
    net.load_state_dict(state)
    return net


def units(case: Any) -> Iterator[tuple]:
    """Building blocks."""
    yield from _up_block_and_skip(case)
    yield from _down_blocks(case)
    yield from _spectral_conv(case)
    yield from _ghost_norm(case)
    from sdtrain.augment.diffaug import blur

    for name in case.group("out.blur.sigma"):
        yield f"out.blur.sigma{name}", blur(case.tensors["in.blur.x"], float(name))


def _up_block_and_skip(case: Any) -> Iterator[tuple]:
    from sdtrain.models.fastgan.networks import SkipExcitation, UpBlock

    has, state = case.tensors, case.group("sd.upblock_big.")
    block = UpBlock(state["1.weight_orig"].shape[1], state["5.weight_orig"].shape[1]).eval()
    block.load_state_dict(state)
    yield "out.upblock_big", block(has["in.x"], None, [has["in.noise1"], has["in.noise2"]])
    state = case.group("sd.se.")
    skip = SkipExcitation(state["main.1.weight_orig"].shape[1], state["main.3.weight_orig"].shape[0]).eval()
    skip.load_state_dict(state)
    stride = has["in.se.big"].shape[-1] // has["out.se"].shape[-1]
    yield "out.se", skip(has["in.se.small"], has["in.se.big"])[:, :, ::stride, ::stride]


def _down_blocks(case: Any) -> Iterator[tuple]:
    from sdtrain.models.projected.networks import DownBlock

    for output, name, separable in case.names(r"out\.(downblock_sep([01]))"):
        state = case.group(f"sd.{name}.")
        block = DownBlock(case.tensors["in.db.x"].shape[1], len(state["main.1.weight"]), separable == "1").eval()
        block.load_state_dict(state)
        yield output, block(case.tensors["in.db.x"])


def _spectral_conv(case: Any) -> Iterator[tuple]:
    from check import Skip

    from sdtrain.models.ghost import SpectralConv2d

    state, x = case.group("sd.snconv."), case.tensors["in.sn.x"]
    c_out, c_in, kernel, _ = state["weight_orig"].shape
    conv = SpectralConv2d(c_in, c_out, kernel, padding=kernel // 2)
    overwritten = torch.equal(state["weight_u"], case.tensors["after.snconv.weight_u"])
    conv.load_state_dict(_before_power_iteration(state) if overwritten else state)
    yield "out.snconv.eval", Skip(OVERWRITTEN) if overwritten else conv.eval()(x)
    yield "out.snconv.train", conv.train()(x)
    for name in case.group("after.snconv."):
        yield f"after.snconv.{name}", conv.state_dict()[name]


def _before_power_iteration(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The u from which one iteration made the stored v: v ~ W^T u has one solution when W has full row rank."""
    matrix = state["weight_orig"].flatten(1).double()
    u = torch.linalg.lstsq(matrix.T, state["weight_v"].double()[:, None]).solution[:, 0]
    return {**state, "weight_u": (u / u.norm()).float()}


def _ghost_norm(case: Any) -> Iterator[tuple]:
    from sdtrain.models.ghost import GhostBatchNorm2d

    def norm(ghost_batch: int | None) -> GhostBatchNorm2d:
        layer = GhostBatchNorm2d(x.shape[1])
        layer.load_state_dict(case.group("sd.gbn."), strict=False)  # affine only; statistics start fresh
        layer.ghost_batch = ghost_batch
        return layer.train()

    x = case.tensors["in.gbn.x"]
    ghosts = sum(name.startswith("out.gbn.running_mean_dev") for name in case.tensors)
    yield f"out.gbn.virtual{ghosts}", norm(len(x) // ghosts)(x)
    yield "out.gbn.full_batch", norm(None)(x)
    sequential = norm(None)
    for i, chunk in enumerate(x.chunk(ghosts)):
        device = norm(None)
        device(chunk)
        sequential(chunk)
        yield f"out.gbn.running_mean_dev{i}", device.running_mean
        yield f"out.gbn.running_var_dev{i}", device.running_var
    yield "out.gbn.running_mean_sequential", sequential.running_mean
    yield "out.gbn.running_var_sequential", sequential.running_var


def single_heads(case: Any) -> Iterator[tuple]:
    """Heads on their own; widths and kinds come from the stored weights."""
    from check import Skip

    for name in [n for n in case.entry["configs"] if f"in.{n}" in case.tensors]:
        state = case.group(f"sd.{name}.")
        net, x, c = single_head(state), case.tensors[f"in.{name}"], case.tensors.get(f"in.{name}_c")
        overwritten = any(int(v) for n, v in state.items() if n.endswith("num_batches_tracked"))
        for mode in ("eval", "train"):
            if f"out.{name}.{mode}" in case.tensors:
                lost = overwritten and mode == "eval"
                yield f"out.{name}.{mode}", Skip(OVERWRITTEN) if lost else net.train(mode == "train")(x, c)


def single_head(state: dict[str, Tensor]) -> nn.Module:
    """A head with the layers of an official state dict, loaded."""
    from sdtrain.models.projected.networks import SingleDisc, SingleDiscCond

    patch = any(re.fullmatch(r"main\.\d+\.main\.0\.main\.1\.running_mean", name) for name in state)
    inner = r"main\.(\d+)\.main\.0\.main\." if patch else r"main\.(\d+)\.main\."
    first = {int(m[1]): v.shape for n, v in state.items() if (m := re.fullmatch(inner + r"0\.(?:.*\.)?weight_orig", n))}
    outs = {int(m[1]): len(v) for n, v in state.items() if (m := re.fullmatch(inner + r"1\.running_mean", n))}
    separable = any(".depthwise." in name for name in state)
    widths = [state[_first_conv(state, separable)].shape[0 if separable else 1]] if first else []
    widths += [outs[i] for i in sorted(outs)]
    kinds = {"separable": separable, "patch": patch}
    if "embed.weight" not in state:
        net: nn.Module = SingleDisc(widths or [state["main.0.weight_orig"].shape[1]], **kinds)
    else:
        rows, columns = state["embed.weight"].shape
        sizes = {"num_embeddings": rows, "embedding_dim": columns, "cmap_dim": len(state["cls.weight_orig"])}
        net = SingleDiscCond(widths or [state["cls.weight_orig"].shape[1]], **kinds, **sizes)
    net.load_state_dict(state)
    return net


def _first_conv(state: dict[str, Tensor], separable: bool) -> str:
    ending = "depthwise.weight_orig" if separable else "0.weight_orig"
    return min((name for name in state if name.startswith("main.0.") and name.endswith(ending)), key=len)


def big(case: Any) -> Iterator[tuple]:
    """Full-size networks with procedural weights."""
    from sdtrain.models.fastgan.networks import Generator, GeneratorOptions
    from sdtrain.models.projected.networks import Discriminator, DiscriminatorOptions

    said = case.entry["inputs"]
    inputs = case.rnd_in_text(said)
    size, enlarged = inputs["pg.full.x"].shape[-1], None if "interp224=False" in said else 224
    options = {sep: DiscriminatorOptions(separable=sep, interpolate_to=enlarged) for sep in (False, True)}
    net = Discriminator(options[False], resolution=size).eval()
    yield from _features(case, net, inputs["pg.proj.x"])
    with torch.no_grad():
        projections = case.fill(net.feature_network, "pg")(inputs["pg.proj.x"])
        for name, sep in case.names(r"out\.multiscale\.sep([01])\.logits"):
            with torch.device("meta"):
                heads = Discriminator(options[sep == "1"], resolution=size).discriminator
            heads = case.fill(heads.to_empty(device="cpu"), "pg").eval()
            yield name, heads(projections)
    yield from _full(case, case.fill(net, "pg"), inputs["pg.full.x"])
    z = inputs["pg.bigG.z"]
    with torch.device("meta"):
        # neither the width nor the resolution of this generator is in the files: full width, size of the full D
        generator = Generator(GeneratorOptions(z_dim=z.shape[1]), resolution=size)
    generator = case.fill(generator.to_empty(device="cpu"), "pg").eval()
    with torch.no_grad():
        image = generator(z)
    stride = size // case.tensors["out.bigG.img_strided"].shape[-1]
    yield "out.bigG.img_strided", image[:, :, ::stride, ::stride]
    yield "out.bigG.stat", _stat(image)


def _features(case: Any, net: nn.Module, x: Tensor) -> Iterator[tuple]:
    features = case.fill(net.feature_network, "pg")
    with torch.no_grad():
        raw = features.pretrained(x)
        found = {"raw": raw, "proj": features.scratch(raw)}
    for kind, tensors in found.items():
        for i, tensor in enumerate(tensors):
            _, c, h, w = case.tensors[f"out.{kind}.{i}.crop"].shape
            yield f"out.{kind}.{i}.stat", _stat(tensor)
            yield f"out.{kind}.{i}.crop", tensor[:, :c, :h, :w]


def _full(case: Any, net: nn.Module, x: Tensor) -> Iterator[tuple]:
    x = x.requires_grad_()
    logits = net(x)
    yield "out.full.logits", logits
    (dx,) = torch.autograd.grad(logits.mean(), x)
    stride = x.shape[-1] // case.tensors["out.full.dx_strided"].shape[-1]
    yield "out.full.dx_strided", dx[:, :, ::stride, ::stride]
    yield "out.full.dx_norm", dx.norm()


def _stat(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.mean(), tensor.std()])


def diffaug(case: Any) -> Iterator[tuple]:
    """Every transform with its recorded draws, then the whole policy."""
    from sdtrain.augment import diffaug as d

    has, x = case.tensors, case.tensors["in.x"]
    arguments = {
        "brightness": ("u",),
        "saturation": ("u",),
        "contrast": ("u",),
        "translation": ("tx", "ty"),
        "cutout": ("ox", "oy"),
    }
    for name, transform in case.names(r"out\.([a-z]+)"):
        yield name, getattr(d, transform)(x, *(has[f"draw.{transform}.{part}"] for part in arguments[transform]))
    policy = re.search(r"policy '([a-z,]+)'", case.said("out.policy_seeded"))[1].split(",")
    parts = {"color": ("brightness", "saturation", "contrast")}
    steps = [step for name in policy for step in parts.get(name, (name,))]
    draws = [has[f"draw.policy.{i}"] for i in range(sum(len(arguments[step]) for step in steps))]
    for step in steps:
        x = getattr(d, step)(x, *(draws.pop(0) for _ in arguments[step]))
    yield "out.policy_seeded", x


def hinge(case: Any) -> Iterator[tuple]:
    from sdtrain.losses.adversarial import ADVERSARIAL

    real, fake = case.tensors["in.real_logits"], case.tensors["in.fake_logits"]
    d_real, d_fake = ADVERSARIAL["hinge"].d(real, fake)
    yield "out.G", ADVERSARIAL["hinge"].g(fake, None)
    yield "out.D_fake", d_fake
    yield "out.D_real", d_real


def keys(case: Any) -> Iterator[tuple]:
    """Names and shapes of a full-size network; the deviation is the number of entries that differ."""
    shape = {name: tuple(size) for name, size, *_ in case.json}
    with torch.device("meta"):
        net = _network_of_keys(shape)
    own = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    yield "keys", len(set(own.items()) ^ set(shape.items())), 0, 0.0


def _network_of_keys(shape: dict[str, tuple[int, ...]]) -> nn.Module:
    """Kind, widths and options read off the keys; heads are the same for all data of 128 pixels and more."""
    from sdtrain.models.projected.networks import Discriminator, DiscriminatorOptions

    if "synthesis.to_big.weight_orig" in shape:
        return _generator_of_keys(shape)
    options: dict[str, Any] = {"separable": any(".depthwise." in key and "mini_discs" in key for key in shape)}
    embeddings = [size for key, size in shape.items() if key.endswith("embed.weight")]
    if embeddings:
        options |= {"num_embeddings": embeddings[0][0], "embedding_dim": embeddings[0][1]}
    net = Discriminator(DiscriminatorOptions(**options), resolution=256, num_classes=int(bool(embeddings)))
    return net if any(key.startswith("feature_network.") for key in shape) else net.discriminator


def _generator_of_keys(shape: dict[str, tuple[int, ...]]) -> nn.Module:
    from sdtrain.models.fastgan.networks import Generator, GeneratorOptions

    z_dim, width = shape["synthesis.init.init.0.weight_orig"][:2]
    levels = [int(m[1]) for key in shape if (m := re.match(r"synthesis\.feat_(\d+)\.", key))]
    ngf, top = width // 32, shape["synthesis.to_big.weight_orig"][1]
    classes = shape.get("synthesis.embed.weight", (1,))[0]
    lite = not {"synthesis.feat_8.5.weight_orig", "synthesis.feat_8.conv2.weight_orig"} & shape.keys()
    resolution = 128 if max(levels) == 256 and top == ngf else max(levels)
    options = GeneratorOptions(z_dim=z_dim, ngf=ngf, lite=lite, num_embeddings=classes)
    return Generator(options, resolution=resolution, num_classes=classes if "synthesis.embed.weight" in shape else 0)


ADAPTERS = {
    "pg_fastgan*.safetensors": fastgan,
    "pg_units*.safetensors": units,
    "pg_singledisc*.safetensors": single_heads,
    "pg_big*.safetensors": big,
    "pg_loss*.safetensors": hinge,
    "diffaug*.safetensors": diffaug,
    "keys_pg_*.json": keys,
}
