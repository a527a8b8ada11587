"""StyleGAN2 in whole runs: path length, style mixing, lazy R1 and ADA, on several ranks and across a stop.

Without these tests the number of GPUs could change a StyleGAN2 curve, or a resumed run could forget ADA's p, the mean
path length or where it stood between two lazy penalties.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, unequal, worst, write_config

STEPS, BATCH = 20, 8
NET = {"kind": "stylegan2", "channel_base": 128, "channel_max": 8}
STYLE: dict[str, Any] = {
    "model": {
        "generator": {**NET, "z_dim": 8, "w_dim": 8, "mapping_layers": 2},
        "discriminator": {**NET, "mbstd_group": 2},
    },
    "adversarial": "logistic", "batch_size": BATCH, "ghost_batch": 2, "total_img": STEPS * BATCH, "log_img": BATCH,
    "save_img": STEPS * BATCH, "style_mixing": 0.9, "path_length__weight": 2.0, "path_length__every": 4,
    "r1__gamma": 1.0, "r1__every": 8, "sd__augment": False,
    "augment": {"kind": "ada", "p": 0.3, "interval": 2, "speed_img": 2000},
}  # fmt: skip


def configured(folder: Path, **changes: Any) -> Path:
    shards = folder / "shards"
    if not shards.exists():
        make_shards(shards)
    return write_config(folder / "style.yaml", tiny_config(shards, **json.loads(json.dumps({**STYLE, **changes}))))


def job(config: Path, out: str, *sets: str) -> dict[str, Any]:
    more = [word for value in sets for word in ("--set", value)]
    return {"args": ["--cfg", str(config), "--out", str(config.parent / out), *more]}


def run_all(folder: Path, jobs: list[dict[str, Any]], ranks: int = 1) -> None:
    for told in run_jobs(folder, jobs, ranks):
        assert all(r["code"] == 0 for r in told.get("ranks", [told])), told


def test_every_logged_loss_of_20_steps_is_the_same_on_1_and_2_ranks(tmp_path: Path) -> None:
    config = configured(tmp_path)
    for ranks in (1, 2):
        fixed = job(config, f"fixed{ranks}", "augment.target=null")
        run_all(tmp_path, [job(config, f"moving{ranks}"), fixed], ranks)
    for name in ("moving", "fixed"):
        one, two = rows(tmp_path / f"{name}1"), rows(tmp_path / f"{name}2")
        assert {"G/pl", "D/r1"} <= {key for row in one for key in row}
        assert worst(one, two)[0] < 1e-4
        p = {row["ada/p"] for row in one if "ada/p" in row}
        assert len(p) > 2 if name == "moving" else not p


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit_with_p_path_length_and_lazy_phase(tmp_path: Path) -> None:
    config, stop = configured(tmp_path, save_img=6 * BATCH), 6 * BATCH  # between two penalties of both kinds
    whole, parts = job(config, "whole"), [job(config, "parts", f"total_img={stop}"), job(config, "parts")]
    run_all(tmp_path, [whole, *parts])
    end = STEPS * BATCH
    assert not unequal(tensors(tmp_path / "whole", end), tensors(tmp_path / "parts", end))
    state = json.loads((tmp_path / "parts" / "checkpoints" / f"img_{end:09d}" / "state.json").read_text())["method"]
    assert state["p"] != 0.3 and state["pl_mean"] > 0
    assert worst(rows(tmp_path / "whole"), rows(tmp_path / "parts"))[0] == 0


@pytest.mark.slow
def test_the_losses_are_the_same_on_4_ranks(tmp_path: Path) -> None:
    config = configured(tmp_path)
    for ranks in (1, 4):
        run_all(tmp_path, [job(config, f"world{ranks}")], ranks)
    assert worst(rows(tmp_path / "world1"), rows(tmp_path / "world4"))[0] < 1e-4
