"""`sdtrain bench --cfg NAME`: the paper's Table 2 for any configuration and machine - what self-distillation costs.

Variants are interleaved in one process, so that a busy machine slows all of them alike. Without data it runs on noise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.commands.eval_rows import append
from sdtrain.errors import EXIT_OK, ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from sdtrain.commands.variants import Variant
    from sdtrain.config.keys import Config
    from sdtrain.contracts import Feed
    from sdtrain.data.read.dataset import Dataset
    from sdtrain.data.read.stream import Batch

# variant -> keys of the configuration
VARIANTS: dict[str, list[str]] = {
    "baseline": ["sd.alpha=0", "sd.log=false"],
    "sd-l1": ["sd.loss=l1", "sd.augment=false"],
    "sd-plain": ["sd.loss=lpips-vgg", "sd.augment=false"],
    "sd": ["sd.loss=lpips-vgg", "sd.augment=true"],
    "sd-bf16": ["sd.loss=lpips-vgg", "sd.augment=true", "sd.precision=bf16"],
}
DEFAULT = "baseline,sd-l1,sd"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE|NAME", help="configuration with an `sd` section")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeat as you like")
    add("--variants", default=DEFAULT, help=f"comma-separated, of {', '.join(VARIANTS)} (default: {DEFAULT})")
    add("--steps", type=int, default=10, help="measured steps of each variant; one more warms up (default: 10)")
    add("--resolution", type=int, help="side of the images in pixels (default: that of the configuration)")
    add("--single", action="store_true", help="all ghosts in one forward, as official code on one GPU")
    add("--bf16", action="store_true", help="trained networks in bf16 (precision: bf16)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--json", type=Path, metavar="FILE", help="append the figures as one JSON row")


def run(args: argparse.Namespace) -> int:
    """Returns 0; raises ConfigError for a configuration without self-distillation or an unknown variant."""
    configs = configurations(args)
    from sdtrain.commands.variants import Variant, compare
    from sdtrain.engine.ranks import pick_device
    from sdtrain.engine.timing import Clock
    from sdtrain.methods.sdgan.method import SDGAN
    from sdtrain.precision import exact_sums

    first = next(iter(configs.values()))
    device = pick_device(args.device, first.tf32, first.deterministic)
    clock = Clock(device)
    source = Source(first, args.resolution, device)
    variants = [Variant(n, c, device, source.resolution, source.class_counts) for n, c in configs.items()]
    with source.feeding(variants[0].method.feed):
        compare(variants, source.stream, args.steps, clock)
    found = figures(variants)
    found |= {"float32": "tf32" if first.tf32 else "full"}
    found |= {"summation": "exact" if exact_sums(first, device) else "fast"}
    found |= {"ghosts_at_once": variants[0].trainer.ghosts_at_once, "single": args.single}
    found |= {"cfg": args.cfg, "resolution": source.resolution, "device": device.type, "clock": clock.name}
    print(header(first, source, found, args.steps))
    print(table(found))
    costly = [v for v in variants if isinstance(v.method, SDGAN) and v.method.distance is not None]
    if costly:
        found["distillation"] = distillation(costly[-1], variants[0], source, args.steps, clock)
        print(render_distillation(found["distillation"]))
    append(found, args.json)
    return EXIT_OK


def configurations(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration of each variant, before torch is imported. Frozen networks are random: time is the same.

    Raises ConfigError for unknown variants, no steps, or a method without self-distillation.
    """
    from sdtrain.config.load import load_config

    names = [name.strip() for name in args.variants.split(",") if name.strip()]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or not names:
        raise ConfigError(f"--variants has {', '.join(unknown) or 'no name'}; choose from {', '.join(VARIANTS)}")
    if args.steps < 1:
        raise ConfigError(f"--steps {args.steps}: measure at least 1 step")
    common = [*args.set, *(["precision=bf16"] if args.bf16 else [])]
    common += ["summation=fast", "ghosts_at_once=null"] if args.single else []
    common += [f"data.resolution={args.resolution}"] if args.resolution else []
    config = load_config(args.cfg, common)
    if not hasattr(config, "sd"):
        raise ConfigError(f"{args.cfg}: method {config.method} has no self-distillation (sd) whose cost could be shown")
    common += ["weights.lpips=random", "weights.features=random", f"sd.alpha={config.sd.alpha or 1.0}"]
    return {name: load_config(args.cfg, [*common, *VARIANTS[name]]) for name in names}


