"""`sdtrain evaluate PATH --real DATA`: measure a folder of images, a data set, a run or a checkpoint.

    --json FILE                   one row an evaluation is appended: values, protocol, what was measured
    CACHE/real-<hash>.safetensors statistics of the real images, made once

Under torchrun or accelerate launch all ranks share the work; the values do not depend on how many there are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands.eval_rows import DECIMALS, append, compare, last_row
from sdtrain.data.read.budget import PictureLimits
from sdtrain.errors import EXIT_OK, ConfigError, WeightsError
from sdtrain.metrics.table import FILES, METRICS, Settings

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS = {"metrics": "fid", "extractor": "inception", "tap": 2048, "seeds": 5, "seed": 0, "batch_size": 32}
DEFAULTS |= {"split": "test", **dict.fromkeys(FILES, "download")}
DEFAULTS |= {"pr_features": "inception", "pr_precision": "fp32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="what to measure: a folder of images, shards, a run folder or a checkpoint")
    add("--real", metavar="DATA", help="real images: shards or a folder (default: those of the run for --split)")
    own = "default: as the run's configuration says, else"
    add("--metrics", help=f"comma-separated, of {', '.join(METRICS)} ({own} fid); super-resolution has its own")
    add(
        "--num",
        "--num-fake",
        type=int,
        dest="num",
        help="generated images (default: the whole folder, 50000 from a run)",
    )
    add("--num-real", type=int, help=f"a fixed random subset of the real images ({own} all)")
    extractors = ("inception", "random-inception", "random")
    add("--extractor", choices=extractors, help=f"feature network ({own} inception)")
    add("--tap", type=int, choices=(64, 192, 768, 2048), help=f"width of the feature layer ({own} 2048)")
    pr = "of precision and recall; vgg16 and fp16 are the reference code's"
    add("--pr-features", choices=("inception", "vgg16"), help=f"features {pr} ({own} as --extractor)")
    add("--pr-precision", choices=("fp32", "fp16"), help=f"distances {pr} ({own} fp32)")
    add("--inception", metavar="SOURCE", help=f"Inception weights: a path or `download`, fetched ({own} download)")
    add("--vgg16", metavar="SOURCE", help=f"VGG16 weights: a path, `download` or `random` ({own} download)")
    add("--dinov2", metavar="SOURCE", help=f"DINOv2 weights of fd_dinov2: a path or `download` ({own} download)")
    add("--clip", metavar="SOURCE", help=f"CLIP weights of fd_clip, kid_clip: a path or `download` ({own} download)")
    add(
        "--lite0",
        metavar="SOURCE",
        help=f"EfficientNet-Lite0 of fd_lite0, kid_lite0: a path or `package` ({own} package)",
    )
    add("--seeds", type=int, help=f"random networks averaged by rfid ({own} 5)")
    seed = "seed of the latents (default: that of the run; the next one for split test, as in the run; else 0)"
    add("--seed", type=int, help=seed)
    add("--weights", choices=("ema", "raw"), default="ema", help="of a run: the generator's average, or itself")
    add("--batch-size", type=int, help=f"images at once; part of the protocol ({own} 32)")
    add("--workers", type=int, default=2, help="processes that decode shards (default: 2)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--split", help="a name for the real images, kept in the row; super-resolution: test or val (default: test)")
    add("--data", metavar="DATA", help="training set of a run, for its classes (default: as its config.yaml says)")
    add("--allow-pipe", action="store_true", help="run the commands of pipe: sources that are typed here")
    add("--max-image-mb", type=int, default=512, metavar="MB", help="memory one picture may cost (default: 512)")
    add("--cache", type=Path, help="where statistics of real images are kept (default: the weights cache)")
    add("--json", type=Path, metavar="FILE", help="append the result as one JSON row")
    add("--against", type=Path, metavar="FILE", help="compare with the last row of a --json file of the same protocol")


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError, DataError or WeightsError before anything is computed."""
    from sdtrain.commands.source import config_of

    path = Path(args.path)
    config = config_of(path) if is_generator(path) else None
    if hasattr(config, "validation"):
        from sdtrain.commands import evaluate_sr

        return evaluate_sr.run(args, config)
    check(args, config)
    earlier = last_row(args.against)
    from sdtrain.engine.ranks import is_main, start_ranks

    device = start_ranks(args.device)
    sample_fn, info = subject(args, device)
    judge = evaluator(args, info, device)
    row = {"kind": "eval", "measured": str(args.path), **info.get("row", {}), **judge.evaluate(sample_fn)}
    if is_main():
        report(row)
        append(row, args.json)
    compare(earlier, row)
    return EXIT_OK


def check(args: argparse.Namespace, config: Any) -> None:
    """Everything that can be wrong with the arguments, before torch is imported: ConfigError or WeightsError."""
    from sdtrain.weights import check_weights

    fill_in(args, config)
    args.metrics = tuple(name.strip() for name in args.metrics.split(",") if name.strip())
    unknown = [name for name in args.metrics if name not in METRICS]
    if unknown or not args.metrics:
        raise ConfigError(f"--metrics has {', '.join(unknown) or 'no name'}; choose from {', '.join(METRICS)}.")
    if args.num is not None and args.num < 2 or args.seeds < 1 or args.batch_size < 1:
        raise ConfigError("--num must be at least 2, --seeds and --batch-size at least 1.")
    if not Path(args.path).exists() and not any(mark in str(args.path) for mark in "*{:"):
        raise ConfigError(f"There is nothing at {args.path}; give a folder of images, shards, a run or a checkpoint.")
    args.extractor = "random-inception" if args.extractor == "random" else args.extractor
    if args.inception == "random":
        raise ConfigError("--inception random is spelled --extractor random-inception, so that the result says so.")
    problems = check_weights(weights_needed(args))
    if problems:
        raise WeightsError(" ".join(problems))


