"""Which super-resolution network a state dict belongs to, from names and shapes alone, and refusing the wrong one."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from sdtrain.errors import WeightsError

NAMES = {"rrdbnet": "RRDBNet", "srvgg": "SRVGGNetCompact", "unet_sn": "UNetDiscriminatorSN", "gcfsr": "GCFSR"}


def options_of(kind: str, player: str, **values: Any) -> Any:
    """GeneratorOptions or DiscriminatorOptions of a model file, with these values."""
    return getattr(importlib.import_module(f"sdtrain.models.{kind}.options"), f"{player}Options")(**values)


@dataclass(frozen=True)
class Found:
    """A network recognised in a file."""

    kind: str  # module in sdtrain/models
    player: Literal["Generator", "Discriminator"]
    options: Any  # GeneratorOptions or DiscriminatorOptions of that module
    resolution: int | None = None  # output side, where the network has one

    def __str__(self) -> str:
        shown = {"scale", "upscale", "num_feat", "num_grow_ch", "num_block", "num_conv", "narrow", "num_style_feat"}
        values = {k: v for k, v in dataclasses.asdict(self.options).items() if k in shown}
        size = [f"{self.resolution} px"] if self.resolution else []
        name = f"{NAMES[self.kind]} {self.player.lower()}"
        return f"{name} ({', '.join([*size, *(f'{k} {v:g}' for k, v in values.items())])})"

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        module = importlib.import_module(f"sdtrain.models.{self.kind}.networks")
        return getattr(module, self.player)(self.options, resolution=self.resolution)


def detect(state: Mapping[str, Tensor], path: str | Path = "the file") -> Found:
    """Which network a state dict belongs to; WeightsError when it is none of those known here."""
    for mark, recognise in RECOGNISERS.items():
        if mark in state:
            try:
                return recognise(state)
            except (KeyError, IndexError) as error:
                raise WeightsError(f"{path} begins like {recognise.__doc__} but lacks the tensor {error}") from error
    first = ", ".join(list(state)[:3])
    known = ", ".join(NAMES.values())
    raise WeightsError(f"{path} holds no network known here ({known}); its first tensors are {first}")


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))


def _rrdbnet(state: Mapping[str, Tensor]) -> Found:
    """RRDBNet"""
    folded = state["conv_first.weight"].shape[1]
    out = state["conv_last.weight"].shape[0]
    times = max(1, round((folded / out) ** 0.5))
    options = options_of(
        "rrdbnet",
        "Generator",
        num_in_ch=folded // times**2,
        num_out_ch=out,
        scale=4 // times,
        num_feat=state["conv_first.weight"].shape[0],
        num_block=_count(state, "body."),
        num_grow_ch=state["body.0.rdb1.conv1.weight"].shape[0],
    )
    return Found("rrdbnet", "Generator", options)


def _srvgg(state: Mapping[str, Tensor]) -> Found:
    """SRVGGNetCompact"""
    last = _count(state, "body.") - 1
    slope = state.get("body.1.weight")
    if slope is None or slope.ndim != 1:
        raise WeightsError("a SRVGGNetCompact without PReLU does not say which activation it has; configure act_type")
    first = state["body.0.weight"]
    options = options_of(
        "srvgg",
        "Generator",
        num_in_ch=first.shape[1],
        num_out_ch=first.shape[1],
        num_feat=first.shape[0],
        num_conv=last // 2 - 1,
        upscale=round((state[f"body.{last}.weight"].shape[0] / first.shape[1]) ** 0.5),
    )
    return Found("srvgg", "Generator", options)


def _unet_sn(state: Mapping[str, Tensor]) -> Found:
    """UNetDiscriminatorSN"""
    num_feat, num_in_ch = state["conv0.weight"].shape[:2]
    options = options_of("unet_sn", "Discriminator", num_feat=num_feat, num_in_ch=num_in_ch)
    return Found("unet_sn", "Discriminator", options)


def _gcfsr_g(state: Mapping[str, Tensor]) -> Found:
    """GCFSR's generator"""
    resolution = 2 ** (_count(state, "condition_scale1.") + 3)
    narrow = state["final_conv.0.weight"].shape[0] / 512
    options = options_of(
        "gcfsr",
        "Generator",
        num_style_feat=state["to_rgb1.modulated_conv.modulation.weight"].shape[1],
        channel_multiplier=_multiplier(state["conv_body_first.0.weight"].shape[0], resolution, narrow),
        narrow=narrow,
        factor_max=32 if resolution == 512 else 64,
        blind=state["final_down2.1.weight"].shape[0] == state["final_conv.0.weight"].shape[0],
    )
    return Found("gcfsr", "Generator", options, resolution)


def _gcfsr_d(state: Mapping[str, Tensor]) -> Found:
    """GCFSR's discriminator"""
    resolution = 2 ** (_count(state, "conv_body.") + 1)
    c_out, c_in = state["final_conv.0.weight"].shape[:2]
    narrow = c_out / 512
    options = options_of(
        "gcfsr",
        "Discriminator",
        channel_multiplier=_multiplier(state["conv_body.0.0.weight"].shape[0], resolution, narrow),
        narrow=narrow,
        stddev_group=4 * (c_in - c_out),
    )
    return Found("gcfsr", "Discriminator", options, resolution)


def _multiplier(width: int, resolution: int, narrow: float) -> int:
    return 2 if resolution < 64 else max(1, round(width * resolution / (16384 * narrow)))


RECOGNISERS = {
    "conv9.weight": _unet_sn,
    "condition_scale1.0.weight": _gcfsr_g,
    "conv_body.1.skip.1.weight": _gcfsr_d,
    "body.0.rdb1.conv1.weight": _rrdbnet,
    "body.0.weight": _srvgg,
}


def require(
    path: str | Path,
    found: Found,
    *,
    player: Literal["Generator", "Discriminator"] = "Generator",
    kind: str | None = None,
    options: Any = None,
    resolution: int | None = None,
) -> None:
    """WeightsError, naming both sides, unless `found` is the wanted player and, where given, kind, options and size."""
    if found.player != player:
        raise WeightsError(
            f"{path} holds a {found}, but a {player.lower()} is needed here; give the {player.lower()}'s file"
        )
    if kind is not None and found.kind != kind:
        raise WeightsError(
            f"{path} holds a {found}, but the configuration asks for {NAMES.get(kind, kind)}; change one"
        )
    if resolution is not None and found.resolution not in (None, resolution):
        raise WeightsError(f"{path} holds a {found}, but the configuration asks for {resolution} px; change one")
    for field in dataclasses.fields(found.options) if options is not None else ():
        has, wants = getattr(found.options, field.name), getattr(options, field.name, None)
        if wants is not None and not _same(field.name, has, wants):
            raise WeightsError(
                f"{path} holds a {found}, but the configuration asks for {field.name} {wants}; "
                f"set {field.name}: {has} or give another file"
            )


def _same(name: str, has: Any, wants: Any) -> bool:
    # a file shows whole channels: 1/3 of 512 reads back as 170/512
    widths = int(512 * has) == int(512 * wants) if name == "narrow" else has == wants
    return widths or name in NOT_IN_FILES


# options that leave no trace in names and shapes, so a file cannot contradict them
NOT_IN_FILES = {"skip_connection", "act_type", "factor_max", "stddev_group"}
