"""Golden checkpoint files: what an import finds in them, and that hostile ones are refused before anything runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping

import torch
from check import Case
from torch import Tensor

MARKS = ("SDTRAIN_PKL_PWNED", "SDTRAIN_PKL_SOURCE_EXECUTED")


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The manifest's state_sha256_16 of a state dict."""
    return {
        name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16] for name, value in state.items()
    }


def nothing_ran() -> bool:
    return not any(mark in os.environ for mark in MARKS)


def _snapshot_of(case: Case) -> str:
    """NAME.pkl, whose outputs NAME_expected.safetensors holds."""
    return case.name.removesuffix("_expected.safetensors") + ".pkl"


def _states(case: Case, snapshot: str) -> Iterator[tuple]:
    """Every tensor of every module, after the import and after an export and a second import."""
    from sdtrain.interop.pickle_machine import Record
    from sdtrain.interop.safe_pickle import read_checkpoint, state_of

    content = read_checkpoint(case.folder / snapshot)
    tree = content.tree
    for role, wanted in case.entry["state_sha256_16"].items():
        got = digests(state_of(content.budget, tree[role])) if isinstance(tree[role], Record) else {}
        wrong = [name for name in {*wanted, *got} if wanted.get(name) != got.get(name)]
        yield f"{role}: tensors that differ", len(wrong), 0, 0.0
    yield "nothing ran", nothing_ran(), True, 0.0


def _round_trip(case: Case, snapshot: str) -> Iterator[tuple]:
    import tempfile
    from pathlib import Path

    from sdtrain.commands.exporting import export
    from sdtrain.interop.loading import load_network
    from sdtrain.interop.network import save_network
    from sdtrain.interop.official import read_official

    with tempfile.TemporaryDirectory() as folder:
        for role, network in read_official(case.folder / snapshot).networks.items():
            saved = load_network(save_network(network, Path(folder) / role), role)
            again = load_network(export(saved, Path(folder) / f"{role}.pt"), role)
            cards = [{**n.card, "source": None} for n in (again, network)]
            same = cards[0] == cards[1] and digests(again.state) == digests(network.state)
            yield f"{role}: import, export, import is bit-equal", same, True, 0.0


def stylegan2_expected(case: Case) -> Iterator[tuple]:
    from sdtrain.interop.official import read_official

    yield from _states(case, _snapshot_of(case))
    yield from _round_trip(case, _snapshot_of(case))
    found = read_official(case.folder / _snapshot_of(case))
    yield "augment_p", found.extras["ada_p"], case.entry["augment_p"], 0.0
    facts = found.extras["training_set_kwargs"] == case.entry["training_set_kwargs"]
    yield "training_set_kwargs", facts, True, 0.0
    z, c = case.tensors["in.z"], case.tensors["in.c"]
    with torch.no_grad():
        images = found.networks["G_ema"].build()(z, c, noise="const")
        yield "out.G_ema_img_const", images
        yield "out.D_logits_on_it", found.networks["D"].build()(images, c)


def projected_expected(case: Case) -> Iterator[tuple]:
    from sdtrain.interop.official import read_official

    yield from _states(case, _snapshot_of(case))
    yield from _round_trip(case, _snapshot_of(case))
    found = read_official(case.folder / _snapshot_of(case))
    for name, value in case.entry["progress"].items():
        yield f"progress.{name}", found.extras["progress"][name], value, 0.0
    with torch.no_grad():
        images = found.networks["G_ema"].build()(case.tensors["in.z"])
    for name, stride in case.names(r"out\.G_ema_img_strided(\d+)"):
        yield name, images[:, :, :: int(stride), :: int(stride)]


def snapshot(case: Case) -> Iterator[tuple]:
    """The file itself: readable, with its three networks; the numbers are checked by its *_expected file."""
    from sdtrain.interop.official import read_official

    found = read_official(case.path)
    yield "networks", sorted(found.networks) == ["D", "G", "G_ema"], True, 0.0
    yield "size", case.path.stat().st_size, case.entry["bytes"], 0.0
    yield "nothing ran", nothing_ran(), True, 0.0


def container(case: Case) -> Iterator[tuple]:
    """Some tensors of a StyleNAT container are marks; roles and values must be those that torch's own loader finds."""
    import argparse

    from sdtrain.interop.official import read_official

    networks = read_official(case.path).networks
    yield "roles", sorted(networks) == ["D", "G", "G_ema"], True, 0.0
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(case.path, weights_only=True)
    held = content.get("state_dicts", content)
    for role, key in {"G": "g", "D": "d", "G_ema": "g_ema"}.items():
        yield f"{role} has the same names", list(networks[role].state) == list(held[key]), True, 0.0
        for name, value in held[key].items():
            yield f"{role}.{name}", networks[role].state[name], value, 0.0


def hostile(case: Case) -> Iterator[tuple]:
    from sdtrain.errors import WeightsError
    from sdtrain.interop.safe_pickle import read_checkpoint

    try:
        read_checkpoint(case.path)
        message = ""
    except WeightsError as error:
        message = str(error)
    yield "refused with the global's name", "wants the global '" in message, True, 0.0
    yield "nothing ran", nothing_ran(), True, 0.0


ADAPTERS = {
    "sg2_snapshot*_expected.safetensors": stylegan2_expected,
    "pg_snapshot*_expected.safetensors": projected_expected,
    "*_snapshot*.pkl": snapshot,
    "snat_container_*.pt": container,
    "evil_*.pkl": hostile,
}
