"""SDAKD against naive (C, 1), naive (C, C) and Ablation 3 on real photographs, at equal images seen by the student.

    python tests/benchmarks/compare_sdakd.py ../shared/data/photos_hr /tmp/compare --minutes 30

SOURCE holds PNG photographs in any sub-folders; 10 of them are held back (3 choose weights, 7 are the test), by a fixed
rule. One small teacher a seed serves every method that has one. Runs that are finished are not run again, so the same
command goes on where the time ended. The table says how many seeds each line has: means and standard deviations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sdtrain.cli import main as sdtrain
from sdtrain.data.pack.splits import split, write_lists
from sdtrain.main import main as train

METRICS = ("fid", "lpips", "psnr_y", "ssim_y")
METHODS: dict[str, dict[str, Any]] = {
    "naive (C, 1)": {"stages": ["naive"], "student": {"C": "1/4", "D_C": 1}},
    "naive (C, C)": {"stages": ["naive"]},
    "Ablation 3": {"stages": ["supervised", "adversarial"], "adversary": "teacher"},
    "SDAKD": {"stages": ["supervised", "adversarial"]},
}
ADAM = {"betas": [0.9, 0.99]}


def pack(source: Path, out: Path) -> dict[str, str]:
    """Train tiles of 128 px, held-back tiles of 256 px."""
    photos = out / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*.png")):
        link = photos / path.name
        if not link.exists():
            link.symlink_to(path.resolve())
    names = sorted(path.name for path in photos.iterdir())
    write_lists(out, split(names, {"val": 3, "test": 7}, seed=0))
    common = ["--shard-count", "1", "--workers", "1"]
    for part in ("val", "test"):
        given = [str(photos), str(out / part), "--tile", "256", "--list", str(out / f"{part}.txt")]
        assert sdtrain(["pack", *given, *common]) == 0
    given = [str(photos), str(out / "train"), "--tile", "128", "--exclude-list", str(out / "held_out.txt")]
    assert sdtrain(["pack", *given, *common]) == 0
    return {part: str(out / part) for part in ("train", "val", "test")}


def settings(data: dict[str, str], seed: int, steps: int) -> dict[str, Any]:
    """What every run shares: networks, data, learning rates; the student sees `steps` batches in every method."""
    supervised = steps * 5 // 8  # the rest is the game with D; the original recipe has 5/7 of L1 alone
    rates = {"G_pixel": 1e-3, "G_sup": 1e-3, "D_sup": 5e-4}
    rates |= {name: 2e-4 for name in ("G_original", "D_original", "G", "D")}
    return {
        "method": "sdakd",
        "seed": seed,
        "batch_size": 8,
        "ghost_batch": 8,
        "n1": f"{steps} steps",
        "n2": f"{supervised} steps",
        "n3": f"{steps - supervised} steps",
        "data": {**data, "workers": 1},
        "log_img": 800,
        "save_img": 0,
        "sample_img": 10_000_000,  # once, at the end
        "eval_img": steps * 8,  # besides the end of each stage
        "eval_epochs": 0,
        "tracker": "none",
        "lq": "bicubic",
        "degradation": {"crop_size": 64},
        "model": {
            "generator": {"kind": "srvgg", "num_feat": 32, "num_conv": 6},
            "discriminator": {"kind": "unet_sn", "num_feat": 16},
        },
        "student": {"C": "1/4"},
        "recipe": {"perceptual": 0, "adversarial": 0.01, "pixel_share": 0.625, "sharpen_target": False},
        "supervision": {"perceptual": 0},
        "lambda_1": 0.1,
        "lambda_2": 0.01,
        "optimizer": {name: {"lr": lr, **ADAM} for name, lr in rates.items()},
        "ema": {"decay": 0.99, "rampup": None},
        "validation": {"lq": "bicubic", "names": list(METRICS), "select_by": "fid"},
        "metrics": {"extractor": "random-inception", "tap": 64},
        "weights": {"alex": "random"},
    }


def run(out: Path, name: str, tree: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Train unless that is done; {student, bicubic, teacher: test values} and the discriminators' outputs."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.yaml").write_text(json.dumps(tree))
    if not (folder / "run" / "done.json").exists():
        code = train(["--cfg", str(folder / "compare.yaml"), "--out", str(folder / "run")])
        assert code == 0, f"{name} ended with {code}"
        (folder / "run" / "done.json").write_text("{}")
    found: dict[str, Any] = {}
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("split") == "test":
            found[row.get("method", "student")] = {m: row[m] for m in METRICS}
    said = sorted((folder / "run" / "samples").glob("d_outputs_*.json"))[-1]
    outputs = {k: v for k, v in json.loads(said.read_text()).items() if isinstance(v, dict)}
    found["d"] = {k: statistics.fmean(v["probabilities"]) for k, v in outputs.items()}
    found["counts"] = {k: v["counts"] for k, v in outputs.items()}
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'':<16}{'seeds':>6}" + "".join(f"{m:>20}" for m in METRICS) + f"{'mean P(real)':>26}"]
    for name, found in results.items():
        cells = []
        for m in METRICS:
            values = [r["student"][m] for r in found]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.fmean(values):12.4f} +-{spread:6.4f}")
        judged = {k: [r["d"][k] for r in found if k in r.get("d", {})] for k in ("D_T", "D_S", "D_T_judge")}
        shown = "  ".join(f"{k} {statistics.fmean(v):.3f}" for k, v in judged.items() if v)
        lines.append(f"{name:<16}{len(found):>6}" + "".join(f"{c:>20}" for c in cells) + f"{shown:>26}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="batches of 8 for the student; twice for teachers")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further run after this long")
    args = parser.parse_args()
    os.environ.setdefault("SDTRAIN_CPU", "1")
    data, end = pack(args.source, args.out), time.monotonic() + 60 * args.minutes
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        shared = settings(data, seed, args.steps)
        alone = {"stages": ["naive"], "n1": f"{2 * args.steps} steps", "student": {"C": 1}}
        if time.monotonic() > end:
            break
        taught = run(args.out, f"teacher_{seed}", {**shared, **alone})
        results.setdefault("teacher", []).append(taught)
        results.setdefault("bicubic", []).append({"student": taught["bicubic"], "d": {}})
        best = args.out / f"teacher_{seed}" / "run" / "best"
        files = {"generator": str(best / "G_ema.safetensors"), "discriminator": str(best / "naive_last_D.safetensors")}
        for name, changes in METHODS.items():
            if time.monotonic() > end:
                break
            teacher = {} if changes["stages"] == ["naive"] else {"teacher": files}
            key = f"{name.replace(' ', '').replace('(', '_').replace(')', '').replace(',', '')}_{seed}"
            results.setdefault(name, []).append(run(args.out, key, {**shared, **teacher, **changes}))
            (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
