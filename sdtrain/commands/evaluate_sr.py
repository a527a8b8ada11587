"""`sdtrain evaluate` for a super-resolution network of a run: the run's own lists, or others that `--real` names.

Beside the network stands what bicubic enlargement of the same inputs reaches. Several ranks share the images; the
values do not depend on how many there are.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from sdtrain.commands.eval_rows import append, compare, last_row
from sdtrain.commands.source import ROLE, file_of, of_run, position_of, run_folder_of
from sdtrain.errors import EXIT_OK, ConfigError, WeightsError
from sdtrain.metrics.table import FILES, words
from sdtrain.restoration.options import Measured, networks_of

NAMES = get_args(Measured)
FEATURES = [name for name in NAMES if name.startswith(("fid", "fd_"))]
SPLITS = ("test", "val")
NOT_HERE = ("num", "num_real", "seeds", "seed", "batch_size")


def run(args: argparse.Namespace, config: Any) -> int:
    """`config` is that of the run. Returns 0; raises ConfigError, DataError or WeightsError before any computation."""
    path = Path(args.path)
    config = configured(args, config)
    from sdtrain.engine.ranks import is_main, start_ranks
    from sdtrain.interop.loading import load_network
    from sdtrain.restoration.inputs import make_inputs
    from sdtrain.tasks.validation import ValidationList

    earlier = last_row(args.against)
    device = start_ranks(args.device)
    file = file_of(path, args.weights)
    network = load_network(file, ROLE[args.weights])
    if network.player != "Generator":
        raise ConfigError(f"{file} holds a discriminator, which enlarges nothing; give the file of a generator")
    inputs = make_inputs(config)
    folder = folder_of_inputs(args, config)
    photos = ValidationList(config, args.split, inputs, folder, device, keep_index=args.real is not None)
    net: Any = network.build().to(device)
    values = photos.measure(lambda i, factor: photos.upscale(net, i, factor))
    plain = photos.measure(photos.bicubic)
    about = {"measured": str(path), "weights": args.weights, "file": str(file), **position_of(file)}
    row = {"kind": "eval", **about, **values, "bicubic": plain, "protocol": photos.protocol()}
    if is_main():
        report(row, plain, getattr(config.data, args.split))
        append(row, args.json)
    compare(earlier, row)
    return EXIT_OK


def configured(args: argparse.Namespace, config: Any) -> Any:
    """The run's configuration with the metrics and the list asked for; every mistake in the arguments is found here.

    Raises ConfigError or WeightsError.
    """
    from sdtrain.weights import check_weights

    given = [f"--{name.replace('_', '-')}" for name in NOT_HERE if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: {args.path} enlarges every image of a list; leave it out")
    args.split = args.split or ("test" if args.real or config.data.test else "val")
    if args.split not in SPLITS:
        raise ConfigError(f"--split {args.split}: a run of super-resolution has {' and '.join(SPLITS)}")
    source = args.real or of_run(getattr(config.data, args.split), "--real")
    if source is None:
        raise ConfigError(f"the run has no data.{args.split}; say which photographs to measure on: --real SHARDS")
    names = tuple(args.metrics.split(",")) if args.metrics else config.validation.names
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"--metrics has {', '.join(unknown)}; choose from {', '.join(NAMES)} for super-resolution")
    extractor = "random-inception" if args.extractor == "random" else args.extractor or config.metrics.extractor
    config = replace(
        config,
        data=replace(config.data, **{args.split: source}, cache=None, allow_pipe=args.allow_pipe),
        validation=replace(config.validation, names=names),
        metrics=replace(config.metrics, extractor=extractor, tap=args.tap or config.metrics.tap),
        weights=replace(config.weights, **{n: source for n in FILES if (source := getattr(args, n)) is not None}),
    )
    w = config.weights
    files = networks_of(names)
    if "fid" in names and config.metrics.extractor == "inception" and w.inception != "random":
        files.append("inception")
    problems = check_weights({name: getattr(w, name) or "download" for name in files})
    if problems:
        raise WeightsError(" ".join(problems))
    return config


def folder_of_inputs(args: argparse.Namespace, config: Any) -> Path:
    """Where the low-quality inputs are kept: in the run for its own lists, else in the cache under their hash."""
    run_folder = run_folder_of(Path(args.path))
    assert run_folder is not None
    if args.real is None:
        return run_folder
    from sdtrain.config.compare import config_hash
    from sdtrain.data.read.dataset import open_dataset, reading
    from sdtrain.weights import cache_folder

    photos = open_dataset(args.real, **reading(config.data)).hash
    named = hashlib.sha256(photos.encode()).hexdigest()[:16]  # a manifest may say anything, a path among others
    return (args.cache or cache_folder() / "statistics") / f"lq-{named}-{config_hash(config)[:16]}"


def report(row: dict[str, Any], plain: dict[str, float], source: str) -> None:
    """Print the table: the network, bicubic enlargement, and what made each number."""
    protocol = row["protocol"]
    print(f"{row['measured']} on {protocol['num_images']} photographs of {source}, low quality: {protocol['lq']}")
    print(f"  {'':12}{'network':>10}{'bicubic':>10}")
    for name, value in plain.items():
        print(f"  {name:12}{row[name]:10.4f}{value:10.4f}  {made_by(name, protocol)}, {protocol['num_images']} images")


def made_by(name: str, protocol: dict[str, Any]) -> str:
    """The network or the rule behind a value; NAME_FACTOR is a value of one factor."""
    if features := next((protocol[n] for n in FEATURES if name.startswith(n)), None):
        return words(features)
    return protocol["lpips" if name.startswith("lpips") else "psnr_y, ssim_y"]
