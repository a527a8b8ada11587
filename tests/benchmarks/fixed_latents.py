"""How far the pictures of fixed latents still move while a run trains: mean absolute difference, free of LPIPS.

    python tests/benchmarks/fixed_latents.py runs/suites/small_sdgan/*-seed?

Weights of G_ema at 20, 40, 60, 80 and 100 % of the images, consecutive ones compared, 256 latents, range [-1, 1].
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from sdtrain.commands.results import read_runs  # noqa: E402
from sdtrain.commands.snapshots import images_of, weights_at  # noqa: E402
from sdtrain.commands.source import Source  # noqa: E402
from sdtrain.metrics.variation import perceptual_variation  # noqa: E402

SHARES, LATENTS, BATCH = (20, 40, 60, 80, 100), 256, 16


def absolute(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().mean((1, 2, 3))


def main(paths: list[str]) -> None:
    runs, notes = read_runs([Path(path) for path in paths])
    for run in runs:
        sources = [Source(folder, torch.device("cpu")) for folder in weights_at(run, SHARES, notes).values()]
        pictures = [images_of(source, range(LATENTS), BATCH) for source in sources]
        mean, deviation = perceptual_variation(pictures, absolute)
        print(f"{run.name}: {mean:.5f} (over latents +- {deviation:.5f}), {len(sources)} weights", flush=True)
    print(*notes, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
