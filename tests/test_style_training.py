"""StyleGAN2 and StyleNAT in whole runs: every option of their training, on several ranks and across a stop.

Without these tests the number of GPUs could change a curve, a resumed run could forget ADA's p, the mean path length or
where it stood between two lazy penalties, or an option of the teacher could do nothing.
"""

from __future__ import annotations

import itertools
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
STYLENAT: dict[str, Any] = {
    "model": {
        "generator": {
            "kind": "stylenat", "style_dim": 8, "mlp_layers": 2, "channel_max": 16, "min_heads": 2,
            "kernels": [[3]] * 4, "dilations": [[1], [1], [1, 2], [1, 4]],
        },
        "discriminator": {"kind": "stylenat", "channel_max": 8, "mbstd_group": 2},
    },
    "adversarial": "logistic", "batch_size": BATCH, "ghost_batch": 2, "total_img": STEPS * BATCH, "log_img": BATCH,
    "save_img": 6 * BATCH, "bcr": 10.0, "r1__gamma": 1.0, "r1__every": 8, "augment": {"kind": "none"},
    "optimizer__D__clip_norm": 5.0, "sd__alpha": 0.25, "sd__loss": "lpips-vgg",
}  # fmt: skip
STAGES = {"widths": [16, 16, 8, 8], "groups": [2, 2, 2, 2], "blocks": [1, 1, 1, 1]}
HALF = STEPS * BATCH // 2
R3GAN: dict[str, Any] = {
    "model": {"generator": {"kind": "r3gan", "z_dim": 8, **STAGES}, "discriminator": {"kind": "r3gan", **STAGES}},
    "adversarial": "relativistic", "order": "D first", "fake_labels": "real", "sd__alpha": 1.0, "sd__loss": "l1",
    "batch_size": BATCH, "ghost_batch": 2, "total_img": STEPS * BATCH, "log_img": BATCH, "save_img": 6 * BATCH,
    "r1": {"gamma": {"points": [[0, 1.0], [HALF, 0.1]], "curve": "cosine"}, "every": 1, "on": "both", "joint": True},
    "augment": {"kind": "ada", "policy": "r3gan", "p": {"points": [[0, 0.0], [HALF, 0.5]]}, "target": None},
    "ema__half_life_img": {"points": [[0, 0.0], [HALF, 100.0]], "curve": "cosine"}, "ema__rampup": None,
    "optimizer__G__betas": [0.0, {"points": [[0, 0.9], [HALF, 0.99]], "curve": "cosine"}],
}  # fmt: skip
TEACHERS = {
    "matched": {},
    "unmixed": {"sd__mixing": "none"},
    "other noise": {"sd__noise": "independent"},
    "both": {"sd__mixing": "none", "sd__noise": "independent"},
}


def configured(folder: Path, options: dict[str, Any] = STYLE, **changes: Any) -> Path:
    shards = folder / "shards"
    if not shards.exists():
        make_shards(shards)
    config = tiny_config(shards, **json.loads(json.dumps({**options, **changes})))
    return write_config(folder / f"style{len(list(folder.glob('*.yaml')))}.yaml", config)


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
def test_stylenat_is_the_same_on_2_ranks_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config, end = configured(tmp_path, STYLENAT), STEPS * BATCH
    run_all(tmp_path, [job(config, "one"), job(config, "parts", f"total_img={6 * BATCH}"), job(config, "parts")])
    run_all(tmp_path, [job(config, "two")], ranks=2)
    assert {"G/sd", "D/bcr", "D/r1"} <= {key for row in rows(tmp_path / "one") for key in row}
    assert worst(rows(tmp_path / "one"), rows(tmp_path / "two"))[0] < 1e-4
    assert worst(rows(tmp_path / "one"), rows(tmp_path / "parts"))[0] == 0
    assert not unequal(tensors(tmp_path / "one", end), tensors(tmp_path / "parts", end))


@pytest.mark.slow
def test_r3gan_with_self_distillation_is_the_same_on_2_ranks_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config, end = configured(tmp_path, R3GAN), STEPS * BATCH
    run_all(tmp_path, [job(config, "one"), job(config, "parts", f"total_img={6 * BATCH}"), job(config, "parts")])
    run_all(tmp_path, [job(config, "two")], ranks=2)
    assert {"G/adv", "G/sd", "D/pair", "D/r1", "D/r2"} <= {key for row in rows(tmp_path / "one") for key in row}
    assert worst(rows(tmp_path / "one"), rows(tmp_path / "two"))[0] == 0
    assert worst(rows(tmp_path / "one"), rows(tmp_path / "parts"))[0] == 0
    assert not unequal(tensors(tmp_path / "one", end), tensors(tmp_path / "parts", end))


