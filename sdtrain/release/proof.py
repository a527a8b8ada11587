"""Each file of an export folder, opened by the program it is for, against the network as training has it.

`Case`s are inputs at two sizes, or two batches of latents; what a consumer makes of each is compared with `Outward`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.errors import WeightsError
from sdtrain.interop.loading import read_tensors
from sdtrain.interop.network import PHOTOS, Network
from sdtrain.interop.official import read_official
from sdtrain.interop.onnx_graph import open_session
from sdtrain.release.forms import Release
from sdtrain.release.graphs import installed
from sdtrain.release.outward import Outward, in_order
from sdtrain.release.pictures import cases as shots_of
from sdtrain.release.pictures import smooth_noise

TOLERANCE = 1e-3  # of float32 forms, of the largest output where that exceeds one, as a discriminator's may
LEAST_DB = 30.0  # what float16 may lose


@dataclass(frozen=True)
class Case:
    """Inputs by name, and what the network of training makes of them [N, C, H, W]."""

    name: str
    inputs: dict[str, Tensor]
    expected: Tensor


Run = Callable[[Case], Tensor]
Open = Callable[[Path, Network], Run]


def cases_of(outward: Outward, pictures: list[Tensor]) -> list[Case]:
    """Two batches that the graph was not traced with; `pictures` [N, 3, H, W] in [0, 1] for what is shown some."""
    shown: list[Tensor | None] = [*pictures] if pictures else [None, None]
    made = [outward.inputs(len(x) if x is not None else 1 + 2 * i, f"case {i}", x) for i, x in enumerate(shown)]
    with torch.no_grad():
        expected = [outward(*in_order(outward.names, inputs)) for inputs in made]
    return [Case(said(inputs), inputs, image) for inputs, image in zip(made, expected)]


def said(inputs: dict[str, Tensor]) -> str:
    """The first input, its shape: `lq 1 x 3 x 48 x 64`."""
    name, value = next(iter(inputs.items()))
    return f"{name} {' x '.join(map(str, value.shape))}"


def compare(got: Tensor, expected: Tensor, span: float) -> dict[str, float | None]:
    """max and mean difference, and psnr in dB, of two images [N, C, H, W], `span` their range; None where equal.

    Raises WeightsError for values that are not finite.
    """
    if got.shape != expected.shape or not got.isfinite().all():
        raise WeightsError(f"it gives {list(got.shape)} with values that are not finite or of another size")
    difference = (got - expected).double().abs()
    mse = float(difference.square().mean())
    psnr = round(10 * math.log10(span**2 / mse), 2) if mse else None
    return {"max": float(difference.max()), "mean": float(difference.mean()), "psnr": psnr}


def rebuilt(network: Network) -> Run:
    """The module with the tensors of a file, loaded strictly."""
    outward = Outward(network).eval()

    def run(case: Case) -> Tensor:
        with torch.no_grad():
            return outward(*in_order(outward.names, case.inputs))

    return run


def strictly(path: Path, network: Network) -> Run:
    """`safetensors` or `torch.load(weights_only=True)`, then every tensor by its official name, none left over."""
    if path.suffix == ".safetensors":
        return rebuilt(replace(network, state=read_tensors(path)))
    tree: Any = torch.load(path, weights_only=True, map_location="cpu")
    return rebuilt(replace(network, state=tree.get("params_ema", tree)))


def by_reader(path: Path, network: Network) -> Run:
    """The tensors and constructor arguments of a snapshot, as `sdtrain import` reads them."""
    return rebuilt(replace(read_official(path).networks["G_ema"], role=network.role))


def by_spandrel(path: Path, network: Network) -> Run:
    from spandrel import ImageModelDescriptor, ModelLoader

    model = ModelLoader(device="cpu").load_from_file(path)
    if not isinstance(model, ImageModelDescriptor):
        raise WeightsError(f"spandrel takes {path.name} for something that makes no image")
    model.eval()

    def run(case: Case) -> Tensor:
        with torch.no_grad():  # it takes one size at a time, and clamps
            return torch.cat([model(image[None]) for image in case.inputs["lq"]])

    return run


def by_onnxruntime(path: Path, network: Network) -> Run:
    session = open_session(path.read_bytes())

    def run(case: Case) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in case.inputs.items()})[0])

    return run


def by_torch_export(path: Path, network: Network) -> Run:
    """Only for what this process has written a moment ago: a program of somebody else is never loaded."""
    module: Any = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(case: Case) -> Tensor:
        with torch.no_grad():
            return module(*case.inputs.values())

    return run


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A program that opens a form. `package` is what must be installed, `get` how."""

    name: str
    package: str
    open: Open | None = None
    get: str = ""


