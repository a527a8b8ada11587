"""A network outside a run: its weights under official names, and a card that says how to rebuild it.

    DIR/NAME.safetensors     tensors, flat
    DIR/NAME.json            the card: kind, player, role, options, resolution, num_classes, source (file, sha256, what)

`load_network` opens such a pair, a file of a run folder, or an official checkpoint. Fine-tuning, sampling and
evaluation go through it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.files import write_bytes, write_json

Player = Literal["Generator", "Discriminator"]
ROLES = ("G_ema", "G", "D")  # in the order in which a generator is chosen when none is named
OFFICIAL_SUFFIXES = (".pkl", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of a file. `options` are fields of sdtrain/models/KIND.py's PLAYEROptions.

    `note` says why a network cannot be rebuilt here; such a one has tensors and no options.
    """

    kind: str
    player: Player
    role: str  # G, D or G_ema
    state: dict[str, Tensor] = field(repr=False)
    options: dict[str, Any] | None = None
    resolution: int | None = None
    num_classes: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def card(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "state"}
        return as_lists({name: value for name, value in values.items() if value is not None})

    def fresh(self, device: str = "cpu") -> nn.Module:
        """The untrained module; on device 'meta' it costs no memory. Raises WeightsError when it cannot be rebuilt."""
        if self.options is None:
            raise WeightsError(
                f"the {self.role} of {self.source.get('file', 'this file')} cannot be rebuilt: {self.note}"
            )
        module = self._module()
        try:
            options = getattr(module, f"{self.player}Options")(**as_tuples(self.options))
            with torch.device(device), torch.random.fork_rng(devices=[]):
                return getattr(module, self.player)(options, resolution=self.resolution, **self._classes())
        except (ConfigError, TypeError) as error:
            raise WeightsError(f"the {self.role} of {self.source.get('file', 'this file')}: {error}") from error

    def _module(self) -> ModuleType:
        """The file of sdtrain/models; a card comes from outside, so it may not name anything else."""
        here = Path(__file__).resolve().parents[1] / "models" / str(self.kind) / "networks.py"
        if not (str(self.kind).isidentifier() and here.is_file() and self.player in ("Generator", "Discriminator")):
            raise WeightsError(f"the card names the {self.player} of {self.kind!r}, which sdtrain/models does not have")
        module = importlib.import_module(f"sdtrain.models.{self.kind}.networks")
        if not hasattr(module, f"{self.player}Options"):
            raise WeightsError(f"the card names the {self.player} of {self.kind!r}, which that file does not have")
        return module

    def _classes(self) -> dict[str, int]:
        return {"num_classes": self.num_classes} if self.num_classes else {}

    def misfits(self) -> list[str]:
        """What keeps the tensors from loading strictly; a frozen part may be absent as a whole."""
        net = self.fresh("meta")
        absent = [p for p in getattr(net, "frozen_prefixes", ()) if not any(name.startswith(p) for name in self.state)]
        wanted = {name: value for name, value in net.state_dict().items() if not name.startswith(tuple(absent))}
        return misfits(wanted, self.state)

    def build(self) -> nn.Module:
        """The module with these weights, loaded strictly, on the CPU in eval mode. Raises WeightsError for a misfit."""
        require_fit(self.misfits(), str(self.source.get("file", self.role)))
        net = self.fresh()
        missing = net.load_state_dict(self.state, strict=False).missing_keys
        if missing:
            frozen = missing[0].partition(".")[0]
            raise WeightsError(
                f"{self.source.get('file', self.role)} leaves out the frozen {frozen}; build it in a run"
            )
        return net.eval()


def as_tuples(value: Any) -> Any:
    """Lists of JSON as the tuples that options hold, at every depth."""
    if isinstance(value, dict):
        return {key: as_tuples(part) for key, part in value.items()}
    return tuple(as_tuples(part) for part in value) if isinstance(value, (list, tuple)) else value


