"""`sdtrain export RUN_OR_FILE --format FORM --out FILE`: a network for other people's tools.

    official      state dict that the official module loads strictly: flat .pt (GANs), or .pth under params_ema / params
    safetensors   the same tensors, flat, with a card FILE.json; `sdtrain import` and every command here read it back
    spandrel      .pth that ComfyUI and chaiNNer recognise (RRDBNet, SRVGGNetCompact)
    pth           .pth under params_ema, for BasicSR programs
    onnx          a graph with free batch size; needs onnx and onnxscript, is checked with onnxruntime if there

No form contains pickled classes; every file opens with torch.load(weights_only=True).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.errors import ConfigError, WeightsError
from sdtrain.files import why_unwritable

if TYPE_CHECKING:
    from torch import nn

    from sdtrain.interop.network import Network

FORMS = ("official", "safetensors", "spandrel", "pth", "onnx")
# Endings that tell the truth, the usual one first, and what stands in such a file.
SUFFIXES = {
    "official": (".pt", ".pth"),
    "safetensors": (".safetensors",),
    "spandrel": (".pth",),
    "pth": (".pth",),
    "onnx": (".onnx",),
}
CONTENT = {
    "official": "a state dict under the official names, without pickled classes",
    "safetensors": "plain tensors with a card beside them",
    "spandrel": "a state dict for tools that use spandrel",
    "pth": "a state dict under params_ema",
    "onnx": "a graph",
}
# An ending that none of these is belongs to the name, as in face-v1.5.
ENDINGS = {*sum(SUFFIXES.values(), ()), ".pkl", ".pickle", ".ckpt", ".bin", ".npz", ".json", ".zip", ".tar", ".h5"}
SUPER_RESOLUTION = ("rrdbnet", "srvgg", "gcfsr", "unet_sn")
ONNX_TOLERANCE = 1e-3
LQ_SIDE = 32  # side of the input that a super-resolution network is traced with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="run folder, .safetensors, .pkl, .pt or .pth")
    parser.add_argument("--format", choices=FORMS, default="official", help="what to write (default: official)")
    endings = ", ".join(f"{form}: {' or '.join(SUFFIXES[form])}" for form in FORMS)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"file to write ({endings})")
    parser.add_argument("--role", choices=("G", "D", "G_ema"), help="which network (default: the averaged generator)")
    parser.add_argument(
        "--layout", choices=("current", "legacy"), default="current", help="StyleNAT: key names of the released files"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0; what is wrong with --out is said before the network is read.

    Raises ConfigError for a place that cannot be written, WeightsError for a network that cannot be exported so.
    """
    out = target(args.out, args.format)
    if reason := why_unwritable(out.parent):
        raise ConfigError(f"--out {args.out}: {reason}; choose another place")
    if args.format == "onnx":
        require_onnx()
    from sdtrain.interop.loading import load_network

    network = load_network(args.source, args.role)
    path = export(network, out, args.format, args.layout)
    print(f"{path}: {network.role} of {args.source} as {args.format}, {CONTENT[args.format]}")
    return 0


def target(path: Path, form: str) -> Path:
    """The file to write: `path`, with the ending of the form where it has none. Raises ConfigError if it misleads."""
    endings = SUFFIXES[form]
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder; name a file in it, such as {path / ('network' + endings[0])}")
    if path.suffix.lower() in endings:
        return path
    if path.suffix.lower() in ENDINGS:
        raise ConfigError(
            f"--out {path.name}: format {form} writes {CONTENT[form]}, which {path.suffix} does not say; "
            f"name it {path.with_suffix(endings[0]).name}"
        )
    return path.with_name(path.name + endings[0])


def export(network: Network, path: Path, form: str = "official", layout: str = "current") -> Path:
    """Write `network`; returns the path, with the ending of the form where it had none.

    Raises WeightsError for a network that the form does not fit, ConfigError for an ending that misleads.
    """
    if form not in FORMS:
        raise ConfigError(f"there is no export format {form!r}; choose {', '.join(FORMS)}")
    path = target(path, form)
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        from sdtrain.interop.network import save_network

        return save_network(network, path)
    if form == "onnx":
        return export_onnx(network, path)
    if form == "official":
        return export_official(network, path, layout)
    return _super_resolution(network, path, form)


