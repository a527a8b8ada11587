"""Opening a network, whatever file holds it: our tensors and card, a run folder, or an official checkpoint.

Fine-tuning, sampling, upscaling and evaluation go through `load_network`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.files import load_tensors
from sdtrain.interop.architectures import recognise
from sdtrain.interop.network import Network, Player, with_card
from sdtrain.interop.official import read_official

ROLES = ("G_ema", "G", "D")  # in the order in which a generator is chosen when none is named
OFFICIAL_SUFFIXES = (".pkl", ".pt", ".pth")


def load_network(path: Path | str, role: str | None = None, *, prefer: str = "params_ema", **changes: Any) -> Network:
    """The network of a file or run folder; `role` (G, D, G_ema) chooses among several, the averaged generator first.

    Takes our .safetensors with its card, a .safetensors of a run (read with the run's config.yaml), a run folder, or an
    official .pkl, .pt or .pth; of averaged and raw weights in one .pth, `prefer` chooses (params_ema or params).
    `changes` override options found in the file. Raises WeightsError.
    """
    path = Path(path)
    if path.is_dir():
        path = file_of_run(path, role)
    if path.suffix in OFFICIAL_SUFFIXES:
        network = _official(path, role, prefer, changes)
    else:
        network = _own(path, role)
    if role is not None and network.role != role:
        raise WeightsError(f"{path} holds {network.role}, where {role} is wanted; give the file of {role}")
    known = network.options
    return replace(network, options={**known, **changes}) if changes and known is not None else network


def _official(path: Path, role: str | None, prefer: str, changes: dict[str, Any]) -> Network:
    networks = read_official(path, prefer, **changes).networks
    chosen = role or next((name for name in ROLES if name in networks), None)
    if chosen not in networks:
        raise WeightsError(f"{path} has no {chosen}; it holds {', '.join(networks) or 'no network'}")
    return networks[chosen]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises WeightsError when it is missing or damaged."""
    from safetensors import SafetensorError

    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give a .safetensors, .pkl, .pt or .pth file or a run folder")
    try:
        return load_tensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is no complete safetensors file ({error}); copy it again") from error


def _own(path: Path, role: str | None) -> Network:
    state = read_tensors(path)
    card = path.with_suffix(".json")
    source = {"file": path.name}
    if card.is_file():
        return with_card(state, card)
    role = role or (path.stem if path.stem in ROLES else None)
    network = recognise(state, role, source)
    described = replace(network, **_of_config(path, network.player))
    # a run's configuration describes the teacher; a student of it is what its shapes say
    fits = network.note is None and not network.misfits()
    return network if fits and described.misfits() else described


def _of_config(path: Path, player: Player) -> dict[str, Any]:
    """Kind and options of a run's file from the config.yaml at most three folders above; {} outside a run."""
    folder = next((parent for parent in list(path.resolve().parents)[:3] if (parent / "config.yaml").is_file()), None)
    if folder is None:
        return {}
    from sdtrain.config.compare import to_tree
    from sdtrain.config.load import load_written

    config = to_tree(load_written(folder / "config.yaml"))
    section = dict(config.get("model", {}).get(player.lower()) or {})
    if "kind" not in section:
        return {}
    found: dict[str, Any] = {"kind": section.pop("kind"), "options": section}
    resolution = config.get("data", {}).get("resolution")
    return {**found, "resolution": resolution} if resolution and player == "Discriminator" else found


def file_of_run(folder: Path, role: str | None) -> Path:
    """The best weights of a run, or those of its newest checkpoint; G_ema unless `role` says otherwise.

    Raises WeightsError when it has saved none.
    """
    from sdtrain.engine.checkpoint import newest

    names: Sequence[str] = [role] if role else ROLES[:2]
    places = [folder / "best", folder]
    checkpoint, _ = newest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else (None, [])
    places += [checkpoint.path] if checkpoint else []
    for place in places:
        for name in names:
            if (place / f"{name}.safetensors").is_file():
                return place / f"{name}.safetensors"
    raise WeightsError(f"{folder} holds no {' or '.join(names)}.safetensors; give a run that has saved, or a file")