def as_lists(value: Any) -> Any:
    """The inverse of `as_tuples`: what JSON gives back."""
    if isinstance(value, dict):
        return {key: as_lists(part) for key, part in value.items()}
    return [as_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


def misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from loading strictly, one phrase a tensor."""
    found = [f"lacks {name}" for name in wanted if name not in given]
    found += [f"has {name}, which the network has not" for name in given if name not in wanted]
    for name in wanted:
        if name in given and wanted[name].shape != given[name].shape:
            found.append(f"has {name} {list(given[name].shape)}, the network {list(wanted[name].shape)}")
    return found


def require_fit(found: Sequence[str], source: str) -> None:
    """Raise WeightsError, naming the first tensors that differ, unless there are none."""
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise WeightsError(
            f"{source} does not fit the network: it {'; '.join(found[:3])}{more}; "
            "use the resolution, number of classes and widths it was made with"
        )


def save_network(network: Network, path: Path | str) -> Path:
    """Write PATH.safetensors and its card PATH.json, each atomically; returns the path of the tensors."""
    from safetensors.torch import save

    path = Path(path).with_suffix(".safetensors") if Path(path).suffix in (".safetensors", ".json") else Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in network.state.items()}
    write_bytes(path, save(tensors))
    write_json(path.with_suffix(".json"), network.card)
    return path


def load_network(path: Path | str, role: str | None = None, **changes: Any) -> Network:
    """The network of a file or run folder; `role` (G, D, G_ema) chooses among several, the averaged generator first.

    Takes our .safetensors with its card, a .safetensors of a run (read with the run's config.yaml), a run folder, or an
    official .pkl, .pt or .pth. `changes` override options found in the file. Raises WeightsError.
    """
    path = Path(path)
    if path.is_dir():
        path = file_of_run(path, role)
    if path.suffix in OFFICIAL_SUFFIXES:
        network = _official(path, role, changes)
    else:
        network = _own(path, role)
    if role is not None and network.role != role:
        raise WeightsError(f"{path} holds {network.role}, where {role} is wanted; give the file of {role}")
    known = network.options
    return replace(network, options={**known, **changes}) if changes and known is not None else network


def _official(path: Path, role: str | None, changes: dict[str, Any]) -> Network:
    from sdtrain.interop.official import read_official

    networks = read_official(path, **changes).networks
    chosen = role or next((name for name in ROLES if name in networks), None)
    if chosen not in networks:
        raise WeightsError(f"{path} has no {chosen}; it holds {', '.join(networks) or 'no network'}")
    return networks[chosen]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises WeightsError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give a .safetensors, .pkl, .pt or .pth file or a run folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is no complete safetensors file ({error}); copy it again") from error


def _own(path: Path, role: str | None) -> Network:
    from sdtrain.interop.architectures import recognise

    state = read_tensors(path)
    card = path.with_suffix(".json")
    source = {"file": path.name}
    if card.is_file():
        return _with_card(state, card)
    role = role or (path.stem if path.stem in ROLES else None)
    network = recognise(state, role, source)
    described = _of_config(path, network.player)
    return replace(network, **described) if described else network


def read_card(path: Path) -> dict[str, Any]:
    """The fields of a card. Raises WeightsError when it is none."""
    try:
        said = json.loads(path.read_text())
        return {"kind": said["kind"], **said}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} does not describe a network ({error!r}); mend or delete it") from error


def _with_card(state: dict[str, Tensor], card: Path) -> Network:
    said = read_card(card)
    try:
        names = {f.name for f in dataclasses.fields(Network)} - {"state"}
        said.setdefault("player", "Generator")
        said.setdefault("role", "D" if said["player"] == "Discriminator" else "G_ema")
        return Network(state=state, **{name: value for name, value in said.items() if name in names})
    except (TypeError, AttributeError) as error:
        raise WeightsError(f"{card} does not describe a network ({error}); mend or delete it") from error


def _of_config(path: Path, player: Player) -> dict[str, Any]:
    """Kind and options of a run's file from the config.yaml at most three folders above; {} outside a run."""
    folder = next((parent for parent in list(path.resolve().parents)[:3] if (parent / "config.yaml").is_file()), None)
    if folder is None:
        return {}
    from sdtrain.config.compare import to_tree
    from sdtrain.config.load import load_config

    config = to_tree(load_config(folder / "config.yaml"))
    section = dict(config.get("model", {}).get(player.lower()) or {})
    if "kind" not in section:
        return {}
    found: dict[str, Any] = {"kind": section.pop("kind"), "options": section}
    resolution = config.get("data", {}).get("resolution")
    return {**found, "resolution": resolution} if resolution and player == "Discriminator" else found


def file_of_run(folder: Path, role: str | None) -> Path:
    """The best weights of a run, or those of its newest checkpoint; G_ema unless `role` says otherwise."""
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
