"""What network a state dict belongs to, from tensor names and shapes alone.

Shapes do not say everything: number formats, clamps, the group of the minibatch deviation and StyleNAT's dilations
leave no trace. Those keep the official presets' values here; a card or an official file that knows better has the
last word.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.errors import UserError, WeightsError
from sdtrain.interop import r3gan
from sdtrain.interop import super_resolution as sr
from sdtrain.interop.budget import index_of, quoted
from sdtrain.interop.network import UNBUILDABLE, Network, Player, as_tuples

State = Mapping[str, Tensor]


def numbers(state: State, pattern: str) -> list[int]:
    """Sorted distinct integers that the one group of `pattern` matches in tensor names."""
    return sorted({index_of(found[1]) for name in state if (found := re.match(pattern, name))})


def _power_law(widths: Mapping[int, int]) -> dict[str, int]:
    """channel_base and channel_max with width(r) = min(base / r, max), the smallest base that fits."""
    return {"channel_base": max(r * width for r, width in widths.items()), "channel_max": max(widths.values())}


def stylegan2_generator(state: State) -> dict[str, Any]:
    levels = numbers(state, r"synthesis\.b(\d+)\.")
    c_dim = state["mapping.embed.weight"].shape[1] if "mapping.embed.weight" in state else 0
    w_dim = state["synthesis.b4.conv1.affine.weight"].shape[1]
    options = {
        "z_dim": state["mapping.fc0.weight"].shape[1] - (w_dim if c_dim else 0),
        "w_dim": w_dim,
        "mapping_layers": len(numbers(state, r"mapping\.fc(\d+)\.weight")),
        "img_channels": state["synthesis.b4.torgb.weight"].shape[0],
        **_power_law({r: state[f"synthesis.b{r}.conv1.weight"].shape[0] for r in levels}),
    }
    return {"options": options, "resolution": levels[-1], "num_classes": c_dim}


def stylegan2_discriminator(state: State) -> dict[str, Any]:
    levels = numbers(state, r"b(\d+)\.conv0\.")
    top = levels[-1]
    architecture = "resnet" if f"b{top}.skip.weight" in state else "skip" if "b4.fromrgb.weight" in state else "orig"
    c_dim = state["mapping.embed.weight"].shape[1] if "mapping.embed.weight" in state else 0
    c_out, c_in = state["b4.conv.weight"].shape[:2]
    options = {
        "architecture": architecture,
        "mbstd_channels": c_in - c_out,
        "img_channels": state[f"b{top}.fromrgb.weight"].shape[1],
        **_power_law({4: c_out, **{r: state[f"b{r}.conv0.weight"].shape[0] for r in levels}}),
    }
    if c_dim:
        options["cmap_dim"] = state["b4.out.weight"].shape[0]
        options["mapping_layers"] = len(numbers(state, r"mapping\.fc(\d+)\.weight"))
    return {"options": options, "resolution": top, "num_classes": c_dim}


def fastgan_generator(state: State) -> dict[str, Any]:
    levels = numbers(state, r"synthesis\.feat_(\d+)\.")
    first = state["synthesis.init.init.0.weight_orig"]
    last = state["synthesis.to_big.weight_orig"].shape[1]
    widths = {r: _conv_out(state, r) // 2 for r in levels}
    embed = state.get("synthesis.embed.weight")
    own_norms = len(numbers(state, r"synthesis\.init\.init\.1\.bns\.(\d+)\.")) or 1
    norm = "synthesis.feat_8.2.bns.0.weight" if own_norms > 1 else "synthesis.feat_8.2.weight"
    lite = norm in state and state[norm].numel() > 1  # the noise that stands there otherwise has one number
    if embed is not None:
        lite = "synthesis.feat_8.conv.weight_orig" in state
    options = {"z_dim": first.shape[0], "ngf": first.shape[1] // 32, "lite": lite, "own_norms": own_norms}
    # the network of 128 pixels owns the level of 256 too; the last convolution tells which level it reads
    resolution = next((r for r in levels if r >= 32 and r >= levels[-1] // 2 and widths[r] == last), levels[-1])
    if levels[-1] <= 64:
        resolution = levels[-1]
    if embed is not None:
        options["num_embeddings"] = embed.shape[0]
    return {"options": options, "resolution": resolution, "num_classes": 0 if embed is None else embed.shape[0]}


def _conv_out(state: State, r: int) -> int:
    stem = f"synthesis.feat_{r}"
    names = (f"{stem}.1.weight_orig", f"{stem}.conv1.weight_orig", f"{stem}.conv.weight_orig")
    return next(state[name] for name in names if name in state).shape[0]


def projected_discriminator(state: State) -> dict[str, Any]:
    head = "discriminator.mini_discs.0."
    block = f"{head}main.0.main."
    patch = any(name.startswith(f"{block}0.main.") for name in state)
    conv = f"{block}0.main.0." if patch else f"{block}0."
    embed = state.get(f"{head}embed.weight")
    options: dict[str, Any] = {
        "num_discs": len(numbers(state, r"discriminator\.mini_discs\.(\d+)\.")),
        "separable": f"{conv}depthwise.weight_orig" in state,
        "patch": patch,
    }
    ccm = "feature_network.scratch.layer{}_ccm.weight"
    if ccm.format(0) in state:
        widths = [state[ccm.format(i)].shape[0] for i in (0, 1)]
        options |= {"projection_width": widths[0], "expand": widths[0] != widths[1]}
    if embed is not None:
        options |= {"num_embeddings": embed.shape[0], "embedding_dim": embed.shape[1]}
        options["cmap_dim"] = state[f"{head}cls.weight_orig"].shape[0]
    return {"options": options, "resolution": 256, "num_classes": 0 if embed is None else embed.shape[0]}


def stylenat_generator(state: State) -> dict[str, Any]:
    levels = numbers(state, r"layers\.(\d+)\.")
    tables = [_bias_tables(state, level) for level in levels]
    widths = [state[f"layers.{level}.blocks.0.attn.proj.weight"].shape[0] for level in levels]
    heads = [sum(table.shape[0] for table in group) for group in tables]
    raised = [h for h, width in zip(heads, widths) if h > width // 32]
    top = 4 * 2 ** levels[-1]
    options = {
        "style_dim": state["style.1.weight"].shape[0],
        "mlp_layers": len(numbers(state, r"style\.(\d+)\.weight")),
        "channel_max": widths[0],
        "channel_multiplier": _multiplier(widths[0], widths[-1], top),
        "min_heads": raised[0] if raised else min(4, *heads),
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / widths[0],
        "kernels": [[3], *(_kernels(group) for group in tables[1:])],
        "dilations": [_ladder(level, len(group)) for level, group in zip(levels, tables)],
    }
    return {"options": options, "resolution": top, "num_classes": 0}


def _bias_tables(state: State, level: int) -> list[Tensor]:
    """The tables of a level's head groups; the two of the older layout count as the groups they are."""
    found = {name: value for name, value in state.items() if name.startswith(f"layers.{level}.blocks.0.attn.rpb")}
    return [found[name] for name in sorted(found, key=lambda name: int(re.findall(r"\d+", name)[-1]))]


