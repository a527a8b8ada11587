"""Networks of official checkpoint files: which ones a file holds, their architecture, and the way back.

StyleGAN2-ADA, ProjectedGAN and R3GAN snapshots hold whole modules (G, D, G_ema), StyleNAT containers hold state dicts
(g, d, g_ema), super-resolution files one state dict. Names inside sdtrain are the official ones, so import and export
carry tensors over unchanged, bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.files import sha256_of_file
from sdtrain.interop import r3gan
from sdtrain.interop.architectures import NETWORKS, checked, recognise
from sdtrain.interop.budget import MAX_QUOTED, Budget, quoted
from sdtrain.interop.network import Network, Player, read_card
from sdtrain.interop.pickle_machine import Record
from sdtrain.interop.safe_pickle import PERSISTENT, Content, named_tensors, read_checkpoint, state_of

MODULE_ROLES = ("G", "D", "G_ema")
CONTAINER_ROLES = {"g": "G", "d": "D", "g_ema": "G_ema"}
FLAT_KEYS = ("params_ema", "params")
MAX_PLAIN = 10_000
EMPTY_MODULE = "torch.nn.modules.module.Module"


@dataclass(frozen=True)
class Official:
    """What a file holds. `extras` are plain facts beside the networks: ADA p, progress, dataset arguments."""

    networks: dict[str, Network]
    extras: dict[str, Any]
    what: str
    source: dict[str, Any]
    content: Content = field(repr=False)


def read_official(path: Path | str, prefer: str = "params_ema", **options: Any) -> Official:
    """Read a .pkl, .pt or .pth file; `options` override what it says or does not say. Raises WeightsError.

    Of averaged and raw weights under params_ema and params, `prefer` chooses; a file with only one kind gives that.
    """
    return official_of(read_checkpoint(path), Path(path), prefer, **options)


def official_of(content: Content, path: Path, prefer: str = "params_ema", **options: Any) -> Official:
    """`read_official` of a file that has been read. Raises WeightsError."""
    tree = content.tree
    if not isinstance(tree, dict):
        raise WeightsError(f"{path} holds a {type(tree).__name__}, where networks are expected; give a checkpoint")
    source = {"file": path.name, "sha256": sha256_of_file(path)}
    modules = {role: tree[role] for role in MODULE_ROLES if is_module(tree.get(role))}
    if modules:
        return _snapshot(modules, content, source, options)
    held = tree.get("state_dicts", tree)
    if isinstance(held, dict) and any(is_state(held.get(name)) for name in CONTAINER_ROLES):
        return _container(held, content, source, options)
    return _flat(path, prefer, content, source, options)


def is_module(value: Any) -> bool:
    """Whether it is a network; torch's Module itself only fills a place that must not be empty."""
    return isinstance(value, Record) and value.name != EMPTY_MODULE


def is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, Tensor) for tensor in value.values())


def _snapshot(
    modules: Mapping[str, Record], content: Content, source: dict[str, Any], options: dict[str, Any]
) -> Official:
    """StyleGAN2-ADA (modules with constructor arguments), ProjectedGAN or R3GAN (modules by class)."""
    style = all(module.name.startswith(PERSISTENT) for module in modules.values())
    what = "StyleGAN2-ADA snapshot" if style else "ProjectedGAN snapshot"
    read = _stylegan2 if style else _projected
    what, read = (r3gan.WHAT, _r3gan) if r3gan.is_snapshot(modules) else (what, read)
    source = {**source, "what": what}
    resolution = next((r for m in modules.values() if (r := _whole(m, "img_resolution"))), None)
    networks = {
        role: read(role, module, content.budget, source, options, resolution) for role, module in modules.items()
    }
    extras = {quoted(name): plain(value) for name, value in content.tree.items() if name not in MODULE_ROLES}
    pipe = content.tree.get("augment_pipe")
    if isinstance(pipe, Record):
        extras["augment_pipe"] = plain(pipe.attributes.get("_init_kwargs", {}))
        extras["ada_p"] = _ada_p(source["file"], state_of(content.budget, pipe).get("p"))
    return Official(networks, extras, what, source, content)


def _ada_p(file: str, p: Tensor | None) -> float | None:
    """ADA's probability. Raises WeightsError for anything but one number from 0 on."""
    if p is None:
        return None
    value = float(p) if p.numel() == 1 else math.nan
    if not 0 <= value < math.inf:
        raise WeightsError(f"{file}: ADA's p is no single probability; the file is damaged")
    return value


def _whole(module: Record, name: str) -> int | None:
    """An attribute that is a whole number, None where it is anything else."""
    value = module.attributes.get(name)
    return value if type(value) is int else None


def _stylegan2(
    role: str, module: Record, budget: Budget, source: dict[str, Any], options: dict[str, Any], _: Any
) -> Network:
    from sdtrain.models.stylegan2.networks import official_discriminator_options, official_generator_options

    kwargs = plain(module.attributes.get("_init_kwargs"))
    state = state_of(budget, module)
    if not isinstance(kwargs, dict) or not state:
        raise WeightsError(f"{source['file']}: {role} lacks its constructor arguments or tensors; the file is damaged")
    read = official_discriminator_options if role == "D" else official_generator_options
    own = {name: value for name, value in options.items() if role != "D" or name == "low_precision"}
    player: Player = "Discriminator" if role == "D" else "Generator"
    try:
        sizes = {"resolution": kwargs["img_resolution"], "num_classes": kwargs["c_dim"]}
        network = Network(kind="stylegan2", player=player, role=role, state=state, source=source,
                          options=read(kwargs, **own), **sizes)  # fmt: skip
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{source['file']}: {role} cannot be rebuilt ({quoted(error)})") from error
    return checked(dataclasses.replace(network, options=dataclasses.asdict(network.typed_options)))


