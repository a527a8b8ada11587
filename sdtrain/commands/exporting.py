"""`sdtrain export RUN_OR_FILE`: a network for other people's tools, in one form or in all of them.

    --to DIR                       all forms, proved, with a model card: export_folder.py
    --format FORM --out FILE       one of them:
    official      state dict that the official module loads strictly: flat .pt (GANs), or .pth under params_ema / params
    safetensors   the same tensors, flat, with a card FILE.json; `sdtrain import` and every command here read it back
    spandrel      .pth that ComfyUI and chaiNNer recognise (RRDBNet, SRVGGNetCompact)
    pth           .pth under params_ema, for BasicSR programs
    pkl           a StyleGAN2 snapshot for the official program; it names that program's classes and holds none
    onnx          a graph with free batch size (also onnx-fp16, onnx-int8); needs onnx and onnxscript, is checked with
                  onnxruntime if there
    pt2           a torch.export program
    --push REPO                    the folder, to a model hub: push.py

No form but pkl contains pickled classes; the others open with torch.load(weights_only=True) or without pickle at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.errors import ConfigError
from sdtrain.files import why_unwritable
from sdtrain.release.names import FORMS, target

if TYPE_CHECKING:
    from sdtrain.interop.network import Network

ALONE = {"images": None, "calibrate": None, "unfinished": False, "licence": ""}  # what means something with --to alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_FILE",
        help="run folder, .safetensors, .pkl, .pt or .pth; to --push also an export",
    )
    what = "what to write (default: official; with --to all forms, or those named, repeatable)"
    parser.add_argument("--format", action="append", choices=tuple(FORMS), help=what)
    endings = ", ".join(f"{name}: {' or '.join(form.endings)}" for name, form in FORMS.items())
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"file to write ({endings})")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to make: all forms, proof, card, picture")
    parser.add_argument("--role", choices=("G", "D", "G_ema"), help="which network (default: the averaged generator)")
    parser.add_argument(
        "--layout", choices=("current", "legacy"), default="current", help="StyleNAT: key names of the released files"
    )
    more = parser.add_argument_group("with --to")
    more.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures to compare on (default: the run's inputs)"
    )
    more.add_argument("--calibrate", metavar="SHARDS", help="samples for onnx-int8 (default: the pictures compared on)")
    more.add_argument("--unfinished", action="store_true", help="also a run that has not ended")
    more.add_argument(
        "--licence", default="", metavar="NAME", help="for the card, as cc-by-nc-4.0 (default: not stated)"
    )
    more.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of huggingface.co")
    more.add_argument("--dry-run", action="store_true", help="with --push: say what would be uploaded")


def run(args: argparse.Namespace) -> int:
    """Returns 0; what is wrong with places and options is said before the network is read.

    Raises ConfigError for a place that cannot be written, WeightsError for a network that cannot be exported so.
    """
    check(args)
    if args.push is not None:
        from sdtrain.commands.push import require_hub

        require_hub(args.push, args.dry_run)
    if args.out is not None:
        return write_one(args)
    if args.to is not None:
        from sdtrain.commands import export_folder

        export_folder.run(args)
    if args.push is not None:
        from sdtrain.commands.push import push

        push(args.to or args.source, args.push, args.dry_run)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError unless it is one file, one folder, or a folder that is there to be pushed."""
    if (args.out is None) == (args.to is None) and (args.out is not None or args.push is None):
        raise ConfigError("say either --to DIR for everything or --out FILE for one form")
    if args.out is not None and args.format and len(args.format) > 1:
        raise ConfigError(
            f"--out {args.out} is one file, but --format names {len(args.format)}; take --to DIR for several"
        )
    unused = [f"--{name}" for name, default in ALONE.items() if args.to is None and getattr(args, name) != default]
    unused += ["--push"] if args.out is not None and args.push else []
    unused += ["--dry-run"] if args.dry_run and not args.push else []
    if unused:
        raise ConfigError(f"{', '.join(unused)}: of no use here; see sdtrain export --help for what goes with --to")
    if args.to is not None and args.layout != "current":
        raise ConfigError("--layout legacy is for one file: take it with --out FILE, and --to without it")
    if args.to is not None and args.role == "D":
        raise ConfigError("--to is for generators; write a discriminator with --role D --out FILE")


def write_one(args: argparse.Namespace) -> int:
    """One form; returns 0. Raises as `run`."""
    form = args.format[0] if args.format else "official"
    out = target(args.out, form)
    if reason := why_unwritable(out.parent):
        raise ConfigError(f"--out {args.out}: {reason}; choose another place")
    if form.startswith("onnx"):
        from sdtrain.release.graphs import require_onnx

        require_onnx()
    from sdtrain.interop.loading import load_network

    network = load_network(args.source, args.role)
    path = export(network, out, form, args.layout)
    print(f"{path}: {network.role} of {args.source} as {form}, {FORMS[form].content}")
    return 0


def export(network: Network, path: Path, form: str = "official", layout: str = "current") -> Path:
    """Write `network`; returns the path, with the ending of the form where it had none.

    Raises WeightsError for a network that the form does not fit, ConfigError for an ending that misleads.
    """
    path = target(path, form)
    from sdtrain.release.forms import Release
    from sdtrain.release.proof import write_proved

    path.parent.mkdir(parents=True, exist_ok=True)
    release = Release(network, layout)
    return write_proved(release, path, form) if form.startswith("onnx") else release.write(path, form)
