"""What files of super-resolution networks need to be understood, from names and shapes alone.

Readers give the options of a network; `from_old_esrgan` and `pad_growth_to_32` rename and widen RRDBNet's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.interop.budget import index_of

State = Mapping[str, Tensor]
SPANDREL_GROWTH = 32
# options that leave no trace in names and shapes, so a file cannot contradict them
NOT_IN_FILES = {"skip_connection", "act_type", "factor_max", "stddev_group"}


def _count(state: State, prefix: str) -> int:
    return 1 + max(index_of(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))


def rrdbnet(state: State) -> dict[str, Any]:
    folded = state["conv_first.weight"].shape[1]
    out = state["conv_last.weight"].shape[0]
    times = max(1, round((folded / out) ** 0.5))
    options = {
        "num_in_ch": folded // times**2,
        "num_out_ch": out,
        "scale": 4 // times,
        "num_feat": state["conv_first.weight"].shape[0],
        "num_block": _count(state, "body."),
        "num_grow_ch": state["body.0.rdb1.conv1.weight"].shape[0],
    }
    return {"options": options}


def srvgg(state: State) -> dict[str, Any]:
    last, first = _count(state, "body.") - 1, state["body.0.weight"]
    slope = state.get("body.1.weight")
    options = {
        "num_in_ch": first.shape[1],
        "num_out_ch": first.shape[1],
        "num_feat": first.shape[0],
        "num_conv": last // 2 - 1,
        "act_type": "prelu" if slope is not None and slope.ndim == 1 else None,
        "upscale": round((state[f"body.{last}.weight"].shape[0] / first.shape[1]) ** 0.5),
    }
    return {"options": options}


def require_activation(options: Mapping[str, Any]) -> None:
    """Raises WeightsError when neither the tensors nor a card tell the activation of a SRVGGNetCompact."""
    if options["act_type"] is None:
        raise WeightsError("a SRVGGNetCompact without PReLU does not say which activation it has; configure act_type")


def unet_sn(state: State) -> dict[str, Any]:
    num_feat, num_in_ch = state["conv0.weight"].shape[:2]
    return {"options": {"num_feat": num_feat, "num_in_ch": num_in_ch}}


def gcfsr_generator(state: State) -> dict[str, Any]:
    resolution = 2 ** (_count(state, "condition_scale1.") + 3)
    narrow = state["final_conv.0.weight"].shape[0] / 512
    options = {
        "num_style_feat": state["to_rgb1.modulated_conv.modulation.weight"].shape[1],
        "channel_multiplier": _multiplier(state["conv_body_first.0.weight"].shape[0], resolution, narrow),
        "narrow": narrow,
        "factor_max": 32 if resolution == 512 else 64,
        "blind": state["final_down2.1.weight"].shape[0] == state["final_conv.0.weight"].shape[0],
    }
    return {"options": options, "resolution": resolution}


def gcfsr_discriminator(state: State) -> dict[str, Any]:
    resolution = 2 ** (_count(state, "conv_body.") + 1)
    c_out, c_in = state["final_conv.0.weight"].shape[:2]
    narrow = c_out / 512
    options = {
        "channel_multiplier": _multiplier(state["conv_body.0.0.weight"].shape[0], resolution, narrow),
        "narrow": narrow,
        "stddev_group": 4 * (c_in - c_out),
    }
    return {"options": options, "resolution": resolution}


def _multiplier(width: int, resolution: int, narrow: float) -> int:
    return 2 if resolution < 64 else max(1, round(width * resolution / (16384 * narrow)))


def same_option(name: str, has: Any, wants: Any) -> bool:
    """Whether an option read from a file may be the configured one."""
    # a file shows whole channels: 1/3 of 512 reads back as 170/512
    widths = int(512 * has) == int(512 * wants) if name == "narrow" else has == wants
    return widths or name in NOT_IN_FILES


def from_old_esrgan(state: State) -> dict[str, Tensor]:
    """Translate `model.1.sub.B.RDBr.convI.0` and its fellows into RRDBNet's names; WeightsError for anything but x4."""
    blocks = [index_of(name.split(".")[3]) for name in state if name.startswith("model.1.sub.") and name.count(".") > 4]
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


def pad_growth_to_32(state: State) -> dict[str, Tensor]:
    """The same RRDBNet with zero channels added until 32 grow a step, the width some tools take for granted.

    The added channels stay LReLU(0) = 0 and meet zero weights, so outputs agree to rounding; cost is that of growth 32.
    Raises WeightsError for a network that is wider.
    """
    grow = state["body.0.rdb1.conv1.weight"].shape[0]
    if grow > SPANDREL_GROWTH:
        raise WeightsError(f"an RRDBNet with {grow} growth channels cannot be narrowed to {SPANDREL_GROWTH}")
    return {name: _padded(name, value, state, grow) for name, value in state.items()}


def _padded(name: str, value: Tensor, state: State, grow: int) -> Tensor:
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