def export_official(network: Network, path: Path, layout: str = "current") -> Path:
    """Flat state dict with official names, checked to load strictly, and the card FILE.json beside it.

    Raises WeightsError where `layout` legacy is asked of anything but a StyleNAT generator.
    """
    from sdtrain.files import write_json
    from sdtrain.interop.pth import save_pth

    require_whole(network)
    state = network.state
    if layout == "legacy":
        if network.kind != "stylenat" or network.player != "Generator":
            raise WeightsError(f"layout legacy is for StyleNAT generators, not for {network.kind}; leave it out")
        from sdtrain.models.stylenat.networks import to_legacy

        state = to_legacy(state)
    averaged = "params_ema" if network.player == "Generator" else "params"
    save_pth(state, path, averaged if network.kind in SUPER_RESOLUTION else None)
    write_json(path.with_suffix(".json"), network.card)
    return path


def require_whole(network: Network) -> None:
    """Raise WeightsError unless the official module would load the tensors strictly."""
    from sdtrain.interop.network import misfits, require_fit

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


def _super_resolution(network: Network, path: Path, form: str) -> Path:
    from sdtrain.interop.pth import export_student

    if network.kind not in SUPER_RESOLUTION:
        raise WeightsError(f"format {form} is for super-resolution networks, this is {network.kind}; use official")
    return export_student(network, path, "spandrel" if form == "spandrel" else "pth")


def example_inputs(network: Network, net: nn.Module, batch: int) -> dict[str, Any]:
    """Named inputs of a forward pass: z and c of a GAN, lq of a super-resolution network, images of a discriminator."""
    import torch

    from sdtrain.rng import generator

    def normal(*shape: int) -> Any:
        return torch.randn(batch, *shape, generator=generator("export", *shape))

    labels = (
        {"c": torch.eye(network.num_classes)[torch.arange(batch) % network.num_classes]} if network.num_classes else {}
    )
    if network.player == "Discriminator":
        side = network.resolution or 256
        return {"x": normal(3, side, side), **labels}
    if network.kind in SUPER_RESOLUTION:
        return {"lq": normal(3, LQ_SIDE, LQ_SIDE).sigmoid()}
    return {"z": normal(int(net.z_dim)), **labels}  # type: ignore[arg-type]


def require_onnx() -> None:
    """Raise ConfigError unless the packages that write ONNX are there."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"export to onnx needs the packages onnx and onnxscript ({error}); pip install 'sdtrain[export]'"
        ) from error


def export_onnx(network: Network, path: Path) -> Path:
    """Trace the network with torch's exporter, batch size free; compare with onnxruntime where that is installed.

    Raises WeightsError for GCFSR, whose factor the export does not offer.
    """
    import torch

    if network.kind == "gcfsr":
        raise WeightsError("GCFSR takes a factor beside the image, which the ONNX export does not offer; use official")
    require_onnx()
    net = network.build().requires_grad_(False)
    inputs = example_inputs(network, net, 2)
    free: list[dict[int, Any]] = [{0: torch.export.Dim("batch", min=1, max=4096)} for _ in inputs]
    if network.kind in SUPER_RESOLUTION and network.player == "Generator":
        free[0] |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with torch.no_grad():
        net(*inputs.values())  # what is computed once and kept (positions, masks) must not be computed in the trace
    program = torch.onnx.export(
        net,
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes=tuple(free),
        input_names=list(inputs),
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    _check_onnx(path, net, example_inputs(network, net, 3))
    return path


def _check_onnx(path: Path, net: nn.Module, inputs: dict[str, Any]) -> None:
    """Run the file at another batch size than the traced one. Raises WeightsError when the outputs differ."""
    import torch

    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    try:
        got = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    except Exception as error:  # onnxruntime has no common base for its errors
        raise WeightsError(f"{path} does not run at another batch size than it was traced with: {error}") from error
    with torch.no_grad():
        expected = net(*inputs.values())
    worst = float((torch.from_numpy(got) - expected).abs().max())
    if worst > ONNX_TOLERANCE * max(1.0, float(expected.abs().max())):
        raise WeightsError(f"{path} differs from the network by {worst:.2e} in onnxruntime; do not use it")
    print(f"onnxruntime agrees to {worst:.1e}")
