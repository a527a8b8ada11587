"""Networks as .pth files that other tools read (BasicSR's programs, ComfyUI, chaiNNer)."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.files import write_bytes, write_json
from sdtrain.interop.architectures import title
from sdtrain.interop.network import PHOTOS, Network
from sdtrain.interop.super_resolution import SPANDREL_GROWTH, pad_growth_to_32


def save_pth(state: Mapping[str, Tensor], path: str | Path, key: str | None = "params_ema") -> None:
    """Write tensors [...] by name, under `key` or flat, as a .pth that `torch.load(weights_only=True)` opens."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    data = io.BytesIO()
    torch.save({key: tensors} if key else tensors, data)
    write_bytes(Path(path), data.getbuffer())


def export_student(network: Network, path: str | Path, form: Literal["pth", "spandrel"] = "pth") -> Path:
    """Write a super-resolution network under params_ema: as it is, or `spandrel`, for tools that assume growth 32.

    Its card FILE.json lies beside it. Returns the path. Raises WeightsError where a form does not exist.
    """
    path, options = Path(path), dataclasses.asdict(network.typed_options)
    if form == "spandrel":
        if network.kind not in PHOTOS:
            raise WeightsError(f"a {title(network)} opens in no other tool; export it as pth or safetensors")
        if network.kind == "rrdbnet":
            network = dataclasses.replace(network, state=pad_growth_to_32(network.state))
            options["num_grow_ch"] = SPANDREL_GROWTH
    save_pth(network.state, path)
    write_json(path.with_suffix(".json"), dataclasses.replace(network, options=options).card)
    return path
