"""A network outside a run: its weights under official names, and a card that says how to rebuild it.

    DIR/NAME.safetensors     tensors, flat
    DIR/NAME.json            the card: kind, player, role, options, resolution, num_classes, source (file, sha256, what)

`sdtrain.interop.loading` opens such a pair, a file of a run folder, or an official checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from sdtrain.config.schema import harden
from sdtrain.errors import ConfigError, WeightsError
from sdtrain.files import save_tensors, write_json
from sdtrain.interop.budget import is_name, max_integer, max_modules, quoted
from sdtrain.interop.tensor_file import read_description

Player = Literal["Generator", "Discriminator"]
PLAYERS = ("Generator", "Discriminator")
PHOTOS = ("rrdbnet", "srvgg")  # kinds that enlarge photographs of any size
# what torch and Python raise for sizes that make no sense, as -1 channels or 7 groups of 8
UNBUILDABLE = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, AssertionError)


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
        """`options` as the class of its model, defaults filled in, before anything is built.

        Raises WeightsError when it cannot be rebuilt: options of a wrong type, or sizes that its tensors cannot have.
        """
        if self.options is None:
            raise WeightsError(f"{self._said} cannot be rebuilt: {self.note}")
        module = self._module()
        largest = max_integer(sum(tensor.numel() for tensor in self.state.values()))
        try:
            typed = _checker(getattr(module, f"{self.player}Options")).validate_json(json.dumps(self.options))
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            place = ".".join(map(str, wrong["loc"]))
            raise WeightsError(f"{self._said}: option {quoted(place)}: {quoted(wrong['msg'])}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise WeightsError(f"{self._said} has options of a wrong form ({quoted(error)})") from error
        sizes = {**dataclasses.asdict(typed), "resolution": self.resolution, "num_classes": self.num_classes}
        for name, value in sizes.items():
            if any(abs(number) > largest for number in integers(value)):
                raise WeightsError(f"{self._said} cannot have the {name} it names; its tensors are far smaller")
        return typed

    def fresh(self, device: str = "cpu") -> nn.Module:
        """The untrained module; on device 'meta' it costs no memory. Raises WeightsError when it cannot be rebuilt."""
        options = self.typed_options
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]), few_modules(max_modules(len(self.state))):
                return getattr(self._module(), self.player)(options, resolution=self.resolution, **self._classes())
        except UNBUILDABLE as error:
            raise WeightsError(f"{self._said} cannot be rebuilt: {quoted(error)}") from error

    @property
    def _said(self) -> str:
        return f"the {self.role} of {quoted(self.source.get('file', 'this file'))}"

    def _module(self) -> ModuleType:
        """The file of sdtrain/models; a card comes from outside, so it may not name anything else."""
        here = Path(__file__).resolve().parents[1] / "models" / str(self.kind) / "networks.py"
        if not (str(self.kind).isidentifier() and here.is_file() and self.player in PLAYERS):
            raise WeightsError(
                f"the card names the {quoted(self.player)} of {quoted(self.kind)!r}, which sdtrain/models does not have"
            )
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
        require_tables(net, self.state, str(self.source.get("file", self.role)))
        missing = net.load_state_dict(self.state, strict=False).missing_keys
        if missing:
            frozen = missing[0].partition(".")[0]
            raise WeightsError(
                f"{self.source.get('file', self.role)} leaves out the frozen {frozen}; build it in a run"
            )
        return net.eval()


@cache
def _checker(options: type) -> TypeAdapter:
    return TypeAdapter(harden(options))


@contextmanager
def few_modules(most: int) -> Iterator[None]:
    """Raises WeightsError, inside a constructor, when more modules and parameters than `most` come into being."""
    left = most

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConfigError("its options describe far more layers than it has tensors")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def integers(value: Any) -> Iterator[int]:
    """The whole numbers of an option, at every depth."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from integers(part)
    elif isinstance(value, int):
        yield value


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
        elif name in given and wanted[name].is_floating_point() != given[name].is_floating_point():
            found.append(f"has {name} of {given[name].dtype}, the network of {wanted[name].dtype}")
    return found


def require_fit(found: Sequence[str], source: str) -> None:
    """Raise WeightsError, naming the first tensors that differ, unless there are none."""
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise WeightsError(
            f"{source} does not fit the network: it {'; '.join(found[:3])}{more}; "
            "use the resolution, number of classes and widths it was made with"
        )


def require_tables(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsError where integer tables [...], which say what number to take, are not those of the network."""
    for name, value in net.state_dict().items():
        if name in state and value.ndim and not value.is_floating_point() and not torch.equal(value, state[name]):
            raise WeightsError(f"{source} has other numbers in {name} than every such network has; it is damaged")


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
    """The fields of a card, each of its type. Raises WeightsError when it is none."""
    said = read_description(path)
    wrong = "it is no table" if not isinstance(said, dict) else next(_wrong_fields(said), None)
    if wrong:
        raise WeightsError(f"{path} does not describe a network ({wrong}); mend or delete it")
    # sections of a configuration carry the kind among the options
    options = {name: value for name, value in (said.get("options") or {}).items() if name != "kind"}
    return {**said, **({"options": options} if "options" in said else {})}


def _wrong_fields(said: dict[str, Any]) -> Iterator[str]:
    """What a card says that is of no use, a phrase each."""
    fields: dict[str, tuple[type, ...]] = {
        "kind": (str,),
        "player": (str,),
        "role": (str,),
        "options": (dict, type(None)),
        "resolution": (int, type(None)),
        "num_classes": (int,),
        "source": (dict,),
        "note": (str, type(None)),
    }
    if "kind" not in said:
        yield "it says no kind"
    for name, types in fields.items():
        if name in said and type(said[name]) not in types:
            yield f"{name} is a {type(said[name]).__name__}"
    names = [said[name] for name in ("kind", "player", "role") if name in said]
    names += [said["source"]["file"]] if isinstance(said.get("source"), dict) and "file" in said["source"] else []
    if not all(map(is_name, names)) or said.get("player", PLAYERS[0]) not in PLAYERS:
        yield "kind, player, role and file are no names"


def with_card(state: dict[str, Tensor], card: Path) -> Network:
    """The network of tensors [...] by official name and the card beside their file.

    Raises WeightsError when it is none, or where it describes sizes that no network with these tensors has.
    """
    said = read_card(card)
    names = {f.name for f in dataclasses.fields(Network)} - {"state"}
    said.setdefault("player", "Generator")
    said.setdefault("role", "D" if said["player"] == "Discriminator" else "G_ema")
    said.setdefault("source", {"file": card.name})
    network = Network(state=state, **{name: value for name, value in said.items() if name in names})
    if network.options is not None:
        _ = network.typed_options
    return network
