"""A generator as a program without Python: torch.export's, and ONNX in float32, float16 and 8-bit integers.

Batch, and of a super-resolution network height and width, stay free. Inputs and outputs are float32 in every format.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.interop.budget import quoted
from sdtrain.interop.network import PHOTOS, Network
from sdtrain.release.outward import FACE, Outward, in_order

TRACED = 2  # samples
HALVES = (*PHOTOS, FACE, "stylegan2")  # computed in float16 as torch does; the others norm and attend in float32
PACKAGES = ("onnx", "onnxscript")


def require_onnx(*more: str) -> None:
    """Raise ConfigError unless the packages that write ONNX, and those named, are there."""
    missing = [name for name in (*PACKAGES, *more) if not installed(name)]
    if missing:
        raise ConfigError(
            f"export to onnx needs the packages {' and '.join((*PACKAGES, *more))} "
            f"({', '.join(missing)} cannot be imported); pip install 'sdtrain[export]'"
        )


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is blocked, as sys.modules[package] = None does
        return False


def trace(network: Network, half: bool = False, clamped: bool = True) -> tuple[Outward, ExportedProgram]:
    """The program of `network`, and the module it was traced from."""
    outward = Outward(network, half, clamped).eval()
    side = outward.side
    example = in_order(outward.names, outward.inputs(TRACED, "trace", torch.rand(TRACED, 3, side, side)))
    batch, fold = Dim("batch", min=1, max=4096), outward.fold
    sides = {2: Dim("height", min=1) * fold, 3: Dim("width", min=1) * fold} if fold > 1 else {}
    sides = sides or {2: Dim("height", min=1), 3: Dim("width", min=1)}
    free = {"lq": {0: batch, **sides}, "truncation_psi": {}}
    shapes = (tuple(free.get(name, {0: batch}) for name in outward.names),)
    with torch.no_grad(), quietly():
        outward(*example)  # what is computed once and kept (positions, masks) must not be computed in the trace
        program = torch.export.export(outward, example, dynamic_shapes=shapes, strict=False)
        # opens regions of full precision, which torch.export can save and not load again
        return outward, program.run_decompositions({})


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the exporters say of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def pt2_bytes(program: ExportedProgram) -> bytes:
    """The program as `torch.export.load` reads it, without the example inputs."""
    data = io.BytesIO()
    program.example_inputs = None
    with quietly():
        torch.export.save(program, data)
    return data.getvalue()


def onnx_bytes(outward: Outward, program: ExportedProgram) -> bytes:
    """The program as an ONNX file, `image` its output, with what it is among its metadata."""
    names = list(outward.names)
    try:
        with torch.no_grad(), quietly():
            made = torch.onnx.export(program, (), dynamo=True, input_names=names, output_names=["image"], verbose=False)
    except Exception as error:  # what torch's exporter raises has no common base
        why = re.search(r"No ONNX function found for [^.]*", str(error)) or re.search(r"\S[^\n]*", str(error))
        reason = why[0] if why else type(error).__name__
        raise WeightsError(
            f"torch has no ONNX for this {outward.kind} ({quoted(reason)}); use official or pt2"
        ) from error
    assert made is not None
    model = made.model_proto
    said = {"kind": outward.kind, "scale": outward.scale, "fold": outward.fold, "range": [outward.lowest, 1.0]}
    model.metadata_props.add(key="sdtrain", value=json.dumps(said))
    name_free_sides(model.graph, outward.fold)
    return model.SerializeToString()


def name_free_sides(graph: Any, fold: int) -> None:
    """Call the symbols of free dimensions what they are, in inputs and outputs: batch, height, width (of a fold)."""
    dims = graph.input[0].type.tensor_type.shape.dim
    said = {0: "batch", 2: "height", 3: "width"} if fold == 1 else {0: "batch", 2: "rows", 3: "columns"}
    names = {
        symbol[0]: name
        for axis, name in said.items()
        if axis < len(dims) and (symbol := re.search(r"s\d+", dims[axis].dim_param))
    }
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # setting it, to nothing even, takes the place of a fixed size
                dim.dim_param = re.sub(r"s\d+", lambda found: names.get(found[0], found[0]), dim.dim_param)
    del graph.value_info[:]


def half_bytes(graph: bytes) -> bytes:
    """The float32 graph with weights and most steps in float16, by onnxruntime's converter; inputs and output float32.

    Runtimes compute the statistics of a norm in float32 whatever its format is.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quietly():
        half: bytes = convert_float_to_float16(onnx.load_from_string(graph), keep_io_types=True).SerializeToString()
    return half


def int8_bytes(graph: bytes, samples: Sequence[dict[str, Tensor]]) -> bytes:
    """The float32 graph with 8-bit weights (a scale a channel) and activations, whose ranges `samples` show."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> Any:
            found = next(self.left, None)
            return found and {name: value.numpy() for name, value in found.items()}

    with tempfile.TemporaryDirectory() as folder, quietly():
        plain, small = Path(folder) / "plain.onnx", Path(folder) / "small.onnx"
        plain.write_bytes(graph)
        more: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "weight_type": QuantType.QInt8, "per_channel": True}
        quantize_static(plain, small, Reader(), activation_type=QuantType.QUInt8, op_types_to_quantize=["Conv"], **more)
        return small.read_bytes()