STRICT = Consumer(name="strict loading", package="torch", open=strictly)
SPANDREL = Consumer(name="spandrel", package="spandrel", open=by_spandrel, get="spandrel")
RUNTIME = Consumer(name="onnxruntime", package="onnxruntime", open=by_onnxruntime, get="onnxruntime")
OFFICIAL = Consumer(
    name="stylegan2-ada-pytorch", package="stylegan2_ada", get="the authors' program, and open it there"
)
CONSUMERS = {
    "safetensors": (STRICT,),
    "official": (STRICT,),
    "spandrel": (SPANDREL,),
    "pkl": (Consumer(name="sdtrain import", package="torch", open=by_reader), OFFICIAL),
    "onnx": (RUNTIME,),
    "onnx-fp16": (RUNTIME,),
    "onnx-int8": (RUNTIME,),
    "pt2": (Consumer(name="torch.export", package="torch", open=by_torch_export),),
}


def prove(path: Path, form: str, network: Network, cases: list[Case], more: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each consumer of a file: its digest and size, and `compare` of each case or why there are none.

    `more`: spandrel opens it too. Raises WeightsError where a consumer refuses the file or makes something else of it.
    """
    data = path.read_bytes()
    about = {"file": path.name, "form": form, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for consumer in (*CONSUMERS[form], *([SPANDREL] if more else [])):
        if consumer.open is None or not installed(consumer.package):
            unproven = f"not proven here: install {consumer.get}"
            yield {**about, "consumer": consumer.name, "cases": {}, "unproven": unproven}
            continue
        version = importlib.metadata.version(consumer.package)
        yield {**about, "consumer": consumer.name, "version": version, **_rows(path, form, consumer, network, cases)}


def _rows(path: Path, form: str, consumer: Consumer, network: Network, cases: list[Case]) -> dict[str, Any]:
    assert consumer.open is not None
    span = 1.0 if network.kind in PHOTOS else 2.0
    try:
        run = consumer.open(path, network)
        found = {case.name: compare(run(case), case.expected, span) for case in cases}
    except Exception as error:  # what other programs raise for a file they do not take has no common base
        raise WeightsError(f"{consumer.name} does not take {path.name}: {error}") from error
    for case in cases:
        worst, psnr = found[case.name]["max"] or 0.0, found[case.name]["psnr"]
        if form == "onnx-fp16" and psnr is not None and psnr < LEAST_DB:
            raise WeightsError(f"{path.name} loses too much in float16: {psnr} dB on {case.name}")
        limit = TOLERANCE * max(1.0, float(case.expected.abs().max()))
        if form not in ("onnx-fp16", "onnx-int8") and worst > limit:
            raise WeightsError(f"{path.name} differs from the network by {worst:.2e} in {consumer.name}")
    return {"cases": found}


def write_proved(release: Release, path: Path, form: str) -> Path:
    """Write a graph alone and, where onnxruntime is there, compare it on smooth noise; a graph that differs is deleted.

    Raises WeightsError as `prove`.
    """
    outward = Outward(release.network).eval()
    shown = [smooth_noise(i) for i in range(4)]
    shots = shots_of(shown, outward)
    release.samples = [outward.inputs(len(x), "calibration", x) for x in shots]
    release.write(path, form)
    try:
        (row,) = prove(path, form, release.network, cases_of(outward, shots))
    except WeightsError:
        path.unlink()
        raise
    worst = max((result["max"] for result in row["cases"].values()), default=None)
    print(row["unproven"] if worst is None else f"onnxruntime agrees to {worst:.1e}")
    return path


def lines_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The proof as people read it, a line a file, consumer and case."""
    for row in rows:
        head = f"{row['file']:24}{row['consumer']:22}"
        if "unproven" in row:
            yield f"{head}{row['unproven']}"
        for name, result in row["cases"].items():
            psnr = "equal" if result["psnr"] is None else f"{result['psnr']:.1f} dB"
            yield f"{head}{name:26}max {result['max']:.1e}  mean {result['mean']:.1e}  {psnr}"
