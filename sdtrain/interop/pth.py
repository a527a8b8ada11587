"""Checkpoints of super-resolution networks as other tools write and read them (BasicSR .pth, old ESRGAN, safetensors).

load_pth(path)            tensors under today's official names, whatever the file calls them
detect(state)             which network that is, with its options, from names and shapes alone
require(...)              one sentence when it is not the network that was asked for
load_into(net, state)     strict loading
export_student(...)       a student as .pth, .safetensors, or widened for tools that assume 32 growth channels
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdtrain.errors import WeightsError
from sdtrain.files import write_bytes, write_json
from sdtrain.interop.recognise import Found, detect, options_of, require

__all__ = [
    "Found",
    "detect",
    "export_student",
    "load_into",
    "load_pth",
    "open_network",
    "pad_growth_to_32",
    "require",
    "save_pth",
    "save_safetensors",
]

KEYS = ("params_ema", "params")
SPANDREL_GROWTH = 32


def load_pth(path: str | Path, prefer: Literal["params_ema", "params"] = "params_ema") -> dict[str, Tensor]:
    """The state dict of a .pth or .safetensors file, on the CPU, under official names.

    `prefer` chooses between averaged and raw weights; a file that has only the other kind gives that. A leading
    `module.` is dropped and the names of the original ESRGAN release are translated. Raises WeightsError: missing,
    damaged, or more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; give the path of a .pth or .safetensors checkpoint")
    content = _read(path)
    for key in (prefer, *KEYS):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {str(name).removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        found = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise WeightsError(
            f"{path} holds no weights: its top level has {found}, where params_ema or params is expected"
        )
    return from_old_esrgan(state) if "model.0.weight" in state else state


def _read(path: Path) -> dict[Any, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle readers raise many kinds for damaged or unsafe files
        raise WeightsError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or has more than tensors; "
            "copy it again, or convert it where it was made"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, where a dictionary of tensors is expected")
    return content


def from_old_esrgan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate `model.1.sub.B.RDBr.convI.0` and its fellows into RRDBNet's names; WeightsError for anything but x4."""
    blocks = [int(name.split(".")[3]) for name in state if name.startswith("model.1.sub.") and name.count(".") > 4]
    if not blocks or "model.10.weight" not in state:
        raise WeightsError(
            "an old ESRGAN file of another scale than 4 cannot be translated; convert it where it was made"
        )
    last = max(blocks) + 1
    plain = {"0": "conv_first", f"1.sub.{last}": "conv_body", "3": "conv_up1", "6": "conv_up2"}
    plain |= {"8": "conv_hr", "10": "conv_last"}
    renamed = {}
    for name, value in state.items():
        stem, leaf = name.removeprefix("model.").rsplit(".", 1)
        if stem not in plain:
            block, rdb, conv = stem.removeprefix("1.sub.").split(".")[:3]
            plain[stem] = f"body.{block}.{rdb.lower()}.{conv}"
        renamed[f"{plain[stem]}.{leaf}"] = value
    return renamed


def load_into(net: nn.Module, state: Mapping[str, Tensor], path: str | Path = "the file") -> None:
    """Load strictly; WeightsError that names the first tensors that are missing, left over, or of another shape."""
    wanted = net.state_dict()
    problems = [f"lacks {name}" for name in wanted if name not in state]
    problems += [f"has {name}, which the network has not" for name in state if name not in wanted]
    problems += [
        f"has {name} of shape {list(value.shape)} for {list(wanted[name].shape)}"
        for name, value in state.items()
        if name in wanted and wanted[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise WeightsError(f"{path} does not fit the network: it {'; '.join(problems[:3])}{more}")
    net.load_state_dict(dict(state))


def open_network(path: str | Path, prefer: Literal["params_ema", "params"] = "params_ema") -> tuple[nn.Module, Found]:
    """The network in a file, loaded, in eval mode. FILE.json ({"kind", "options", "resolution"}) has the last word."""
    path = Path(path)
    state = load_pth(path, prefer)
    found = _sidecar(path) or detect(state, path)
    net = found.build()
    load_into(net, state, path)
    return net.eval().requires_grad_(False), found


def _sidecar(path: Path) -> Found | None:
    card = path.with_suffix(".json")
    if not card.is_file():
        return None
    try:
        said = json.loads(card.read_text())
        player = said.get("player", "Generator")
        options = options_of(said["kind"], player, **_without_kind(said["options"]))
        return Found(said["kind"], player, options, said.get("resolution"))
    except (ValueError, KeyError, TypeError, AttributeError, ModuleNotFoundError) as error:
        raise WeightsError(
            f"{card} does not describe a network ({type(error).__name__}: {error}); mend or delete it"
        ) from error


def _without_kind(options: Mapping[str, Any]) -> dict[str, Any]:
    # sections of a configuration carry the kind among the options
    return {name: value for name, value in options.items() if name != "kind"}


def save_pth(state: Mapping[str, Tensor], path: str | Path, key: str | None = "params_ema") -> None:
    """Write tensors, under `key` or flat, as a .pth that `torch.load(weights_only=True)` opens. Atomic."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    data = io.BytesIO()
    torch.save({key: tensors} if key else tensors, data)
    write_bytes(Path(path), data.getbuffer())


def save_safetensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors flat, as other tools read them. Atomic."""
    from safetensors.torch import save

    write_bytes(Path(path), save({name: value.detach().cpu().contiguous() for name, value in state.items()}))


def pad_growth_to_32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same RRDBNet with zero channels added until 32 grow a step, the width some tools take for granted.

    The added channels stay LReLU(0) = 0 and meet zero weights, so outputs agree to rounding; cost is that of growth 32.
    """
    grow = state["body.0.rdb1.conv1.weight"].shape[0]
    if grow > SPANDREL_GROWTH:
        raise WeightsError(f"an RRDBNet with {grow} growth channels cannot be narrowed to {SPANDREL_GROWTH}")
    return {name: _padded(name, value, state, grow) for name, value in state.items()}


def _padded(name: str, value: Tensor, state: Mapping[str, Tensor], grow: int) -> Tensor:
    if ".rdb" not in name:
        return value
    step = int(name.split(".conv")[1][0])  # conv1 .. conv5 of a dense block
    width = SPANDREL_GROWTH if step < 5 else value.shape[0]
    if value.ndim == 1:
        return torch.cat([value, value.new_zeros(width - len(value))])
    nf = state["conv_first.weight"].shape[0]
    out = value.new_zeros(width, nf + (step - 1) * SPANDREL_GROWTH, *value.shape[2:])
    out[: len(value), :nf] = value[:, :nf]
    for j in range(step - 1):
        at = nf + j * SPANDREL_GROWTH
        out[: len(value), at : at + grow] = value[:, nf + j * grow : nf + (j + 1) * grow]
    return out


def export_student(
    state: Mapping[str, Tensor],
    found: Found,
    path: str | Path,
    form: Literal["pth", "safetensors", "spandrel"] = "pth",
) -> Path:
    """Write a student: `pth` (params_ema), `safetensors` (flat) or `spandrel` (.pth for tools that assume growth 32).

    FILE.json with kind, options and size lies beside it. Returns the path. WeightsError where a form does not exist.
    """
    path = Path(path)
    if form == "spandrel":
        if found.kind not in ("rrdbnet", "srvgg"):
            raise WeightsError(f"a {found} opens in no other tool; export it as pth or safetensors")
        if found.kind == "rrdbnet":
            state = pad_growth_to_32(state)
            found = dataclasses.replace(found, options=dataclasses.replace(found.options, num_grow_ch=SPANDREL_GROWTH))
    (save_safetensors if form == "safetensors" else save_pth)(state, path)
    card = {"kind": found.kind, "player": found.player, "resolution": found.resolution}
    write_json(path.with_suffix(".json"), {**card, "options": _without_kind(dataclasses.asdict(found.options))})
    return path