def is_generator(path: Path) -> bool:
    """A run, a checkpoint or a weights file, not images."""
    return path.is_file() and path.suffix != ".tar" or (path / "config.yaml").is_file() or is_checkpoint(path)


def is_checkpoint(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or (path / "state.json").is_file() or any(path.glob("*.safetensors"))


def fill_in(args: argparse.Namespace, config: Any) -> None:
    """Give what was not asked for: as the run measures itself, so that values compare with its own; else defaults."""
    defaults: dict[str, Any] = dict(DEFAULTS)
    if config is not None:
        from sdtrain.commands.source import of_run
        from sdtrain.metrics.protocol import latents_seed

        m, w, data, split = config.metrics, config.weights, config.data, args.split or "test"
        real = data.test if split == "test" and data.test else data.val or data.train
        defaults |= {"metrics": ",".join(m.names), "num": m.num_fake, "num_real": m.num_real, "extractor": m.extractor}
        defaults |= {"tap": m.tap, "seeds": m.seeds, "batch_size": m.batch_size}
        defaults |= {"seed": latents_seed(config.seed, split), "real": args.real or of_run(real, "--real")}
        defaults |= {"pr_features": m.pr_features, "pr_precision": m.pr_precision}
        defaults |= {name: getattr(w, name) or "download" for name in FILES}
        if w.inception == "random":  # as the run understands it
            defaults |= {"inception": "download", "extractor": "random-inception"}
    args.real_is_typed = args.real is not None
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def weights_needed(args: argparse.Namespace) -> dict[str, str]:
    """Sources of the weights files that these metrics are computed with."""
    chosen = {name: getattr(args, name) for name in ("metrics", "extractor", "tap", "pr_features")}
    kinds = {kind for kind, _ in Settings(**chosen).nets().values()}
    return {name: getattr(args, name) for name in FILES if name in kinds}


def subject(args: argparse.Namespace, device: Any) -> tuple[Callable[[list[int]], Tensor], dict[str, Any]]:
    """A function from indices to uint8 images [N, 3, H, W], and what is known of it.

    That is `num`, or `latents_seed` and `row` (what a row says of the weights). Raises WeightsError or ConfigError.
    """
    path = Path(args.path)
    if is_generator(path):
        from sdtrain.commands.source import Source, position_of

        more = {"seed": args.seed, "weights": args.weights, "data": args.data, "allow_pipe": args.allow_pipe}
        source = Source(path, device, **more)
        about = {"weights": "raw" if source.role == "G" else "ema", "file": str(source.file)}
        return source, {"latents_seed": source.seed, "row": about | position_of(source.file)}
    from sdtrain.metrics.evaluate import subset
    from sdtrain.metrics.images import batches, open_images

    images = open_images(args.path, args.allow_pipe, limits=PictureLimits(megabytes=args.max_image_mb))
    chosen = subset(images.num_samples, args.num)  # not the first ones: folders are often sorted by class

    def read(indices: list[int]) -> Tensor:
        """uint8 [N, 3, H, W] of the chosen images with these indices."""
        return next(batches(images, [chosen[i] for i in indices], len(indices), 0))

    return read, {"num": images.num_samples}


def evaluator(args: argparse.Namespace, info: dict[str, Any], device: Any) -> Any:
    """The Evaluator these arguments ask for. Raises ConfigError for missing real images and too many fake ones."""
    from sdtrain.metrics.evaluate import Evaluator
    from sdtrain.metrics.images import open_images
    from sdtrain.weights import cache_folder

    most = info.get("num")
    if args.real is None:
        raise ConfigError(f"--real is missing: say which real images {args.path} is compared with.")
    if most is not None and args.num is not None and args.num > most:
        raise ConfigError(f"--num {args.num} is more than the {most} images of {args.path}; ask for fewer.")
    return Evaluator(
        open_images(args.real, args.allow_pipe, args.real_is_typed, PictureLimits(megabytes=args.max_image_mb)),
        metrics=args.metrics,
        num_fake=args.num or most or 50_000,
        num_real=args.num_real,
        extractor=args.extractor,
        tap=args.tap,
        pr_features=args.pr_features,
        pr_precision=args.pr_precision,
        seeds=args.seeds,
        batch_size=args.batch_size,
        weights={name: getattr(args, name) for name in FILES},
        device=device,
        cache=args.cache or cache_folder() / "statistics",
        split=args.split,
        latents_seed=info.get("latents_seed"),
        workers=args.workers,
    )


def report(row: dict[str, Any]) -> None:
    """Print the table: each number with the network and the counts that made it."""
    from sdtrain.metrics.protocol import fingerprint

    protocol = row["protocol"]
    counts = f"{protocol['num_fake']} generated, {protocol['num_real']} real images"
    print(f"{row['measured']} against {protocol['real_source']}, protocol {fingerprint(protocol)}")
    for metric in METRICS.values():
        for name in [name for name in metric.shown if name in row]:
            print(f"  {name:14}{row[name]:<12.{DECIMALS[name]}f}{metric.network(protocol)}, {counts}")
    if "rfid_seeds" in row:
        print(f"  rfid over seeds {row['rfid_seeds']}, standard deviation with n - 1, rule {row['rfid_rule']}")
