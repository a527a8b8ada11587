"""`sdtrain export RUN --to DIR`: everything that others can use, proved by opening it, or nothing.

    DIR/README.md                          the model card
    DIR/export.json                        the proof: each file with size, digest and what its consumers made of it
    DIR/preview.png                        before and after
    DIR/model.safetensors  model.json      tensors and how to rebuild the network
    DIR/model.pth | model.pt               under the official names: BasicSR's layout, or a flat state dict
    DIR/model_spandrel.pth, .json          an RRDBNet with less growth than spandrel takes for granted, padded
    DIR/model.onnx  model_fp16.onnx        graphs; model_int8.onnx where asked for
    DIR/model.pt2                          a torch.export program
    DIR/model.pkl                          StyleGAN2, as official snapshots hold it

It is written under a temporary name beside DIR and renamed when all of it is proved.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain import __version__
from sdtrain.commands.export_card import PICTURE, card
from sdtrain.commands.results import planned
from sdtrain.commands.source import run_folder_of
from sdtrain.data.degrade.resize_matlab import imresize
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.reader import read_image
from sdtrain.engine.positions import saved_img
from sdtrain.errors import EXIT_OK, ConfigError, RunError, UserError
from sdtrain.files import sync_folder, why_unwritable, write_bytes, write_json
from sdtrain.interop.loading import file_of_run, load_network
from sdtrain.interop.network import PHOTOS, Network
from sdtrain.interop.super_resolution import pad_growth_to_32
from sdtrain.metrics.sr_metrics import to_uint8
from sdtrain.release import pictures
from sdtrain.release.forms import Release, needs_padding, opens_in_spandrel
from sdtrain.release.outward import Outward
from sdtrain.release.proof import cases_of, lines_of, prove

PROOF, CARD = "export.json", "README.md"
BESIDE = 8 << 20  # bytes of card, picture and graphs beside their tensors
CALIBRATED_ON = 32  # samples of a shard


def run(args: argparse.Namespace) -> int:
    """Returns 0 with DIR complete; raises UserError, and then nothing of it is there."""
    refuse_place(args.to)
    require_finished(args.source, args.unfinished)
    file = file_of_run(args.source, args.role) if args.source.is_dir() else args.source
    network = load_network(file, args.role)
    shown, where = pictures.held_back(args.source, args.images)
    outward = Outward(network).eval()
    samples = calibration(args.calibrate, outward, shown)
    release = Release(network, args.layout, samples)
    forms = args.format or release.forms()
    for form in args.format or ():
        release.require(form)
    require_room(args.to.parent, network, forms)
    with fresh_folder(args.to) as folder:
        proof: dict[str, Any] = {
            "sdtrain": __version__,
            "torch": torch.__version__,
            "network": network.card,
            "source": network.source,
            "inputs": where if network.kind in pictures.SHOWN else "latents and noise",
            "artefacts": [],
            "left_out": {},
        }
        shots = pictures.cases(shown, outward)
        write_all(folder, release, forms, cases_of(outward, shots), proof, asked=bool(args.format))
        pictures.save_preview(folder / PICTURE, pictures.preview(args.source, network, outward, shown))
        write_json(folder / PROOF, proof)
        page = card(args.to.name, args.source, file, network, outward, proof, args.licence)
        write_bytes(folder / CARD, page.encode())
    left_out = (f"left out {form}: {why}" for form, why in proof["left_out"].items())
    whole = f"{network.role} of {args.source}, compared on {proof['inputs']}"
    print(*lines_of(proof["artefacts"]), *left_out, sep="\n")
    print(f"{args.to}: {whole}; {CARD} says how to load each file")
    return EXIT_OK


def refuse_place(to: Path) -> None:
    """Raise ConfigError for a folder that is there, or that cannot be made."""
    if os.path.lexists(to):
        raise ConfigError(f"--to {to} exists, and nothing is written over an export; choose another name or delete it")
    if reason := why_unwritable(to.parent):
        raise ConfigError(f"--to {to}: {reason}; choose another place")


def require_finished(source: Path, unfinished: bool) -> None:
    """Raises RunError for a folder that is no run of ours, and unless allowed for a run that has not ended."""
    if not source.is_dir():
        return
    if not any((source / name).is_file() for name in ("import.json", "G_ema.safetensors", "G.safetensors")):
        folder = run_folder_of(source)
        if folder is None:
            raise RunError(f"{source} is no run of sdtrain: it has no config.yaml; give a run folder or a weights file")
        total, seen = planned(folder)[0], saved_img(folder)
        if total is not None and seen < total and not unfinished:
            raise RunError(
                f"{source} has not finished: it has saved {seen:,} of {total:,} images; train on, or say --unfinished "
                "for what it has so far"
            )


def require_room(place: Path, network: Network, forms: Sequence[str]) -> None:
    """Raise ConfigError where the disk has less room than the files will take."""
    own = sum(tensor.nbytes for tensor in network.state.values())
    padded = sum(t.nbytes for t in pad_growth_to_32(network.state).values()) if needs_padding(network) else own
    need = BESIDE + sum(padded if form == "spandrel" else own for form in forms)
    place = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise ConfigError(
            f"{place} has {free / 1e6:.0f} MB free and the export needs about {need / 1e6:.0f} MB; make room, or "
            "choose another --to or fewer forms with --format"
        )


@contextmanager
def fresh_folder(to: Path) -> Iterator[Path]:
    """A folder that takes the name `to` at the end; an exception leaves nothing."""
    to.parent.mkdir(parents=True, exist_ok=True)
    folder = to.with_name(f".{secrets.token_hex(8)}.tmp")
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
        os.rename(folder, to)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(to.parent)


def write_all(
    folder: Path, release: Release, forms: Sequence[str], cases: list[Any], proof: dict[str, Any], asked: bool
) -> None:
    """Write and prove each form. What was `asked` for must succeed; of all forms, those that cannot are left out."""
    for form in forms:
        path = folder / release.file_of(form)
        try:
            release.write(path, form)
            more = form == "official" and opens_in_spandrel(release.network)
            proof["artefacts"] += prove(path, form, release.network, cases, more)
        except UserError as error:
            if asked or not form.startswith("onnx"):
                raise
            path.unlink(missing_ok=True)
            proof["left_out"][form] = str(error)


def calibration(shards: str | None, outward: Outward, shown: list[Tensor]) -> list[dict[str, Tensor]]:
    """Inputs that 8-bit ranges are read from: samples of `shards` made small, or the pictures of the proof."""
    if outward.kind not in PHOTOS:
        return []
    if shards is not None:
        data = open_dataset(shards)
        read = [read_image(data, i) for i in range(min(data.num_samples, CALIBRATED_ON))]
        shown = [to_uint8(imresize(image.float() / 255, 1 / outward.scale)) for image in read]
    return [{"lq": pictures.batch([picture], 1, pictures.SIZES[1], outward.fold)} for picture in shown]