def _kernels(tables: list[Tensor]) -> list[int]:
    sizes = [(table.shape[-1] + 1) // 2 for table in tables]
    return sizes[:1] if len(set(sizes)) == 1 else sizes


def _ladder(level: int, groups: int) -> list[int]:
    """The FFHQ dilations: 1 at the two lowest levels, then 1 and 2^(level - 1); [] where the groups do not fit them."""
    if groups == 1 or level < 2:
        return [1]
    return [1, 2 ** (level - 1)] if groups == 2 else []


def _multiplier(widest: int, width: int, resolution: int) -> float:
    return width * resolution / 16384 if width < widest else max(2, widest * resolution / 16384)


def stylenat_discriminator(state: State) -> dict[str, Any]:
    resolution = 2 ** (len(numbers(state, r"convs\.(\d+)\.")) + 3)
    widest, first = state["final_conv.0.weight_orig"].shape[0], state["from_rgbs.0.conv.0.weight_orig"].shape[0]
    options = {"channel_max": widest, "channel_multiplier": _multiplier(widest, first, resolution)}
    return {"options": options, "resolution": resolution, "num_classes": 0}


Row = tuple[str, Player, Callable[[State], dict[str, Any]], str]
PROJECTED: Row = ("projected", "Discriminator", projected_discriminator, "ProjectedGAN")
# the tensor that gives a network away: kind (folder of sdtrain/models), player, reader of shapes, the authors' name
NETWORKS: dict[str, Row] = {
    "synthesis.b4.const": ("stylegan2", "Generator", stylegan2_generator, "StyleGAN2"),
    "b4.conv.weight": ("stylegan2", "Discriminator", stylegan2_discriminator, "StyleGAN2"),
    "synthesis.init.init.0.weight_orig": ("fastgan", "Generator", fastgan_generator, "FastGAN (ProjectedGAN)"),
    "discriminator.mini_discs.0.main.0.main.1.bias": PROJECTED,
    "discriminator.mini_discs.0.main.0.main.2.bias": PROJECTED,
    "layers.0.blocks.0.attn.rpb": ("stylenat", "Generator", stylenat_generator, "StyleNAT"),
    "Model.AggregationLayer.Layer.weight": ("r3gan", "Generator", r3gan.generator, "R3GAN"),
    "Model.ExtractionLayer.Layer.weight": ("r3gan", "Discriminator", r3gan.discriminator, "R3GAN"),
    "final_linear.0.weight_orig": ("stylenat", "Discriminator", stylenat_discriminator, "StyleNAT"),
    "conv9.weight": ("unet_sn", "Discriminator", sr.unet_sn, "UNetDiscriminatorSN"),
    "condition_scale1.0.weight": ("gcfsr", "Generator", sr.gcfsr_generator, "GCFSR"),
    "conv_body.1.skip.1.weight": ("gcfsr", "Discriminator", sr.gcfsr_discriminator, "GCFSR"),
    "body.0.rdb1.conv1.weight": ("rrdbnet", "Generator", sr.rrdbnet, "RRDBNet"),
    "body.0.weight": ("srvgg", "Generator", sr.srvgg, "SRVGGNetCompact"),
}
NAMES = {kind: name for kind, _, _, name in NETWORKS.values()}
SHOWN = ("scale", "upscale", "num_feat", "num_block", "num_grow_ch", "num_conv", "narrow", "num_style_feat")


def recognise(state: State, role: str | None, source: dict[str, Any], **changes: Any) -> Network:
    """The network of a state dict; `changes` override fields (options, resolution, num_classes).

    Names of the older StyleNAT layout and of the first ESRGAN are brought up to date. A network that is recognised but
    has other widths than sdtrain can build is returned without options, with a note. Raises WeightsError for an unknown
    one.
    """
    try:
        return _recognised(state, role, source, changes)
    except UserError:
        raise
    except (*UNBUILDABLE, StopIteration) as error:  # names and shapes of a file can contradict each other in any way
        file = source.get("file", "the file")
        raise WeightsError(
            f"{file}: its tensors belong to no network together ({quoted(error)}); copy it again"
        ) from error


def _recognised(state: State, role: str | None, source: dict[str, Any], changes: dict[str, Any]) -> Network:
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "model.0.weight" in state:
        state = sr.from_old_esrgan(state)
    kind, player, found = _read(state, source.get("file", "the file"))
    options = {**found["options"], **(changes.pop("options", None) or {})}
    if kind == "srvgg":
        sr.require_activation(options)
    if kind == "stylenat" and player == "Generator":
        state = _current_layout(state, options, source)
    role = role or ("D" if player == "Discriminator" else "G_ema")
    fields = {**found, **{name: value for name, value in changes.items() if value is not None}, "options": options}
    return checked(Network(kind=kind, player=player, role=role, state=dict(state), source=source, **fields))


def _read(state: State, file: str) -> tuple[str, Player, dict[str, Any]]:
    """Kind, player and what shapes say. Raises WeightsError for an unknown network and for one that lacks tensors."""
    mark = next((mark for mark in NETWORKS if mark in state), None)
    if mark is None:
        known, first = ", ".join(dict.fromkeys(NAMES.values())), quoted(", ".join(list(state)[:3]))
        raise WeightsError(f"{file} holds no network known here ({known}); its first tensors are {first}")
    kind, player, read, name = NETWORKS[mark]
    try:
        return kind, player, read(state)
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{file} begins like {name} but lacks the tensor {error}") from error


def _current_layout(state: State, options: dict[str, Any], source: dict[str, Any]) -> State:
    from sdtrain.models.stylenat.networks import GeneratorOptions, from_legacy, is_legacy

    unknown = [level for level, dilations in enumerate(options["dilations"]) if not dilations]
    if unknown:
        raise WeightsError(
            f"{source.get('file', 'the file')}: a StyleNAT checkpoint does not say the dilations of levels {unknown}; "
            "give them for all levels, as in --set 'dilations=[[1],[1],[1,2,4],...]'"
        )
    if not is_legacy(state):
        return state
    own = GeneratorOptions(**as_tuples({**options, "dilations": _undoubled(options["dilations"])}))
    return from_legacy(state, own)


def _undoubled(dilations: list[list[int]]) -> list[list[int]]:
    """A level whose two groups are equal has one group in the current layout."""
    return [sizes[:1] if len(set(sizes)) == 1 else sizes for sizes in dilations]


def checked(network: Network) -> Network:
    """The network, or one without options and with a note when its tensors do not fit what sdtrain would build."""
    found = network.misfits()
    if not found:
        return network
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    note = f"its tensors do not fit models/{network.kind}: it {found[0]}{more}"
    return dataclasses.replace(network, options=None, note=note)


def title(network: Network) -> str:
    """Name, player and what tells it from its kin, for messages: `RRDBNet generator (scale 4, num_feat 64)`."""
    size = [f"{network.resolution} px"] if network.resolution else []
    told = [f"{name} {(network.options or {})[name]:g}" for name in SHOWN if name in (network.options or {})]
    shown = f" ({', '.join([*size, *told])})" if size or told else ""
    return f"{NAMES.get(network.kind, network.kind)} {network.player.lower()}{shown}"


def require(
    path: str | Path,
    network: Network,
    *,
    player: Player = "Generator",
    kind: str | None = None,
    options: Any = None,
    resolution: int | None = None,
) -> None:
    """WeightsError, naming both sides, unless it is the wanted player and, where given, kind, options and size."""
    holds = f"{path} holds a {title(network)}, but"
    if network.player != player:
        raise WeightsError(f"{holds} a {player.lower()} is needed here; give the {player.lower()}'s file")
    if kind is not None and network.kind != kind:
        raise WeightsError(f"{holds} the configuration asks for {NAMES.get(kind, kind)}; change one")
    if resolution is not None and network.resolution not in (None, resolution):
        raise WeightsError(f"{holds} the configuration asks for {resolution} px; change one")
    if network.options is None:
        raise WeightsError(f"{path}: {network.note}")
    for name, has in network.options.items():
        wants = getattr(options, name, None)
        if wants is not None and not sr.same_option(name, has, wants):
            raise WeightsError(
                f"{holds} the configuration asks for {name} {wants}; set {name}: {has} or give another file"
            )
