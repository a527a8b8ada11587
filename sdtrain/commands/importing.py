"""`sdtrain import FILE --out DIR`: an official checkpoint becomes tensors and a description, and nothing in it is run.

    DIR/G_ema.safetensors  G_ema.json    each network of the file, and how to rebuild it
    DIR/G.safetensors      G.json
    DIR/D.safetensors      D.json
    DIR/import.json                      where it came from (sha256), and the file's plain facts, as ADA's p or progress

`--inspect` prints what a file holds and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from sdtrain.interop.network import Network
    from sdtrain.interop.official import Official
    from sdtrain.interop.safe_pickle import Content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "StyleGAN2-ADA, ProjectedGAN or R3GAN .pkl, StyleNAT .pt, super-resolution .pth; to --inspect also a run"
    parser.add_argument("file", type=Path, help=what)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write into")
    parser.add_argument("--role", action="append", choices=("G", "D", "G_ema"), help="only this network (repeatable)")
    what = "print globals, networks, arguments and tensors; no writing"
    parser.add_argument("--inspect", action="store_true", help=what)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option the file does not say (JSON value)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError for arguments and WeightsError for files that cannot be used."""
    options = dict(_setting(text) for text in args.set)
    if args.inspect:
        print("\n".join(inspected(args.file, options)))
        return 0
    if args.out is None:
        raise ConfigError("import needs --out DIR, the folder to write into (or --inspect)")
    for line in import_file(args.file, args.out, args.role, options):
        print(line)
    return 0


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        return key, json.loads(value if equals else "")
    except ValueError:
        raise ConfigError(f"--set {text}: give KEY=VALUE with a JSON value, as in min_heads=8") from None


def import_file(path: Path, folder: Path, roles: list[str] | None = None, options: dict | None = None) -> Iterator[str]:
    """Write the networks of `path` into `folder`; yields one line a network. Raises WeightsError."""
    from sdtrain.files import write_json
    from sdtrain.interop.network import save_network
    from sdtrain.interop.official import read_official

    found = read_official(path, **(options or {}))
    missing = [role for role in roles or () if role not in found.networks]
    if missing:
        raise WeightsError(f"{path} has no {missing[0]}; it holds {', '.join(found.networks)}")
    folder.mkdir(parents=True, exist_ok=True)
    for role in roles or found.networks:
        written = save_network(found.networks[role], folder / role)
        yield f"{written}: {describe(found.networks[role])}"
    write_json(folder / "import.json", {"source": found.source, "networks": list(found.networks), **found.extras})


def describe(network: Network) -> str:
    """One line: role, kind, size, classes, counts, and why it cannot be rebuilt where it cannot."""
    size = f" {network.resolution} px" if network.resolution else ""
    classes = f", {network.num_classes} classes" if network.num_classes else ""
    numbers = sum(tensor.numel() for tensor in network.state.values())
    text = f"{network.role} {network.kind} {network.player.lower()}{size}{classes}"
    text += f", {len(network.state)} tensors, {numbers:,} numbers"
    return f"{text}; NOTE {network.note}" if network.note else text


def inspected(path: Path, options: dict[str, Any]) -> Iterator[str]:
    """What a file or run holds, line by line: container, globals, networks with constructor arguments and tensors."""
    if path.is_dir() or path.suffix == ".safetensors":
        yield from _own(path)
        return
    from sdtrain.files import sha256_of_file
    from sdtrain.interop.official import read_official
    from sdtrain.interop.safe_pickle import read_checkpoint

    content = read_checkpoint(path)
    yield f"file        {path} ({path.stat().st_size:,} bytes)"
    yield f"sha256      {sha256_of_file(path)}"
    yield f"container   {content.container}"
    yield f"globals     {len(content.globals)} named, all known and inert"
    yield from (f"            {name}" for name in content.globals)
    try:
        yield from _networks(read_official(path, **options), content)
    except WeightsError as error:
        yield f"networks    none can be rebuilt: {error}"
        yield from _top_level(content)


def _own(path: Path) -> Iterator[str]:
    from sdtrain.interop.loading import file_of_run, load_network

    file = file_of_run(path, None) if path.is_dir() else path
    network = load_network(file)
    yield f"file        {file} ({file.stat().st_size:,} bytes)"
    yield "container   safetensors, which holds no code"
    yield from _network(network)


def _networks(found: Official, content: Content) -> Iterator[str]:
    from sdtrain.interop.pickle_machine import Record

    yield f"what        {found.what}"
    yield from (f"{name:19} {json.dumps(value)}" for name, value in found.extras.items())
    for role, network in found.networks.items():
        yield ""
        record = content.tree.get(role)
        if isinstance(record, Record):
            yield f"class       {record.name}"
            yield f"arguments   {json.dumps(_arguments(record))}"
        yield from _network(network)


def _network(network: Network) -> Iterator[str]:
    yield f"network     {describe(network)}"
    yield f"options     {json.dumps(network.options)}"
    yield from (f"  {name:60} {list(value.shape)!s:20} {value.dtype}" for name, value in network.state.items())


def _arguments(record: Any) -> Any:
    from sdtrain.interop.official import plain

    return plain(record.attributes.get("_init_kwargs") or record)


def _top_level(content: Content) -> Iterator[str]:
    from sdtrain.interop.official import plain

    tree = plain(content.tree)
    yield from (
        f"  {name:20}{json.dumps(value)[:200]}" for name, value in (tree.items() if isinstance(tree, dict) else ())
    )
