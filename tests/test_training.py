"""Without these, a curve depends on how many GPUs were free that day, and a mistake is found after a night.

Invariants 1 (world-size invariance), 2 (randomness is a function) and 3 (sample order is a function) on whole runs,
`--plan`, and the messages of main.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_python
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, worst, write_config

from sdtrain import loop
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.stream import Stream
from sdtrain.rng import Draws

STEPS, BATCH = 20, 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    make_shards(folder / "shards")
    clock = {"total_img": STEPS * BATCH, "log_img": BATCH, "save_img": STEPS * BATCH}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock))
    return folder


def args(place: Path, out: str, *more: str) -> list[str]:
    return ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), *more]


LPIPS = ("--set", "sd.loss=lpips-vgg", "--set", f"total_img={2 * BATCH}")


@pytest.fixture(scope="module")
def worlds(place: Path) -> dict[int, Path]:
    """The same 20 steps, with Ghost BN and DiffAugment, on 1, 2 and 4 ranks."""
    for ranks in (1, 2, 4):
        jobs = [{"args": args(place, f"world{ranks}")}]
        if ranks < 4:
            jobs.append({"args": args(place, f"lpips{ranks}", *LPIPS)})
        for told in run_jobs(place, jobs, ranks):
            assert [r["code"] for r in told.get("ranks", [told])] == [0] * ranks, told
    found = {ranks: place / f"world{ranks}" for ranks in (1, 2, 4)}
    for ranks, out in found.items():
        starts = json.loads((out / "environment.json").read_text())["starts"]
        assert [start["world_size"] for start in starts] == [ranks]
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_invariant_1_every_logged_loss_of_20_steps_is_the_same_on_1_2_and_4_ranks(
    worlds: dict[int, Path], ranks: int
) -> None:
    reference, other = rows(worlds[1]), rows(worlds[ranks])
    assert len(reference) == STEPS and {"G/adv", "G/sd", "D/real", "D/fake", "D/real_sign"} <= reference[0].keys()
    deviation = worst(reference, other)
    print(f"worst relative deviation, {ranks} ranks against 1:", deviation)
    assert deviation[0] <= 1e-4


@pytest.mark.parametrize("ranks", [2, 4])
def test_invariant_1_weights_statistics_and_optimizers_are_the_same_on_1_2_and_4_ranks(
    worlds: dict[int, Path], ranks: int
) -> None:
    one, other = tensors(worlds[1], STEPS * BATCH), tensors(worlds[ranks], STEPS * BATCH)
    assert one.keys() == other.keys()
    assert any("running_mean" in name for name in one) and any("weight_u" in name for name in one)
    apart = {name: float(np.abs(one[name] - other[name]).max(initial=0)) for name in one}
    print(f"largest difference of any tensor, {ranks} ranks against 1:", max(apart.values()))
    assert max(apart.values()) <= 1e-4


def test_invariant_1_holds_for_the_perceptual_loss_too(place: Path, worlds: dict[int, Path]) -> None:
    deviation = worst(rows(place / "lpips1"), rows(place / "lpips2"))
    print("worst relative deviation with LPIPS, 2 ranks against 1:", deviation)
    assert deviation[0] <= 1e-4


def test_invariant_2_random_numbers_depend_on_seed_purpose_step_and_ghost_alone() -> None:
    def draw(ghosts: tuple[int, ...], step: int = 3, seed: int = 0) -> torch.Tensor:
        return Draws(seed=seed, step=step, ghosts=ghosts, ghost_batch=2).normal("z", 5)

    torch.manual_seed(1)
    both, ambient = draw((2, 3)), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(both, torch.cat([draw((2,)), draw((3,))]))
    assert not torch.equal(both, draw((2, 3), step=4)) and not torch.equal(both, draw((2, 3), seed=1))
    torch.manual_seed(1)
    assert torch.equal(ambient, torch.get_rng_state())  # nothing was taken from the ambient generator


def test_invariant_3_ranks_read_the_samples_that_one_rank_would_read(place: Path) -> None:
    dataset = open_dataset(str(place / "shards"), cache=place / "cache")

    def indices(ghosts: range, start: int, num: int) -> list[torch.Tensor]:
        more = {"seed": 0, "batch_size": BATCH, "ghost_batch": 4, "workers": 0}
        with Stream(dataset, ghosts=tuple(ghosts), start_step=start, **more) as stream:
            return [next(stream).indices.clone() for _ in range(num)]

    whole = indices(range(4), 0, 8)
    halves = [indices(range(0, 2), 5, 3), indices(range(2, 4), 5, 3)]
    for late, first, second in zip(whole[5:], *halves, strict=True):
        assert torch.equal(late, torch.cat([first, second]))
    epoch = torch.cat(whole[:3])
    assert sorted(epoch.tolist()) == list(range(48))


def snapshot(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "interval, begin, end, due",
    [(8, 0, 8, 0), (8, 0, 9, 1), (8, 8, 17, 2), (8, 9, 16, 0), (6, 16, 25, 2), (0, 0, 9, 0)],
)
def test_time_that_is_left_counts_the_evaluations_that_are_due(interval: int, begin: int, end: int, due: int) -> None:
    run: Any = SimpleNamespace(task=SimpleNamespace(eval_img=interval))
    assert loop.evaluations(run, begin, end) == due


def test_plan_prints_what_the_run_needs_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    write_config(tmp_path / "plan.yaml", tiny_config(tmp_path / "shards", sd__loss="lpips-vgg"))
    before = snapshot(tmp_path)
    done = run_python("sdtrain/main.py", "--cfg", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "run"), "--plan")
    assert done.returncode == 0, done.stderr
    for words in (
        "48 samples in 3 shards",
        "6 steps, a tick is 2 = 32 images",
        "4 ghosts: run on 1, 2, 4 ranks",
        "M parameters",
        "MB weights",
        "gradients",
        "optimizer",
        " a rank",
        "MB a checkpoint",
        "lpips_vgg: random",
        "eval_img",
    ):
        assert words in done.stdout, (words, done.stdout)
    assert snapshot(tmp_path) == before


FAKE_TORCH = "raise SystemExit(99)\n"  # whoever imports torch before this mistake is found ends with another code


def mistake(tmp_path: Path, config: dict[str, Any], *more: str, env: dict[str, str] | None = None) -> str:
    """Run main.py, expect code 2, no traceback, no torch, nothing written; returns the message."""
    (tmp_path / "no_torch").mkdir(exist_ok=True)
    (tmp_path / "no_torch" / "torch.py").write_text(FAKE_TORCH)
    write_config(tmp_path / "bad.yaml", config)
    before = snapshot(tmp_path)
    command = ["-B", "sdtrain/main.py", "--cfg", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "run"), *more]
    done = run_python(*command, env={"PYTHONPATH": str(tmp_path / "no_torch"), **(env or {})})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("sdtrain: ")
    new = {path for path in snapshot(tmp_path) - before if "/cache" not in path}
    assert not new
    return done.stderr


def test_missing_weights_are_one_sentence_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    config = tiny_config(place / "shards", sd__loss="lpips-vgg", weights__lpips=str(tmp_path / "vgg.pth"))
    said = mistake(tmp_path, config)
    assert "vgg.pth" in said


def test_ranks_that_do_not_divide_the_ghosts_are_told_which_do(place: Path, tmp_path: Path) -> None:
    said = mistake(tmp_path, tiny_config(place / "shards"), env={"WORLD_SIZE": "3", "RANK": "0"})
    assert "3 ranks cannot share 4 ghosts" in said and "launch one of 1, 2, 4 ranks" in said


def test_fewer_samples_than_a_batch_and_a_pattern_that_matches_nothing_are_told(place: Path, tmp_path: Path) -> None:
    few = tiny_config(place / "shards", batch_size=64, total_img=64, log_img=64, save_img=64)
    assert "has 48 samples, fewer than one batch of 64; lower batch_size" in mistake(tmp_path, few)
    said = mistake(tmp_path, tiny_config(place / "shards", data__train=str(tmp_path / "none-*.tar")))
    assert "no shard matches" in said and "none-*.tar" in said


@pytest.fixture
def existing(place: Path, tmp_path: Path) -> Path:
    """A run folder as far as it is looked at before torch: its configuration, and that it has a checkpoint."""
    from sdtrain.config.compare import dump
    from sdtrain.config.load import load_config

    (tmp_path / "run" / "checkpoints" / "img_000000016").mkdir(parents=True)
    config = load_config(write_config(tmp_path / "bad.yaml", tiny_config(place / "shards")))
    (tmp_path / "run" / "config.yaml").write_text(dump(config))
    return tmp_path


def test_a_run_folder_of_another_configuration_is_refused_with_the_keys_that_differ(
    place: Path, existing: Path
) -> None:
    said = mistake(existing, tiny_config(place / "shards", sd__alpha=0.5, seed=7, log_img=16))
    assert "holds a run of another configuration" in said
    assert "sd.alpha: 1.0 -> 0.5" in said and "seed: 0 -> 7" in said and "--allow KEY" in said
    assert "log_img" not in said  # changes no weight
    said = mistake(existing, tiny_config(place / "shards", sd__alpha=0.5, seed=7), "--allow", "sd.alpha")
    assert "seed" in said and "sd.alpha" not in said


def test_an_out_folder_that_cannot_be_written_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = ["--cfg", str(place / "tiny.yaml"), "--out", str(tmp_path / "file")]
    done = run_jobs(tmp_path, [{"args": out}])[0]
    assert done["code"] == 2 and "Traceback" not in done["said"]
    assert "the run folder cannot be written (File exists); choose another with --out" in done["said"]