@pytest.mark.slow
def test_every_teacher_learns_the_same_on_2_ranks_and_each_option_changes_what_it_says(tmp_path: Path) -> None:
    short = {"total_img": 3 * BATCH, "save_img": 3 * BATCH, "sd__alpha": 0.25}
    configs = {name: configured(tmp_path, **short, **changes) for name, changes in TEACHERS.items()}
    for ranks in (1, 2):
        run_all(tmp_path, [job(config, f"{name} {ranks}") for name, config in configs.items()], ranks)
    L_SD = {name: [row["G/sd"] for row in rows(tmp_path / f"{name} 1") if "G/sd" in row] for name in TEACHERS}
    for name in TEACHERS:
        assert worst(rows(tmp_path / f"{name} 1"), rows(tmp_path / f"{name} 2"))[0] < 1e-4
    # G_ema begins as G, and layer noise with strength zero
    assert L_SD["matched"][0] == L_SD["other noise"][0] == 0 < L_SD["unmixed"][0] == L_SD["both"][0]
    assert len({values[-1] for values in L_SD.values()}) == 4


@pytest.mark.slow
def test_ada_serves_any_generator(tmp_path: Path) -> None:
    ada = {"augment": {"kind": "ada", "p": 0.3, "interval": 2, "speed_img": 2000}, "sd__alpha": 0.25}
    config = configured(tmp_path, {}, **ada, log_img=16)
    for ranks in (1, 2):
        run_all(tmp_path, [job(config, f"fastgan{ranks}")], ranks)
    one, two = rows(tmp_path / "fastgan1"), rows(tmp_path / "fastgan2")
    assert len({row["ada/p"] for row in one if "ada/p" in row}) > 2 and worst(one, two)[0] < 1e-4


@pytest.mark.parametrize(
    "options, change, sentence",
    [
        (STYLE, {"augment__interval": 7}, "too few to tune ADA: it moves p by the signs of D on 56"),
        (STYLE, {"data__labels": True}, "has no class labels and data.labels is true"),
        (STYLE, {"data__resolution": 64}, "holds images of 32 px and data.resolution is 64"),
        (STYLENAT, {"model__generator__kernels": [[9]] * 4}, "9"),
    ],
)
def test_what_the_data_cannot_do_is_one_sentence_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], change: dict[str, Any], sentence: str
) -> None:
    config = configured(tmp_path, options, **change)
    (told,) = run_jobs(tmp_path, [job(config, "out")])
    assert told["code"] == 2 and sentence in told["said"] and "Traceback" not in told["said"], told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, name", [(STYLE, "StyleGAN2"), (STYLENAT, "StyleNAT")])
def test_a_resolution_that_is_no_power_of_two_is_one_sentence(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    make_shards(tmp_path / "shards", side=24)
    (told,) = run_jobs(tmp_path, [job(configured(tmp_path, options), "out")])
    assert told["code"] == 2 and "Traceback" not in told["said"] and not (tmp_path / "out").exists(), told
    assert all(words in told["said"] for words in (name, "resolution 24", "power of two")), told


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


@pytest.mark.slow
@pytest.mark.parametrize("summation", ["exact", "fast"])
def test_batch_norms_of_each_ghost_learn_the_same_on_2_ranks(tmp_path: Path, summation: str) -> None:
    own = {"model__generator__own_norms": 4, "batch_size": BATCH, "ghost_batch": 2, "summation": summation}
    config = configured(tmp_path, {}, **own, log_img=BATCH, total_img=6 * BATCH, save_img=6 * BATCH)
    for ranks in (1, 2):
        run_all(tmp_path, [job(config, f"own{ranks}")], ranks)
    assert worst(rows(tmp_path / "own1"), rows(tmp_path / "own2"))[0] < 1e-4
    weights = tensors(tmp_path / "own2", 6 * BATCH)
    norms = [weights[f"G:synthesis.init.init.1.bns.{i}.weight"] for i in range(4)]
    assert not any((a == b).all() for a, b in itertools.combinations(norms, 2))  # all have learned
