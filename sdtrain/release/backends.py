"""The ways to run a network: as it is, with channels last, compiled, by ONNX Runtime, as a recorded CUDA graph.

Each takes a network, its module and example inputs, and gives what is called with such inputs in its place: for the
first three a module with the same attributes, so that a GAN's parts can be called too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.engine.compiled import parts_of
from sdtrain.interop.budget import quoted
from sdtrain.interop.network import Network
from sdtrain.interop.onnx_graph import open_session
from sdtrain.release.graphs import onnx_bytes, require_onnx, trace

Run = Callable[..., Any]
# what a compiler, an exporter or a kernel raises for a network that it cannot take
UNABLE = (RuntimeError, ValueError, TypeError, LookupError, NotImplementedError, ImportError, OSError, AssertionError)
SHAPES = 8  # programs that torch may make of one part: of an image and of a batch, with and without a graph


def made(backend: str, network: Network, net: nn.Module, inputs: Sequence[Tensor], precision: str = "fp32") -> Run:
    """`net`, a module of `network`, run by one of `names.BACKENDS`. Raises one of UNABLE where that cannot be."""
    return ALL[backend](network, net if precision == "fp32" else LowPrecision(net), inputs)


class LowPrecision(nn.Module):
    """A copy of a network in bfloat16, which takes float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).to(torch.bfloat16)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(*(x.to(torch.bfloat16) for x in inputs))


def eager(network: Network, net: nn.Module, inputs: Sequence[Tensor]) -> Run:
    return net


def channels_last(network: Network, net: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """A convolution whose weights lie so gives such maps to the next, whatever it is given."""
    return copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(network: Network, net: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """The parts that it names (`compiles`), alike ones once, else all of it; for every size."""
    import torch._dynamo.config as limits

    made = copy.deepcopy(net).requires_grad_(False)
    parts = [part for _, part in parts_of("", made)] or [made]
    limits.recompile_limit += SHAPES
    limits.accumulated_recompile_limit += SHAPES * len(parts)
    for part in parts:
        part.compile(dynamic=True)
    return made


def onnx(network: Network, net: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """ONNX Runtime on the file that `sdtrain export` writes; inputs and outputs lie on the host."""
    if isinstance(net, LowPrecision):
        raise ValueError("the exported graph is of fp32, not bf16")
    import onnxruntime

    device = inputs[0].device
    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise ValueError(f"this onnxruntime has no {wanted}")
    require_onnx()
    graph = onnx_bytes(*trace(network, clamped=getattr(net, "clamped", True)))
    session = open_session(graph, wanted, torch.get_num_threads())
    names = [one.name for one in session.get_inputs()]

    def run(*values: Tensor) -> Tensor:
        """The inputs of the network, on any device -> its output there. Raises RuntimeError where the graph fails."""
        try:
            found = session.run(None, {name: x.cpu().numpy() for name, x in zip(names, values)})[0]
        except Exception as error:  # onnxruntime has no common base for its errors
            raise RuntimeError(f"onnxruntime cannot run the network ({quoted(error)}); use another backend") from error
        return torch.from_numpy(found).to(device)

    return run


def cuda_graphs(network: Network, net: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """A graph a shape, recorded when it first comes; what they compute with lies in one memory."""
    if inputs[0].device.type != "cuda":
        raise ValueError("CUDA graphs need a GPU")
    pool = torch.cuda.graph_pool_handle()
    recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def record(values: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """A graph with the memory that it reads and writes, of inputs like `values`."""
        given, graph, aside = [x.clone() for x in values], torch.cuda.CUDAGraph(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries make their workspaces before anything is recorded
            net(*given)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, pool=pool):
            out = net(*given)
        return graph, given, out

    def run(*values: Tensor) -> Tensor:
        """The inputs of the network -> a copy of its output, on their device."""
        key = tuple(x.shape for x in values)
        if key not in recorded:
            recorded[key] = record(values)
        graph, given, out = recorded[key]
        for own, x in zip(given, values):
            own.copy_(x)
        graph.replay()
        return out.clone()  # the next graph writes over it

    return run


ALL = {
    "eager": eager,
    "channels-last": channels_last,
    "compiled": compiled,
    "onnx": onnx,
    "cuda-graphs": cuda_graphs,
}
