"""Fine-tuning: G, G_ema and D of a fresh run start from weights that exist (SD-GAN paper, Sec. 4.1).

`init.source` is a run folder (its newest checkpoint, where the three belong together), a checkpoint folder, one of our
.safetensors files, or an official .pkl, .pt or .pth. Optimizers, the clock, the mean path length and, unless told
otherwise, ADA's p start afresh, as the official StyleGAN2-ADA does on `--resume`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.contracts import Method, Net
from sdtrain.errors import WeightsError
from sdtrain.files import read_json
from sdtrain.interop.loading import OFFICIAL_SUFFIXES, load_network
from sdtrain.interop.network import Network, as_tuples

FRESH = "fresh"
SECTIONS = {"G": "generator", "G_ema": "generator", "D": "discriminator"}


@dataclass(frozen=True)
class Initial:
    """What networks start from. `described` is for the plan and environment.json: role -> place, sha256, what."""

    states: dict[str, Mapping[str, Tensor]] = field(repr=False)
    described: dict[str, dict[str, Any]]
    ada_p: float | None = None  # None = as configured


def wanted(config: Any) -> bool:
    init = getattr(config, "init", None)
    return init is not None and any((init.source, init.G, init.G_ema, init.D))


def read_initial(config: Any, resolution: int, num_classes: int) -> Initial | None:
    """Read and check everything that `init` names; None when it names nothing.

    Raises `WeightsError`, one sentence: a file that is missing or damaged, a role it does not hold, a tensor whose
    shape is not that of the configured network (both shapes), a number of classes that is not that of the data.
    """
    if not wanted(config):
        return None
    states: dict[str, Mapping[str, Tensor]] = {}
    described: dict[str, dict[str, Any]] = {}
    for role in SECTIONS:
        path = _place(config.init, role)
        if path is None:
            described[role] = {"source": "a copy of G" if role == "G_ema" else "the seed"}
            continue
        network = _fitting(_read(path, role), path, role, config, resolution, num_classes)
        states[role] = network.state
        described[role] = _described(network, path)
    if "G_ema" not in states and "G" in states:
        states["G_ema"] = states["G"]
    return Initial(states, described, _kept_p(config.init))


def apply_initial(initial: Initial, nets: Mapping[str, Net], method: Method) -> None:
    """Put the weights into the networks of a fresh run. A frozen feature network keeps the tensors of `weights`."""
    for role, state in initial.states.items():
        wanted = nets[role].state()
        nets[role].load({name: value for name, value in state.items() if name in wanted}, f"init.{role}")
    if initial.ada_p is not None:
        method.load_state({**method.state(), "p": initial.ada_p})


def _place(init: Any, role: str) -> Path | None:
    """The file or folder of a role, None where it starts fresh."""
    given = getattr(init, role) or init.source
    return None if given is None or given == FRESH else Path(given)


def _read(path: Path, role: str) -> Network:
    """G_ema falls back to G and G to G_ema where the place holds only one of them."""
    try:
        return _player(path, role)
    except WeightsError as error:
        other = {"G": "G_ema", "G_ema": "G"}.get(role)
        if other is None:
            raise WeightsError(f"init.D: {error}; or set init.D: {FRESH} to train a new discriminator") from error
        try:
            return _player(path, other)
        except WeightsError:
            raise WeightsError(f"init.{role}: {error}") from error


def _player(path: Path, role: str) -> Network:
    network = load_network(_file(path, role), role)
    if network.player.lower() != SECTIONS[role]:
        found = network.player.lower()
        raise WeightsError(f"{path} holds a {found}, where a {SECTIONS[role]} is wanted; give its file")
    return network


def _file(path: Path, role: str) -> Path:
    """Inside a run folder the newest checkpoint; inside a folder of networks the file of the role."""
    if not path.is_dir():
        return path
    from sdtrain.engine.checkpoint import newest

    checkpoint = newest(path / "checkpoints")[0] if (path / "checkpoints").is_dir() else None
    file = (checkpoint.path if checkpoint else path) / f"{role}.safetensors"
    if not file.is_file():
        raise WeightsError(f"{path} holds no {role}.safetensors; give a run that has saved, a checkpoint or a file")
    return file


def _fitting(network: Network, path: Path, role: str, config: Any, resolution: int, num_classes: int) -> Network:
    """The network with the configured options, which its tensors must fit. Raises WeightsError."""
    section = getattr(config.model, SECTIONS[role])
    if network.kind != section.kind:
        raise WeightsError(
            f"init.{role}: {path} holds a network of kind {network.kind}, where model.{SECTIONS[role]}.kind is "
            f"{section.kind}; take a configuration of that kind, or another file"
        )
    if network.num_classes != num_classes:
        raise WeightsError(
            f"init.{role}: {path} was trained with {_classes(network.num_classes)}, and the data has "
            f"{_classes(num_classes)}; label embeddings cannot be carried over: pack the data "
            f"{'without' if num_classes else 'with these'} labels, or give another file"
        )
    options = {name: value for name, value in vars(section).items() if name != "kind"}
    wanted = replace(network, options=options, resolution=resolution, note=None)
    found = wanted.misfits()
    if found:
        made_for = f" (it was made for {network.resolution} px, the run has {resolution})"
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise WeightsError(
            f"init.{role}: {path} does not fit the configured network: it {_shapes_first(found)}{more}"
            f"{made_for if network.resolution not in (None, resolution) else ''}; "
            f"set data.resolution and model.{SECTIONS[role]} to what the file was trained with"
        )
    return replace(wanted, source={**network.source, "differs": _differences(network, options)})


def _classes(number: int) -> str:
    return f"{number} classes" if number else "no labels"


def _shapes_first(found: list[str]) -> str:
    """A tensor that both have, with two shapes, says more than one that is absent."""
    return next((text for text in found if text.startswith("has") and ", the network [" in text), found[0])


def _differences(network: Network, options: dict[str, Any]) -> dict[str, str]:
    """Options that leave no trace in shapes and are not what the file says: worth a line in the plan."""
    said = as_tuples(network.options or {})
    return {name: f"{said[name]} -> {value}" for name, value in options.items() if name in said and said[name] != value}


def _described(network: Network, path: Path) -> dict[str, Any]:
    from sdtrain.files import sha256_of_file

    file = path if path.is_file() else _file(path, network.role)
    told = {"source": str(path), "holds": network.role, "sha256": sha256_of_file(file)}
    if file != path:
        told["file"] = str(file)
    return {**told, "differs": network.source["differs"]} if network.source["differs"] else told


def _kept_p(init: Any) -> float | None:
    """ADA's p of the source when it is to be kept. Raises WeightsError when the source does not say."""
    if init.ada_p == "reset":
        return None
    path = Path(init.source)
    p = _p_of_run(path) if path.is_dir() else _p_of_file(path)
    if p is None:
        raise WeightsError(f"init.ada_p: {path} does not say ADA's p; set init.ada_p: reset and augment.p")
    return p


def _p_of_file(path: Path) -> float | None:
    from sdtrain.interop.official import read_official

    return read_official(path).extras.get("ada_p") if path.suffix in OFFICIAL_SUFFIXES else None


def _p_of_run(path: Path) -> float | None:
    state = _file(path, "G").parent / "state.json"
    if not state.is_file():
        return None
    try:
        p = read_json(state)["method"].get("p")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"init.ada_p: {state} is no state of a run; set init.ada_p: reset and augment.p") from error
    return float(p) if type(p) in (int, float) and 0 <= p <= 1 else None
