"""What `checkpoint_activations` saves and costs in steps that really run, phase by phase: processor time and bytes.

    python tests/benchmarks/bench_recompute.py stylegan2/sd_paper256 256 --set model.generator.channel_base=4096

Batches are noise, frozen networks are random, and one ghost is one image.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch

from sdtrain.commands.variants import Variant, synthetic
from sdtrain.config.load import load_config
from sdtrain.engine.timing import Clock
from sdtrain.plan import size

RANDOM = ("weights.lpips=random", "weights.features=random", "weights.perceptual=random", "batch_size=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cfg")
    parser.add_argument("resolution", type=int)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    sets = [*RANDOM, "ghost_batch=1", f"data.resolution={args.resolution}", "log_img=0", "total_img=1000", *args.set]
    config = load_config(args.cfg, sets)
    device = torch.device("cpu")
    clock = Clock(device)
    ways = {
        name: Variant(name, replace(config, checkpoint_activations=name == "again"), device, args.resolution)
        for name in ("plain", "again")
    }
    batch = synthetic(config, ways["plain"].method.feed, args.resolution)
    for number in range(args.steps + 1):
        for way in ways.values():
            chunks = way.chunks(batch, number * 48)
            if number == 0:
                way.measure_memory(chunks)
                continue
            for phase, seconds in way.step(chunks, clock).items():
                way.seconds.setdefault(phase, []).append(seconds)
    plain, again = ways.values()
    print(
        f"{args.cfg} at {args.resolution} px, {clock.name}, median of {args.steps} steps of {config.batch_size} images"
    )
    for phase, most in plain.memory.items():
        one, two = (statistics.median(way.seconds[phase]) for way in (plain, again))
        less = again.memory[phase] / most - 1
        print(
            f"  {phase:<10} {size(most / 1e9)} -> {size(again.memory[phase] / 1e9)} ({less:+.0%}), "
            f"{one:.2f} -> {two:.2f} s ({two / one - 1:+.0%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
