"""Writing a network in one of the forms of `names.py`, and which forms a network has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.export import ExportedProgram

from sdtrain.errors import WeightsError
from sdtrain.files import write_bytes, write_json
from sdtrain.interop.network import PHOTOS, Network, misfits, require_fit, save_network
from sdtrain.interop.pth import export_student, save_pth
from sdtrain.interop.super_resolution import SPANDREL_GROWTH
from sdtrain.models.stylenat.networks import to_legacy
from sdtrain.release import graphs
from sdtrain.release.names import FORMS
from sdtrain.release.outward import FACE, Outward
from sdtrain.release.snapshot import require_stylegan2, snapshot_bytes

Layout = Literal["current", "legacy"]
SUPER_RESOLUTION = (*PHOTOS, FACE, "unet_sn")


class Release:
    """One network on its way out: each form is written by `write`, and what several share is made once."""

    def __init__(self, network: Network, layout: str = "current", samples: Sequence[dict[str, Tensor]] = ()) -> None:
        """`samples`: inputs by name that the ranges of 8-bit activations are read from."""
        self.network, self.layout, self.samples = network, layout, samples

    @cached_property
    def traced(self) -> tuple[Outward, ExportedProgram]:
        return graphs.trace(self.network)

    @cached_property
    def graph(self) -> bytes:
        return graphs.onnx_bytes(*self.traced)

    def forms(self) -> list[str]:
        """Those that an export folder gets: `pth` is `official` of a super-resolution network."""
        if self.network.player != "Generator":
            return ["safetensors", "official"]
        found = ["safetensors", "official", "onnx", "pt2"]
        found += ["spandrel"] if needs_padding(self.network) else []
        found += ["pkl"] if self.network.kind == "stylegan2" else []
        return [*found, "onnx-fp16"]

    def require(self, form: str) -> None:
        """Raises WeightsError where the network has no such form, ConfigError where a package is missing."""
        kind = self.network.kind
        if form in ("spandrel", "pth") and kind not in SUPER_RESOLUTION:
            raise WeightsError(f"format {form} is for super-resolution networks, this is {kind}; use official")
        if form.startswith("onnx-") or form == "pt2":
            if self.network.player != "Generator":
                raise WeightsError(f"format {form} is for generators, this is {self.network.role}; use onnx")
        if form.startswith("onnx"):
            made_by_runtime = form == "onnx-int8" or form == "onnx-fp16" and kind not in graphs.HALVES
            graphs.require_onnx(*(["onnxruntime"] if made_by_runtime else []))
        if form == "onnx-int8" and kind not in PHOTOS:
            raise WeightsError(f"format onnx-int8 is for RRDBNet and SRVGGNetCompact, this is {kind}; use onnx")
        if form == "pkl":
            require_stylegan2(self.network)

    def write(self, path: Path, form: str) -> Path:
        """Write `path`, and where the form has a card FILE.json beside it. Raises as `require` does."""
        self.require(form)
        if form == "safetensors":
            return save_network(self.network, path)
        if form == "official":
            return write_official(self.network, path, self.layout)
        if form in ("spandrel", "pth"):
            return export_student(self.network, path, "spandrel" if form == "spandrel" else "pth")
        write_bytes(path, self._bytes(form))
        return path

    def _bytes(self, form: str) -> bytes:
        if form == "onnx":
            return self.graph
        if form == "onnx-fp16" and self.network.kind in graphs.HALVES:
            return graphs.onnx_bytes(*graphs.trace(self.network, half=True))
        if form == "onnx-fp16":
            return graphs.half_bytes(self.graph)
        if form == "onnx-int8":
            return graphs.int8_bytes(self.graph, self.samples)
        return graphs.pt2_bytes(self.traced[1]) if form == "pt2" else snapshot_bytes(self.network)

    def file_of(self, form: str) -> str:
        """What the file of a form is called in an export folder."""
        photos = form == "official" and self.network.kind in SUPER_RESOLUTION
        return FORMS[form].stem + (".pth" if photos else FORMS[form].endings[0])


def needs_padding(network: Network) -> bool:
    """Whether spandrel reads this RRDBNet only with zero channels added to its growth."""
    return network.kind == "rrdbnet" and network.typed_options.num_grow_ch < SPANDREL_GROWTH


def opens_in_spandrel(network: Network) -> bool:
    """Whether spandrel reads the network as it is."""
    return network.kind == "srvgg" or (
        network.kind == "rrdbnet" and network.typed_options.num_grow_ch == SPANDREL_GROWTH
    )


def write_official(network: Network, path: Path, layout: str = "current") -> Path:
    """State dict with official names, flat or under params_ema, checked to load strictly; the card FILE.json beside it.

    Raises WeightsError where `layout` legacy is asked of anything but a StyleNAT generator.
    """
    require_whole(network)
    state = network.state
    if layout == "legacy":
        if network.kind != "stylenat" or network.player != "Generator":
            raise WeightsError(f"layout legacy is for StyleNAT generators, not for {network.kind}; leave it out")
        state = to_legacy(state)
    averaged = "params_ema" if network.player == "Generator" else "params"
    save_pth(state, path, averaged if network.kind in SUPER_RESOLUTION else None)
    write_json(path.with_suffix(".json"), network.card)
    return path


def require_whole(network: Network) -> None:
    """Raise WeightsError unless the official module would load the tensors strictly."""
    if network.options is None:  # tensors of an official file that cannot be rebuilt here go back as they came
        return
    net = network.fresh("meta")
    found = misfits(net.state_dict(), network.state)
    frozen = tuple(getattr(net, "frozen_prefixes", ()))
    if frozen and found and all(text.startswith(tuple(f"lacks {prefix}" for prefix in frozen)) for text in found):
        raise WeightsError(
            f"{network.source.get('file', network.role)} leaves out the frozen {frozen[0].rstrip('.')}, which the "
            "official module has; export an imported discriminator, or G_ema"
        )
    require_fit(found, str(network.source.get("file", network.role)))