class Source:
    """Batches of the configured data, or noise of the same shape when it cannot be read."""

    def __init__(self, config: Config, resolution: int | None, device: torch.device) -> None:
        from sdtrain.data.read.dataset import open_dataset, reading

        self.config, self.device = config, device
        self.dataset: Dataset | None = None
        self.class_counts: Sequence[int] = ()
        self.note = "noise instead of images: waiting for data is not measured"
        try:
            dataset = open_dataset(config.data.train, **reading(config.data))
        except (DataError, OSError):
            dataset = None
        wanted = resolution or config.data.resolution or (dataset.resolution if dataset else None)
        if wanted is None:
            raise ConfigError(f"{config.data.train} cannot be read and says no size; add --resolution PIXELS")
        self.resolution = int(wanted)
        if dataset is not None and dataset.resolution in (wanted, None) and dataset.num_samples >= config.batch_size:
            self.dataset, self.class_counts = dataset, dataset.class_counts
            self.note = f"images of {dataset.source}, {config.data.workers} workers"

    @contextmanager
    def feeding(self, feed: Feed) -> Iterator[Source]:
        """Read with the workers of the configuration inside."""
        from sdtrain.data.read.stream import Stream

        c, self.feed = self.config, feed
        with ExitStack() as stack:
            if self.dataset is not None:
                stream = Stream(
                    self.dataset,
                    seed=c.seed,
                    batch_size=c.batch_size,
                    ghost_batch=c.ghost_batch,
                    ghosts=range(c.num_ghosts),
                    xflip=c.data.xflip,
                    workers=c.data.workers,
                    prefetch=c.data.prefetch,
                    **asdict(feed),
                )
                self.stream: Iterator[Batch] = stack.enter_context(stream)
            else:
                self.stream = repeat(self.noise())
            yield self

    def noise(self) -> Batch:
        from sdtrain.commands.variants import synthetic

        return synthetic(self.config, self.feed, self.resolution, len(self.class_counts))


def figures(variants: list[Variant]) -> dict[str, Any]:
    """Medians by variant; ratios are medians of the ratios of the same round."""
    first = variants[0]
    found: dict[str, Any] = {"variants": {}}
    for variant in variants:
        rounds = variant.rounds()
        shares = variant.shares()
        batch = variant.config.batch_size
        found["variants"][variant.name] = {
            "sec_per_kimg": statistics.median(rounds) / batch * 1000,
            "ratio": statistics.median(own / base for own, base in zip(rounds, first.rounds())),
            "memory_gb": variant.peak / 1e9,
            "memory_ratio": variant.peak / max(first.peak, 1),
            "memory_mean_gb": variant.average / 1e9,
            "memory_mean_ratio": variant.average / max(first.average, 1),
            "data_wait": statistics.median(variant.waited),
            "phases": {
                name: statistics.median(seconds) * shares[name] / batch * 1000
                for name, seconds in variant.seconds.items()
            },
        }
    return found


def header(config: Any, source: Source, found: dict[str, Any], steps: int) -> str:
    import torch

    who = "--single, as official code on one GPU" if found["single"] else "as training runs it"
    place = torch.cuda.get_device_name(source.device) if source.device.type == "cuda" else "CPU"
    return (
        f"{found['cfg']} at {source.resolution} px on {place}, {found['clock']}, {config.precision}, batch "
        f"{config.batch_size} in ghosts of {config.ghost_batch}, "
        f"float32 products {found['float32']}\n"
        f"{who}: summation {found['summation']}, {found['ghosts_at_once']} of {config.num_ghosts} ghosts in a forward\n"
        f"{source.note}; frozen networks with random weights; medians of {steps} interleaved steps"
    )