def _projected(
    role: str, module: Record, budget: Budget, source: dict[str, Any], options: dict[str, Any], resolution: Any
) -> Network:
    state = state_of(budget, module)
    changes: dict[str, Any] = {"resolution": resolution}
    own = dict(options) if role != "D" else {}
    if role == "D":
        own["interpolate_to"] = 224 if module.attributes.get("interp224") is True else None
    changes["num_classes"] = _whole(module, "c_dim") or None
    return recognise(state, role, source, options=own, **changes)


def _r3gan(
    role: str, module: Record, budget: Budget, source: dict[str, Any], options: dict[str, Any], _: Any
) -> Network:
    """Number formats stand in the modules, everything else in the shapes."""
    low = r3gan.low_precision_res(budget, module, upwards=role != "D")
    return recognise(state_of(budget, module), role, source, options={"num_low_precision_res": low, **options})


def _container(held: Mapping[str, Any], content: Content, source: dict[str, Any], options: dict[str, Any]) -> Official:
    """StyleNAT: new files keep state dicts below `state_dicts`, old ones at the top."""
    source = {**source, "what": "StyleNAT checkpoint"}
    arguments = plain(content.tree.get("args"))
    networks = {}
    for name, role in CONTAINER_ROLES.items():
        if is_state(held.get(name)):
            tensors = named_tensors(source["file"], held[name])
            own = {**_said(arguments), **options} if role != "D" else {}
            known = any(mark in tensors or f"module.{mark}" in tensors for mark in NETWORKS)
            networks[role] = recognise(tensors, role, source, options=own) if known else _unknown(tensors, role, source)
    return Official(networks, {"args": arguments}, source["what"], source, content)


def _unknown(tensors: dict[str, Tensor], role: str, source: dict[str, Any]) -> Network:
    """Tensors in a known container whose names belong to no network here."""
    player: Player = "Discriminator" if role == "D" else "Generator"
    note = f"its tensors ({quoted(', '.join(list(tensors)[:3]))}) are not those of a StyleNAT {player.lower()}"
    return Network(kind="stylenat", player=player, role=role, state=tensors, source=source, note=note)


def _said(arguments: Any) -> dict[str, Any]:
    """Kernels and dilations of a StyleNAT checkpoint's own arguments, wherever they stand."""
    found: dict[str, Any] = {}
    waiting = [arguments]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node.values()
            for name in ("kernels", "dilations"):
                if isinstance(node.get(name), list) and node[name]:
                    found[name] = [sizes if isinstance(sizes, list) else [sizes] for sizes in node[name]]
    return found


def _flat(path: Path, prefer: str, content: Content, source: dict[str, Any], options: dict[str, Any]) -> Official:
    """One state dict, bare or under params_ema / params; the card beside an export knows what shapes do not."""
    tree, card = content.tree, path.with_suffix(".json")
    key = next((name for name in (prefer, *FLAT_KEYS) if is_state(tree.get(name))), None)
    state = named_tensors(source["file"], tree[key] if key else tree)
    if not state:
        first = quoted(", ".join(map(str, itertools.islice(tree, 4)))) or "nothing"
        raise WeightsError(
            f"{path} holds no weights; its top level has {first}, where params_ema or params is expected"
        )
    what = f"state dict ({key})" if key else "state dict"
    source = {**source, "what": what}
    said: dict[str, Any] = {}
    if card.is_file():
        said = read_card(card)
        source["origin"] = said.get("source", {})
    known = {name: said.get(name) for name in ("resolution", "num_classes")}
    network = recognise(state, said.get("role"), source, options={**(said.get("options") or {}), **options}, **known)
    if said and said["kind"] != network.kind:
        raise WeightsError(
            f"{card} describes {quoted(said['kind'])}, and the tensors are {network.kind}'s; mend or delete it"
        )
    return Official({network.role: network}, {}, what, network.source, content)


def plain(value: Any, depth: int = 8, budget: list[int] | None = None) -> Any:
    """JSON of a tree: small tensors become numbers, records their attributes, the rest a short description."""
    budget = [MAX_PLAIN] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        return "..."
    if isinstance(value, Record):
        public = ((name, part) for name, part in value.attributes.items() if not name.startswith("_"))
        return _plain_table(public, depth, budget)
    if isinstance(value, dict):
        return _plain_table(value.items(), depth, budget)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(part, depth - 1, budget) for part in itertools.islice(value, max(budget[0], 0))]
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"tensor {list(value.shape)} {value.dtype}"
    if isinstance(value, str):
        return value if len(value) <= MAX_QUOTED else quoted(value)
    return value if isinstance(value, (int, float, bool, type(None))) else f"({type(value).__name__})"


def _plain_table(items: Iterable[tuple[Any, Any]], depth: int, budget: list[int]) -> dict[str, Any]:
    shown = itertools.islice(items, max(budget[0], 0))
    return {quoted(key): plain(part, depth - 1, budget) for key, part in shown}
