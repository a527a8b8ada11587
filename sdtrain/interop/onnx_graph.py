"""An ONNX graph that `sdtrain export` has written of a network for photographs, to be run by onnxruntime on the CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.interop.budget import open_weights, quoted
from sdtrain.interop.network import PHOTOS

SCALES = (1, 2, 3, 4, 8)


class PhotoGraph:
    """[N, 3, H, W] in [0, 1] -> [N, 3, scale H, scale W] in [0, 1], both float32 on the CPU."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsError for a file that is no such graph, ConfigError where onnxruntime is missing."""
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"{path} needs {' and '.join(missing)}; pip install 'sdtrain[export]'")
        self.path = path
        file, size = open_weights(path)
        with file:
            data = file.read(size)
        self.kind, self.scale = described(path, data)
        self.session = session_of(path, data)

    def to(self, device: object) -> PhotoGraph:
        """Itself: it stays on the CPU."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 3, scale H, scale W]. Raises WeightsError where the graph does something else."""
        try:
            out = torch.from_numpy(self.session.run(None, {"lq": x.numpy()})[0])
        except Exception as error:  # onnxruntime has no common base for its errors
            raise WeightsError(f"{self.path} cannot be run ({quoted(error)}); export it again") from error
        wanted = (*x.shape[:2], x.shape[2] * self.scale, x.shape[3] * self.scale)
        if tuple(out.shape) != wanted or out.dtype != torch.float32:
            raise WeightsError(f"{self.path} makes {list(out.shape)} of {list(x.shape)}, where x{self.scale} was said")
        return out


def described(path: Path, data: bytes) -> tuple[str, int]:
    """Kind and scale as the graph's metadata has them. Raises WeightsError unless it enlarges photographs."""
    import onnx

    try:
        model = onnx.load_model_from_string(data)
        said: Any = json.loads({prop.key: prop.value for prop in model.metadata_props}.get("sdtrain", "{}"))
        kind, scale = (said.get("kind"), said.get("scale")) if isinstance(said, dict) else (None, None)
        outside = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_of(model.graph))
    except Exception as error:  # protobuf's own, and what a text that is none raises
        raise WeightsError(f"{path} is no ONNX graph ({quoted(error)}); copy it again") from error
    if outside:
        raise WeightsError(f"{path} keeps tensors in other files, which are not looked for; export it with sdtrain")
    if kind not in PHOTOS or scale not in SCALES:
        raise WeightsError(
            f"{path} holds a graph of {quoted(kind) if kind else 'another program'}, which enlarges no photographs; "
            "give one that sdtrain export has made of an RRDBNet or SRVGGNetCompact"
        )
    return kind, scale


def tensors_of(graph: Any) -> Iterator[Any]:
    """All tensors of a graph: its own, those of its steps, and of the graphs in them."""
    yield from graph.initializer
    for item in (part for node in graph.node for part in node.attribute):
        yield from (item.t, *item.tensors)
        for inner in (item.g, *item.graphs):
            yield from tensors_of(inner)


def open_session(data: bytes, provider: str = "CPUExecutionProvider", threads: int = 0) -> Any:
    """onnxruntime on a graph, `threads` as it likes where 0. Raises what onnxruntime raises for one that is none."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of each float16 product that it computes in float32
    return onnxruntime.InferenceSession(data, options, providers=[provider])


def session_of(path: Path, data: bytes) -> Any:
    """Raises WeightsError for a graph that onnxruntime refuses or whose one input is not `lq`."""
    try:
        session = open_session(data)
    except Exception as error:  # onnxruntime has no common base for its errors
        raise WeightsError(f"{path} is refused by onnxruntime ({quoted(error)}); export it again") from error
    names = [item.name for item in session.get_inputs()]
    if names != ["lq"]:
        raise WeightsError(
            f"{path} asks for {quoted(', '.join(names))}, where one picture lq is given; export it again"
        )
    return session