def table(found: dict[str, Any]) -> str:
    """Table 2 of the SD-GAN paper."""
    star = "" if found["device"] == "cuda" else " *"
    head = f"  {'variant':<10}{'s/kimg':>10}{'overhead':>10}{f'peak GB{star}':>11}{'overhead':>10}"
    lines = [f"{head}{f'mean GB{star}':>11}{'overhead':>10}{'data wait':>11}   s/kimg of"]
    for name, v in found["variants"].items():
        phases = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in v["phases"].items())
        lines.append(
            f"  {name:<10}{v['sec_per_kimg']:>10.2f}{v['ratio'] - 1:>+10.1%}"
            f"{v['memory_gb']:>11.3f}{v['memory_ratio'] - 1:>+10.1%}"
            f"{v['memory_mean_gb']:>11.3f}{v['memory_mean_ratio'] - 1:>+10.1%}{v['data_wait']:>11.1%}   {phases}"
        )
    lines.append("  peak GB: the phase that needs most; mean GB: over the phases, lazy ones in their proportion")
    if star:
        lines.append("  * weights, Adam, and the most that tensors of one chunk take; no allocator to ask on a CPU")
    return "\n".join(lines)


def distillation(variant: Variant, baseline: Variant, source: Source, steps: int, clock: Any) -> dict[str, Any]:
    """The parts of L_SD of one variant, and the least time this machine could need for them."""
    import torch

    from sdtrain.commands.variants import cost_of_distillation, machine_rates

    parts = cost_of_distillation(variant, source.noise(), steps, clock)
    chunk = variant.config.ghost_batch * variant.trainer.ghosts_at_once
    bf16 = "bf16" in (variant.config.precision, variant.config.sd.precision)
    speed, bandwidth = machine_rates(source.device, torch.bfloat16 if bf16 else torch.float32, clock)
    flops, kept = (sum(part[key] for part in parts.values()) / chunk for key in ("flops", "bytes"))
    extra = [v - b for v, b in zip(variant.seconds["G"], baseline.seconds["G"])]
    return {
        "variant": variant.name,
        "baseline": baseline.name,
        "parts": {name: {key: value / chunk for key, value in part.items()} for name, part in parts.items()},
        "measured_extra": statistics.median(extra) / variant.config.batch_size,
        "gflop_per_s": speed / 1e9,
        "gb_per_s": bandwidth / 1e9,
        "floor_flops": flops / speed,
        "floor_bytes": 2 * kept / bandwidth,  # what backward needs is written once and read once
    }


def render_distillation(d: dict[str, Any]) -> str:
    total = sum(part["seconds"] for part in d["parts"].values())
    lines = [f"  cost of L_SD in {d['variant']}, per image"]
    for name, part in d["parts"].items():
        size = f"{part['flops'] / 1e9:9.3f} GFLOP" if part["flops"] else ""
        lines.append(f"    {name:<18}{part['seconds'] * 1000:9.2f} ms{part['seconds'] / total:8.0%}  {size}")
    floor, extra = max(d["floor_flops"], d["floor_bytes"]), d["measured_extra"] * 1000
    lines += [
        f"    {'sum':<18}{total * 1000:9.2f} ms; phase G is {extra:.2f} ms longer than that of {d['baseline']}",
        f"    {'floor':<18}{floor * 1000:9.2f} ms; we take {total / max(floor, 1e-12):.1f} times that, the larger of",
        f"      {d['floor_flops'] * 1000:.2f} ms for FLOPs at {d['gflop_per_s']:.0f} GFLOP/s (a large matrix product)",
        f"      {d['floor_bytes'] * 1000:.2f} ms for what backward keeps at {d['gb_per_s']:.1f} GB/s (a copy)",
    ]
    return "\n".join(lines)
