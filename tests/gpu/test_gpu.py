"""Whole runs on a GPU. Without these the first sign of a wrong kernel, cast or copy would be a wrong picture.

Everything here skips, with the reason, where CUDA is absent; SDTRAIN_TEST_DEVICE=cpu tries the tests themselves. The
run is the tiny one of the tests on the CPU.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, run_python, run_ranks

sys.path[:0] = [str(REPO / "tests"), str(REPO / "tests" / "gpu")]
from tiny import make_shards, rows, tensors, tiny_config, write_config  # noqa: E402
from where import DEVICE, MARKS, only_gpu  # noqa: E402

pytestmark = MARKS
BATCH = 16
TERMS = ("G/adv", "G/sd", "D/real", "D/fake")
# Convolutions of a GPU may run in TF32 (10 bits of mantissa): the first step agrees to about 2**-10 of each term.
FIRST_STEP_TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    config = tiny_config(make_shards(folder / "shards"), total_img=4 * BATCH, log_img=BATCH, save_img=2 * BATCH)
    write_config(folder / "tiny.yaml", config)
    return folder


def train(place: Path, out: str, *settings: str, device: str = DEVICE, ranks: int = 1) -> Path:
    """Train in processes of their own, all on one GPU unless `device` is cpu, and return the run folder."""
    sets = [part for setting in settings for part in ("--set", setting)]
    args = ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), *sets]
    env = {"PYTHONPATH": str(REPO), **({"SDTRAIN_CPU": "1"} if device == "cpu" else {})}
    if ranks == 1:
        done = run_python("sdtrain/main.py", *args, env=env, timeout=600)
    else:
        done = run_ranks(ranks, "tests/gpu/ranks.py", *args, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / out


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return train(place, "whole")


@only_gpu
def test_training_runs_on_the_gpu_and_says_how_much_memory_it_took(whole: Path):
    perf = rows(whole, "perf")
    assert len(rows(whole, "train")) == 4 and all(row["peak_mem_gb"] > 0 for row in perf)


def test_the_losses_of_the_first_step_are_those_of_the_cpu(place: Path, whole: Path):
    on_gpu, on_cpu = rows(whole, "train")[0], rows(train(place, "cpu", f"total_img={BATCH}", device="cpu"), "train")[0]
    assert on_gpu.keys() == on_cpu.keys()
    for name in TERMS:
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=FIRST_STEP_TOLERANCE, abs=FIRST_STEP_TOLERANCE), name


def test_bf16_stays_finite_and_near_fp32(place: Path, whole: Path):
    found, exact = (rows(out, "train") for out in (train(place, "bf16", "precision=bf16"), whole))
    assert all(math.isfinite(value) for row in found for value in row.values() if isinstance(value, float))
    assert found[0]["D/real"] == pytest.approx(exact[0]["D/real"], rel=0.05, abs=0.05)
    assert found[0]["D/real"] != exact[0]["D/real"], "autocast had no effect"


def test_a_run_goes_on_from_a_checkpoint_of_the_gpu_as_if_never_stopped(place: Path, whole: Path):
    half = train(place, "half")
    shutil.rmtree(half / "checkpoints" / f"img_{4 * BATCH:09d}")  # as if it had been killed after the first save
    resumed, uninterrupted = rows(train(place, "half"), "train"), rows(whole, "train")
    assert [row["seen_img"] for row in resumed] == [row["seen_img"] for row in uninterrupted]
    for name in TERMS:  # kernels that search for the fastest need not repeat their bits
        assert resumed[-1][name] == pytest.approx(uninterrupted[-1][name], rel=0.05, abs=0.05), name


def test_two_ranks_that_share_the_device_train_as_one_and_hold_equal_weights(place: Path, whole: Path):
    two, one = train(place, "two", "summation=exact", ranks=2), train(place, "one", "summation=exact")
    for found, wanted in zip(rows(two, "train"), rows(one, "train"), strict=True):
        for name in TERMS:
            assert found[name] == pytest.approx(wanted[name], rel=0.02, abs=0.02), name
    assert tensors(two, 4 * BATCH).keys() == tensors(one, 4 * BATCH).keys()  # a save compares the ranks' copies


@pytest.mark.slow
def test_a_run_with_compiled_parts_has_the_first_losses_of_a_plain_one_and_its_names(place: Path, whole: Path):
    out = train(place, "compiled", "compile=frozen")
    found, wanted = rows(out, "train")[0], rows(whole, "train")[0]
    assert all(found[name] == pytest.approx(wanted[name], rel=0.01, abs=0.01) for name in TERMS)
    assert tensors(out, 4 * BATCH).keys() == tensors(whole, 4 * BATCH).keys()


def test_bench_measures_every_variant_on_the_device(place: Path):
    places = ["--cfg", str(place / "tiny.yaml"), "--json", str(place / "bench.json")]
    done = run_python("-m", "sdtrain.cli", "bench", *places, "--steps", "1", "--device", DEVICE, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sd-l1" in done.stdout and json.loads((place / "bench.json").read_text().splitlines()[-1])


@only_gpu
def test_a_save_is_a_copy_in_pinned_memory_that_later_steps_leave_alone():
    from sdtrain.engine.staging import Staging

    staging, weights = Staging(torch.device("cuda")), torch.rand(1000, 1000, device="cuda")
    before = weights.cpu()
    staged = staging.take({"G": {"weight": weights, "step": torch.tensor(3.0)}})["G"]
    weights.zero_()
    assert staged.data.is_pinned() and torch.equal(staged.data[4:].view(torch.float32), before.view(-1))


@only_gpu
def test_batches_lie_in_pinned_memory(place: Path):
    from sdtrain.data.read.dataset import open_dataset
    from sdtrain.data.read.stream import Stream

    dataset = open_dataset(str(place / "shards"))
    with Stream(dataset, seed=0, batch_size=BATCH, ghost_batch=4, ghosts=range(4), workers=0) as stream:
        batch = next(stream)
    assert batch.images.is_pinned() and batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images.to("cuda", non_blocking=True).cpu(), batch.images)


def test_features_of_the_gpu_are_those_of_the_cpu():
    from sdtrain.metrics.features import random_inception

    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (
        random_inception(0, 64, lambda: [images], device)(images.to(device)).cpu() for device in ("cpu", DEVICE)
    )
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-4)  # fp32 without TF32
