"""A network outside a run: its weights under official names, and a card that says how to rebuild it.

    DIR/NAME.safetensors     tensors, flat
    DIR/NAME.json            the card: kind, player, role, options, resolution, num_classes, source (file, sha256, what)

`sdtrain.interop.loading` opens such a pair, a file of a run folder, or an official checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.files import save_tensors, write_json

Player = Literal["Generator", "Discriminator"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network of a file. `options` are fields of PLAYEROptions in sdtrain/models/KIND/options.py.

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

    @property
    def typed_options(self) -> Any:
        """`options` as the class of its model, defaults filled in. Raises WeightsError when it cannot be rebuilt."""
        if self.options is None:
            raise WeightsError(f"{self._said} cannot be rebuilt: {self.note}")
        try:
            return getattr(self._module(), f"{self.player}Options")(**as_tuples(self.options))
        except (ConfigError, TypeError) as error:
            raise WeightsError(f"{self._said}: {error}") from error

    def fresh(self, device: str = "cpu") -> nn.Module:
        """The untrained module; on device 'meta' it costs no memory. Raises WeightsError when it cannot be rebuilt."""
        options = self.typed_options
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                return getattr(self._module(), self.player)(options, resolution=self.resolution, **self._classes())
        except (ConfigError, TypeError) as error:
            raise WeightsError(f"{self._said}: {error}") from error

    @property
    def _said(self) -> str:
        return f"the {self.role} of {self.source.get('file', 'this file')}"

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
    """What keeps tensors of any shape from loading strictly, one phrase a tensor: its name, and [shape] twice."""
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


def load_into(net: nn.Module, state: Mapping[str, Tensor], source: str | Path = "the file") -> None:
    """Load strictly, tensors [...] by official name.

    WeightsError that names the first tensors that are missing, left over, or of another shape.
    """
    require_fit(misfits(net.state_dict(), state), str(source))
    net.load_state_dict(dict(state))


def save_network(network: Network, path: Path | str) -> Path:
    """Write PATH.safetensors and its card PATH.json, each atomically; returns the path of the tensors."""
    path = Path(path)
    path = path if path.suffix in (".safetensors", ".json") else path.with_name(path.name + ".safetensors")
    path = path.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, network.state)
    write_json(path.with_suffix(".json"), network.card)
    return path


def read_card(path: Path) -> dict[str, Any]:
    """The fields of a card. Raises WeightsError when it is none."""
    try:
        said = json.loads(path.read_text())
        # sections of a configuration carry the kind among the options
        options = {name: value for name, value in (said.get("options") or {}).items() if name != "kind"}
        return {"kind": said["kind"], **said, **({"options": options} if "options" in said else {})}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path} does not describe a network ({error!r}); mend or delete it") from error


def with_card(state: dict[str, Tensor], card: Path) -> Network:
    """The network of tensors [...] by official name and the card beside their file.

    Raises WeightsError when it is none.
    """
    said = read_card(card)
    try:
        names = {f.name for f in dataclasses.fields(Network)} - {"state"}
        said.setdefault("player", "Generator")
        said.setdefault("role", "D" if said["player"] == "Discriminator" else "G_ema")
        said.setdefault("source", {"file": card.name})
        return Network(state=state, **{name: value for name, value in said.items() if name in names})
    except (TypeError, AttributeError) as error:
        raise WeightsError(f"{card} does not describe a network ({error}); mend or delete it") from error
