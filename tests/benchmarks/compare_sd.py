"""A real training comparison: a small StyleGAN2 at 32 px with and without self-distillation, equal images seen.

Arms: baseline, SD with LPIPS (seeded random trunk), SD with L1; several seeds. Measured on the averaged generator:
rFID along training, its spread over seeds, how smooth the losses are (variance of the differences of successive log
rows over the variance of the rows), and the perceptual variation of fixed latents across checkpoints from 20 % to
100 % (SD-GAN, Table 3), for G_ema and G, by LPIPS with the same random trunk.

Seeds are the outer loop, so that a budget of minutes that runs out leaves whole comparisons. A finished run is not
repeated; rows go to OUT/rows.jsonl, one a run.

usage: python tests/benchmarks/compare_sd.py IMAGES OUT [--img 4000] [--seeds 3] [--minutes 60]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ARMS = {
    "baseline": {"alpha": 0.0},
    "SD LPIPS": {"alpha": 1.0, "loss": "lpips-vgg", "augment": True},
    "SD L1": {"alpha": 1.0, "loss": "l1", "augment": False},
}
MARKS = 10  # checkpoints in a run, every second one evaluated; Table 3 uses those from 20 % on
LATENTS = 64
LOSSES = ("G/adv", "D/loss")


def configuration(shards: Path, args: argparse.Namespace, seed: int, arm: str) -> dict[str, Any]:
    """Lazy penalties, style mixing and ADA as in the official presets; only widths and batch are small."""
    step = args.img // MARKS // 16 * 16
    net = {"kind": "stylegan2", "channel_base": args.width * 16, "channel_max": args.width}
    return {
        "method": "sdgan", "name": "compare", "seed": seed, "batch_size": 16, "ghost_batch": 8, "summation": "fast",
        "total_img": step * MARKS, "log_img": 16, "sample_img": step * MARKS, "eval_img": 2 * step, "save_img": step,
        "keep_checkpoints": MARKS, "tracker": "none",
        "data": {"train": str(shards), "resolution": 32, "xflip": True, "workers": 0},
        "model": {
            "generator": {**net, "z_dim": 64, "w_dim": 64, "mapping_layers": 2},
            "discriminator": {**net, "mbstd_group": 4},
        },
        "adversarial": "logistic", "style_mixing": 0.9, "path_length": {"weight": 2.0, "every": 4},
        "r1": {"gamma": args.gamma, "every": 16},
        "augment": {"kind": "ada", "policy": "bgc", "speed_img": 100_000},
        "optimizer": {
            "G": {"lr": 0.0025 * 4 / 5, "betas": [0.0, 0.99 ** (4 / 5)]},
            "D": {"lr": 0.0025 * 16 / 17, "betas": [0.0, 0.99 ** (16 / 17)]},
        },
        "ema": {"half_life_img": 500, "rampup": 0.05}, "sd": ARMS[arm],
        "weights": {"lpips": "random", "inception": "random"},
        "metrics": {
            "names": ["rfid"], "num_fake": args.num, "num_real": args.num, "tap": 64, "seeds": args.rfid_seeds,
            "select_by": "rfid",
        },
    }  # fmt: skip


def train(shards: Path, args: argparse.Namespace, seed: int, arm: str) -> Path:
    """One run in a process of its own; the same command goes on with a broken one."""
    import yaml

    out = args.out / f"{arm.replace(' ', '_').lower()}_{seed}"
    out.mkdir(parents=True, exist_ok=True)
    (args.out / "cache").mkdir(exist_ok=True)
    if not (out / "cache").exists():  # statistics of the real images are the same for all runs
        (out / "cache").symlink_to(args.out / "cache")
    (out / "compare.yaml").write_text(yaml.safe_dump(configuration(shards, args, seed, arm)))
    words = [sys.executable, "sdtrain/main.py", "--cfg", str(out / "compare.yaml"), "--out", str(out)]
    with open(out / "log.txt", "a") as log:
        done = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{out}: the run failed\n{(out / 'log.txt').read_text()[-2000:]}")
    return out


def measure(out: Path, arm: str, seed: int, seconds: float) -> dict[str, Any]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = {row["seen_img"]: row["rfid"] for row in rows if row["kind"] == "eval"}
    trained = [row for row in rows if row["kind"] == "train"]
    rough = {name: roughness([row[name] for row in trained]) for name in LOSSES}
    p = [row["ada/p"] for row in trained][-1]
    varies = {role: variation(out, role) for role in ("G_ema", "G")}
    return {
        "arm": arm, "seed": seed, "rfid": curve, "roughness": rough, "variation": varies, "ada_p": p, "seconds": seconds
    }  # fmt: skip


def roughness(values: list[float]) -> dict[str, float]:
    """Variance of successive differences, and the same over the variance of the values (2 = white noise)."""
    half = values[len(values) // 5 :]
    steps = [b - a for a, b in zip(half, half[1:])]
    return {
        "differences": statistics.pvariance(steps),
        "relative": statistics.pvariance(steps) / statistics.pvariance(half),
    }


def variation(out: Path, role: str) -> tuple[float, float]:
    """Table 3: mean and deviation over fixed latents of the mean LPIPS between consecutive checkpoints."""
    import torch

    from sdtrain.interop.loading import load_network
    from sdtrain.losses.perceptual import LPIPS
    from sdtrain.metrics.variation import perceptual_variation
    from sdtrain.sampling import generate

    torch.set_num_threads(1)
    lpips = LPIPS(None).eval()
    marks = sorted((out / "checkpoints").glob("img_*"))[MARKS // 5 - 1 :]
    images = []
    for mark in marks:
        net = load_network(mark / f"{role}.safetensors", role).build()
        parts = [range(i, i + 16) for i in range(0, LATENTS, 16)]
        images.append(torch.cat([generate(net, part, seed=0, device="cpu") for part in parts]).clamp(-1, 1))
    return perceptual_variation(images, lpips)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["arm        seeds  rFID at the end    best rFID          mean over curve    G/adv rough  D rough"]
    lines[0] += "  var(G_ema)  var(G)     p     s/run"
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        if own:
            lines.append(f"{arm:<10} {len(own):>5}  {_summary(own)}")
    for arm in ARMS:
        curves = [row["rfid"] for row in rows if row["arm"] == arm]
        if curves:
            points = [(mark, [float(c[mark]) for c in curves]) for mark in curves[0]]
            text = "  ".join(f"{mark}: {_spread(values)}" for mark, values in points)
            lines.append(f"curve of {arm}: {text}")
    return "\n".join(lines)


def _summary(own: list[dict[str, Any]]) -> str:
    curves = [list(row["rfid"].values()) for row in own]
    rfid = [_spread([f(c) for c in curves]) for f in (lambda c: c[-1], min, statistics.fmean)]
    rough = [statistics.fmean(row["roughness"][name]["relative"] for row in own) for name in LOSSES]
    varies = [statistics.fmean(row["variation"][role][0] for row in own) for role in ("G_ema", "G")]
    end = f"{statistics.fmean(r['ada_p'] for r in own):.3f}  {statistics.fmean(r['seconds'] for r in own):.0f}"
    scores = "  ".join(f"{r:<17}" for r in rfid)
    return f"{scores}  {rough[0]:<11.3f}  {rough[1]:.3f}    {varies[0]:.4f}      {varies[1]:.4f}     {end}"


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def packed(args: argparse.Namespace) -> Path:
    shards = args.out / "shards"
    words = ["pack", str(args.images), str(shards), "--resolution", "32", "--workers", "1"]
    subprocess.run([sys.executable, "-m", "sdtrain.cli", *words], cwd=ROOT, check=True, capture_output=True)
    return shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("out", type=Path, help="folder for shards, runs and rows")
    parser.add_argument("--img", type=int, default=4000, help="images a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run that would probably end later")
    parser.add_argument("--width", type=int, default=32, help="channels of the widest layers")
    parser.add_argument("--num", type=int, default=500, help="images, real and generated, behind an rFID")
    parser.add_argument("--rfid-seeds", type=int, default=3, help="random networks behind an rFID")
    parser.add_argument("--gamma", type=float, default=0.1, help="weight of R1")
    args = parser.parse_args()
    begin, rows_file = time.time(), args.out / "rows.jsonl"
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    shards, spent = packed(args), {}
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.is_file() else []
    for seed in range(args.seeds):
        for arm in ARMS:
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            if time.time() - begin + spent.get(arm, 0.0) > args.minutes * 60:
                print(f"no time for {arm}, seed {seed}", flush=True)
                continue
            start = time.time()
            out = train(shards, args, seed, arm)
            spent[arm] = time.time() - start
            rows.append(json.loads(json.dumps(measure(out, arm, seed, spent[arm]))))
            with open(rows_file, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
