"""Thousands of ranks: without these, start-up, ticks and plans would grow with the world, and nobody here would see it.

None of them has that many processes: what a rank does is counted, what it sends is a formula, and the order of samples
is walked for every rank.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import run_ranks
from tiny import make_shards, tiny_config, write_config

from sdtrain import loop
from sdtrain.config.load import load_config
from sdtrain.data.read import stream
from sdtrain.data.read.dataset import Dataset
from sdtrain.data.read.index import _index_of
from sdtrain.data.read.pool import shared_out
from sdtrain.engine import ranks, watch
from sdtrain.engine.meter import Meter
from sdtrain.engine.preempt import StopRequest
from sdtrain.engine.pulse import Mark
from sdtrain.engine.scale import Asked, for_more, predicted, sent_in_step
from sdtrain.engine.timing import Timer
from sdtrain.main import main
from sdtrain.plan import make_plan, render
from sdtrain.run import Run

COLLECTIVES = ("all_reduce", "all_gather_object", "broadcast_object_list", "broadcast", "barrier", "all_gather")
RANKS, WORKERS, IMAGES = 1024, 8, 70_000


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("scale") / "shards")


def a_run(rows: list[dict[str, Any]]) -> Any:
    """What a tick looks at."""
    meter = Meter()
    meter.add({"G/adv": torch.tensor(3.0), "D/real": torch.tensor(1.0)})
    meter.count(["G/adv", "D/real"])
    timer = Timer(torch.device("cpu"))
    timer.seconds["data"] = 0.5
    folder = SimpleNamespace(row=lambda kind, at, values: rows.append({"kind": kind, "seen_img": at, **values}))
    config = SimpleNamespace(batch_size=16)
    stages = [SimpleNamespace(name="main", end_img=96)]
    task, method = SimpleNamespace(eval_img=0), SimpleNamespace(stages=stages)
    engine, device = SimpleNamespace(meter=meter), torch.device("cpu")
    counts: dict[str, Any] = {"seen_img": 32, "timed_from_img": 16, "skipped": 0, "eval_seconds": 0.0}
    counts["bad_samples"] = ["a.png", "b.png"]
    parts = {"engine": engine, "device": device, "timer": timer, "folder": folder, "config": config, "task": task}
    run = SimpleNamespace(**parts, **counts, method=method, stage=stages[0])
    run.restart_timer = partial(Run.restart_timer, run)
    return run


def test_a_tick_is_two_collectives_of_as_many_numbers_at_any_world_size(
    alone_in_a_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, int]] = []
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(value: Any, *args: Any, original: Any = original, name: str = name, **more: Any) -> Any:
            sent.append((name, value.numel() if isinstance(value, torch.Tensor) else -1))
            return original(value, *args, **more)

        monkeypatch.setattr(dist, name, counted)
    rows: list[dict[str, Any]] = []
    loop.tick(a_run(rows))
    assert sent == [("all_reduce", 2), ("all_reduce", 2)]
    train, perf = rows
    assert train["G/adv"] == 3.0 and train["D/real"] == 1.0
    assert perf["bad_samples"] == 2 and isinstance(perf["bad_samples"], int)
    assert perf["data_wait_frac"] > 0 and perf["peak_mem_gb"] > 0


def test_speed_counts_the_images_that_were_timed_where_a_start_or_a_stage_lies_between_two_ticks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[dict[str, Any]] = []
    run = a_run(rows)
    run.checkpoint, run.enter, run.task.hand_over = None, lambda *_: None, lambda: None
    run.task.eval_img, run.seen_img, run.eval_seconds = 24, 24, 3.0
    monkeypatch.setattr("sdtrain.run.warm_up", lambda _: None)
    Run.begin(run, run.stage)
    for seen, seconds, sections in ((32, 10.0, {}), (64, 20.0, {"evaluate": 4.0})):
        run.seen_img = seen
        monkeypatch.setattr(run.timer, "read", lambda found=(seconds, sections): found)
        loop.tick(run)
    assert [row["sec_per_kimg"] for row in rows if row["kind"] == "perf"] == [10 / 8 * 1000, 16 / 32 * 1000]
    assert run.eval_seconds == 4.0


def test_the_time_that_is_left_ends_with_the_stage_since_the_next_has_another_speed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = a_run([])
    run.method.stages.append(SimpleNamespace(name="adversarial", end_img=960))
    with caplog.at_level("INFO", logger="sdtrain"):
        for stage in run.method.stages:
            run.stage = stage
            loop.progress(run, {}, {"sec_per_kimg": 1000.0, "data_wait_frac": 0.0})
    first, last = caplog.messages
    assert "main 32 of 960 (3.3%)" in first and "  ETA 1m04s to adversarial  " in first
    assert "  ETA 15m28s  " in last


def test_what_the_main_rank_reads_or_cannot_read_all_ranks_have_and_one_says_it(shards: Path, tmp_path: Path) -> None:
    weights = tmp_path / "vgg.safetensors"
    tree = tiny_config(shards, total_img=16, log_img=16, save_img=16)
    job = {"cfg": str(write_config(tmp_path / "x.yaml", tree)), "out": str(tmp_path / "out"), "weights": str(weights)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = run_ranks(2, str(Path(__file__).with_name("ranks_scale.py")), str(tmp_path / "job.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("holds 47 samples") == 1, done.stderr


def test_a_process_may_open_a_connection_to_every_rank_where_the_system_lets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for hard in (1 << 20, resource.RLIM_INFINITY, 4096):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (1024, hard))
        ranks.allow_files(4 * 4096)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 18, 1 << 20))
    ranks.allow_files(4 * 4096)  # has room already
    assert asked == [(17408, 1 << 20), (17408, resource.RLIM_INFINITY), (4096, 4096)]


class Store:
    """Of ranks that all said once that they were in a step, and no more."""

    def __init__(self, num_ranks: int) -> None:
        said = watch.Record(Mark(step=5, section="step", settled=True), 1, "pid 1 on x")
        self.kept, self.reads = {str(r): json.dumps(said) for r in range(num_ranks)}, 0

    def set(self, key: str, text: str) -> None:
        self.kept[key] = text

    def check(self, keys: list[str]) -> bool:
        return False

    def multi_get(self, keys: list[str]) -> list[str]:
        self.reads += 1
        return [self.kept[key] for key in keys]


@pytest.mark.parametrize(("num_ranks", "reads"), [(8, 12), (1024, 12), (4096, 3)])
def test_a_watcher_of_thousands_reads_as_many_a_second_as_one_of_a_thousand_and_measures_the_same_silence(
    num_ranks: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "world", lambda: num_ranks)
    watcher, store = watch.Watch(1000.0, StopRequest()), Store(num_ranks)
    watcher._store = store
    for _ in range(12):
        watcher._look(1.0)
    assert store.reads == reads
    assert watcher._ranks[7].process_sec == 12 and watcher._ranks[0].process_sec == 0


class Recorder:
    """In place of the decoding processes of one rank: which samples each of them is asked for, by their offsets."""

    def __init__(self, dataset: Dataset, **_: Any) -> None:
        self.asked: list[list[np.ndarray]] = []

    def submit(self, ticket: int, slot: int, requests: np.ndarray) -> None:
        self.asked.append([part[:, 2] for _, part in shared_out(requests, WORKERS)])


def of_70_000_images() -> Dataset:
    """No file is behind it: the offset of a sample is its number."""
    rows = [(0, number, 0, -1, 0, 0) for number in range(IMAGES)]
    index = _index_of(["0.tar"], [IMAGES], [b"k"] * IMAGES, rows)
    more: dict[str, Any] = {"source": "x", "shards": ("0.tar",), "label_names": (), "hash": "", "cache": Path("x")}
    return Dataset(index=index, resolution=8, **more)


@pytest.mark.parametrize("ghost_batch", [8, 10])
def test_1024_ranks_of_8_workers_read_each_of_70000_images_once_an_epoch_and_none_is_starved(
    ghost_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "Pool", Recorder)
    batch, dataset = RANKS * ghost_batch, of_70_000_images()
    steps = -(-2 * IMAGES // batch)
    seen = np.empty((steps, batch), np.int64)
    per_worker = np.zeros((RANKS, WORKERS), np.int64)
    for rank in range(RANKS):
        how: dict[str, Any] = {"seed": 3, "batch_size": batch, "ghost_batch": ghost_batch, "ghosts": [rank]}
        own = stream.Stream(dataset, workers=WORKERS, **how)
        for step in range(steps):
            own._submit(step)
        for step, parts in enumerate(own._pool.asked):  # type: ignore[attr-defined]
            seen[step, rank * ghost_batch : (rank + 1) * ghost_batch] = np.concatenate(parts)
            per_worker[rank] += [len(part) for part in parts]
    for epoch in np.split(seen.reshape(-1)[: 2 * IMAGES], 2):
        assert np.array_equal(np.sort(epoch), np.arange(IMAGES))
    assert (per_worker.sum(1) == steps * ghost_batch).all()
    assert per_worker.min() >= steps and np.ptp(per_worker, 1).max() <= steps  # one image a batch at most


NETWORKS = {
    "G": {"weights_gb": 4.0, "gradients_gb": 4.0, "optimizer_gb": 8.0, "checkpoint_gb": 12.0},
    "D": {"weights_gb": 2.0, "gradients_gb": 2.0, "optimizer_gb": 4.0, "checkpoint_gb": 6.0},
}


def test_what_a_step_sends_is_the_sum_of_its_phases_by_the_formula_of_its_engine() -> None:
    phases = {"G": (("G",), 1.25), "D": (("D",), 2.0)}
    ring, P = 4095 / 4096, 1.25 * 4.0 + 2.0 * 2.0  # GB of float32 parameters, phases counted

    def sent(engine: str, exact: bool, num_ranks: int = 4096) -> float:
        return sent_in_step(NETWORKS, phases, engine, num_ranks, exact, share=8)

    assert sent("ddp", exact=False) == pytest.approx(2 * P * ring)
    assert sent("ddp", exact=True) == pytest.approx(4 * P * ring)
    assert sent("zero1", exact=True) == pytest.approx((4 + 3) * P * ring)
    assert sent("zero2", exact=True) == pytest.approx((4 + 2) * P * ring)
    assert sent("fsdp2", exact=True) == pytest.approx((2 + 3) * P * ring)
    assert sent("hsdp", exact=True) == pytest.approx((2 + 3) * P * 7 / 8 + 2 * 2 * P / 8 * 511 / 512)
    assert sent("ddp", exact=True, num_ranks=1) == 0.0


def test_the_predicted_speed_is_a_share_of_the_work_and_the_time_of_sending() -> None:
    assert predicted(64.0, 1, 64, 0.0, 1.0) == 64.0
    assert predicted(64.0, 64, 64, 0.5, 10.0) == pytest.approx(1.0 + 1000 / 64 * 0.05)


def test_a_plan_for_4096_ranks_that_are_not_there_says_what_each_holds_sends_and_needs(
    shards: Path, tmp_path: Path
) -> None:
    tree = tiny_config(make_shards(tmp_path / "many", 4200), batch_size=4096, ghost_batch=1, total_img=8192)
    tree |= {"log_img": 4096, "save_img": 4096}
    config = load_config(write_config(tmp_path / "plan.yaml", tree), world=4096)
    plan = make_plan(config, asked=Asked(ranks=4096, bandwidth=10.0, disk=2.0, speed=4096.0))
    found = plan["scale"]
    assert (found["samples_per_rank"], found["ghosts_per_rank"], found["largest_world_size"]) == (1, 1, 4096)
    gradients = 8e-9 * sum(plan["networks"][n]["trainable"] for n in "GD")
    assert found["sent_gb_per_step"]["ddp"] == pytest.approx(2 * gradients * 4095 / 4096)
    assert found["sec_per_kimg"]["ddp"] == pytest.approx(1.0 + 1000 / 4096 * 2 * gradients * 4095 / 4096 / 10)
    assert found["checkpoint_sec"] == plan["checkpoint_gb"] / 2.0
    assert json.loads(json.dumps(plan["scale"])) == found
    said = [line.removeprefix("  scale       ") for line in render(plan).splitlines() if line.startswith("  scale ")]
    assert said[0].startswith("on 4096 ranks: 1 images (1 ghost) a rank and step; 8 collectives a step, 2 more a tick")
    assert said[2].startswith("ddp ") and said[2].endswith("100%  used")
    assert (
        said[-3] == "s/kimg from 4096 on one rank (--speed) and 10 GB/s that a rank sends, without overlap and latency"
    )
    assert said[-1] == for_more(4096, 1)


def test_a_plan_takes_speed_and_disk_from_the_run_folder_and_says_what_it_needs_where_there_is_none(
    shards: Path, tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path / "plan.yaml", tiny_config(shards)), world=4)
    text = render(make_plan(config, asked=Asked(ranks=4)))
    assert "s/kimg needs a measured speed: --speed of one rank (`sdtrain bench --cfg plan`), or --out of a run" in text
    assert "for any number of ranks, say --disk GB/s for its time" in text
    out = tmp_path / "out"
    kept = out / "checkpoints" / "img_000000032"
    kept.mkdir(parents=True)
    for number, name in enumerate(("G.safetensors", "D.safetensors", "complete.json")):
        (kept / name).write_bytes(b"0" * 1000)
        os.utime(kept / name, (0, 1000 + number))
    (out / "metrics.jsonl").write_text(json.dumps({"kind": "perf", "seen_img": 32, "sec_per_kimg": 10.0}))
    (out / "environment.json").write_text(json.dumps({"starts": [{"world_size": 2}]}))
    found = make_plan(config, out=out, asked=Asked(ranks=4))["scale"]
    assert found["measured"]["sec_per_kimg"] == 20.0 and found["measured"]["from"].endswith("on 2 ranks")
    assert found["disk_gb_per_sec"] == pytest.approx(2000 / 2 / 1e9)
    assert found["sec_per_kimg"] == {}  # sending has no speed


def test_a_world_size_that_cannot_be_is_one_sentence_with_those_that_can(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path / "plan.yaml", tiny_config(shards)))

    def said(*args: str) -> str:
        assert main(["--cfg", path, "--out", str(tmp_path / "run"), *args]) == 2
        return capsys.readouterr().err.strip()

    three = said("--plan", "--world-size", "3")
    assert three.endswith(
        "3 ranks cannot share 4 ghosts (batch_size 16 / ghost_batch 4) evenly: launch one of 1, 2, 4 ranks"
    )
    many = said("--plan", "--world-size", "4096")
    assert many.endswith("launch one of 1, 2, 4 ranks, or set batch_size 16384 for one ghost on each of 4096")
    assert "--world-size 0 cannot be" in said("--plan", "--world-size", "0")
    assert "--bandwidth belongs to --plan --world-size N" in said("--plan", "--bandwidth", "10")
    assert "--world-size belongs to --plan; how many ranks train is for the launcher" in said("--world-size", "2")
    assert not (tmp_path / "run").exists()


def test_what_lifts_the_largest_world_size_is_said_with_numbers() -> None:
    said = for_more(64, 8)
    assert said.startswith("8 ranks at most: one ghost each (batch_size 64 / ghost_batch 8)")
    assert "batch_size (to 128 for 16 ranks)" in said and "lower ghost_batch (to 4 for 16 ranks)" in said
    assert "lower ghost_batch" not in for_more(64, 1)
    assert "lower ghost_batch (to 1 for 63 ranks)" in for_more(63, 3)
