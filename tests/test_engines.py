"""Engines against ddp on two real ranks. Without these a run would depend on how its networks are dealt out.

The table engine x method x (runs, equal to ddp, resumes elsewhere), with deviations, of 20 steps or as many as STEPS:

    [STEPS=6] [TABLE=sdtrain/README.md] python -m pytest -q -s -m slow tests/test_engines.py

With TABLE it takes the place of the one in that file, between the marks.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, run_python, run_ranks
from test_sdakd import FACES, settings, tar
from test_style_training import R3GAN, STYLE, STYLENAT
from tiny import make_shards, rows, tensors, tiny_config, worst, write_config

from sdtrain.config.load import load_config
from sdtrain.engine import ranks
from sdtrain.engine.cost import advice, compared, memory_gb
from sdtrain.engine.ddp import Ddp
from sdtrain.engine.make import make_engine
from sdtrain.errors import ConfigError

ENGINES = {"fsdp2": (), "hsdp": ("shard_ranks=1",), "fsdp2 + teacher": ("shard_teacher=true",)}
if importlib.util.find_spec("deepspeed"):
    ENGINES |= {"zero1": (), "zero2": (), "zero2 + offload": ("offload_optimizer=true",)}
AGAIN = " + recompute"  # the same with checkpoint_activations
ENGINES |= {e + AGAIN: ("checkpoint_activations=true",) for e in ("ddp", "fsdp2", "zero2") if e in ("ddp", *ENGINES)}
STEPS = int(os.environ.get("STEPS", "20"))
MARKS = "<!-- engine table -->\n", "<!-- end of engine table -->\n"
Clock = tuple[int, int]  # images at the half and at the end


def clock(steps: int, batch: int) -> dict[str, Any]:
    return {"total_img": steps * batch, "save_img": steps // 2 * batch, "log_img": batch}


def sdgan(options: dict[str, Any], batch: int) -> Callable[[Path, int], tuple[dict[str, Any], Clock]]:
    def make(folder: Path, steps: int) -> tuple[dict[str, Any], Clock]:
        tree = tiny_config(make_shards(folder / "shards"), **{**json.loads(json.dumps(options)), **clock(steps, batch)})
        return tree, (steps // 2 * batch, steps * batch)

    return make


def sdakd(options: dict[str, Any]) -> Callable[[Path, int], tuple[dict[str, Any], Clock]]:
    """All stages, each of `steps` steps (the first cut into L1 alone and the whole loss); half of it is in stage 2."""

    def make(folder: Path, steps: int) -> tuple[dict[str, Any], Clock]:
        parts = {"train": range(24), "val": range(100, 103), "test": range(200, 203)}
        lists = {name: tar(folder / name, numbers) for name, numbers in parts.items()}
        spans = {n: f"{steps} steps" for n in ("n1", "n2", "n3")}
        half = (steps + steps // 2) * 4
        tree = settings(lists, **options, **spans, save_img=half, eval_img=steps * 12, validation__histogram_images=1)
        return json.loads(json.dumps(tree)), (half, steps * 12)  # YAML would write what is shared as an alias

    return make


METHODS = {
    "projected": sdgan({"batch_size": 16}, 16),
    "stylegan2": sdgan(STYLE, 8),
    "stylenat": sdgan(STYLENAT, 8),
    "r3gan": sdgan(R3GAN, 8),
    "real-esrgan": sdakd({}),
    "srvgg": sdakd({"model__generator": {"kind": "srvgg", "num_feat": 8, "num_conv": 2}}),
    "gcfsr": sdakd(FACES),
}
# what is in them beside their networks
ABOUT = {
    "projected": "SD-GAN, FastGAN and ProjectedGAN, DiffAugment",
    "stylegan2": "SD-GAN, StyleGAN2: R1, path length, ADA, style mixing",
    "stylenat": "SD-GAN, StyleNAT: R1, bCR, LPIPS, clipped gradients",
    "r3gan": "SD-GAN, R3GAN: R1 + R2, ADA",
    "real-esrgan": "SDAKD, Real-ESRGAN (RRDBNet, U-Net with spectral norm), three stages",
    "srvgg": "SDAKD, SRVGG, three stages",
    "gcfsr": "SDAKD, GCFSR: R1, three stages",
}
WITHOUT_BLOCKS = ("projected", "srvgg")
COLUMNS = ("equal", "from ddp", "to ddp on 1 rank", "rows")
table: dict[tuple[str, str], dict[str, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def printed() -> Iterator[None]:
    """The table, when its tests are over."""
    yield
    if table:
        print("\n" + markdown())
    if table and (place := os.environ.get("TABLE")):
        file = REPO / place
        before, rest = file.read_text().split(MARKS[0])
        file.write_text(before + MARKS[0] + markdown() + MARKS[1] + rest.split(MARKS[1])[1])


def markdown() -> str:
    """The largest difference from ddp of any number: in checkpoints after the same steps, of a run begun by ddp, of one
    gone on with by ddp alone (ddp itself differs as much on another number of ranks); relative of logged numbers."""
    lines = ["| method | engine | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for (method, engine), found in table.items():
        cells = " | ".join("-" if c not in found else f"{found[c]:.1e}" if found[c] else "0" for c in COLUMNS)
        lines.append(f"| {ABOUT[method]} | {engine} | {cells} |")
    return "\n".join(lines) + "\n"


def launch(folder: Path, runs: list[tuple[str, Path, tuple[str, ...]]], ranks: int) -> None:
    """Run NAME, CONFIG, SETS one after the other in one process group."""
    jobs = [
        {"args": ["--cfg", str(config), "--out", str(folder / name), *(w for s in sets for w in ("--set", s))]}
        for name, config, sets in runs
    ]
    file = folder / f"jobs{len(list(folder.glob('jobs*.json')))}.json"
    file.write_text(json.dumps(jobs))
    start = run_ranks if ranks > 1 else lambda _, *args, **more: run_python(*args, **more)
    done = start(ranks, str(REPO / "tests" / "tiny.py"), str(file), timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(ranks):
        for run, told in zip(runs, json.loads(file.with_suffix(f".{rank}").read_text()), strict=True):
            assert told["code"] == 0, (run[0], told)


def sets_of(engine: str) -> tuple[str, ...]:
    return (f"engine={engine.partition(' ')[0]}", *ENGINES.get(engine, ()))


def up_to(run: Path, img: int, target: Path) -> None:
    """The run folder as it was when the checkpoint at `img` had been written."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").glob("img_*"):
        if int(path.name.removeprefix("img_")) > img:
            shutil.rmtree(path)


def apart(one: Path, two: Path, img: int) -> float:
    """The largest difference of any number of two checkpoints; their names are the same."""
    a, b = tensors(one, img), tensors(two, img)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name].astype(float) - b[name].astype(float)).max(initial=0)) for name in a)


def compare(folder: Path, method: str, engines: list[str], steps: int) -> None:
    """Whole runs of every engine on two ranks; from their middle ddp goes on alone, and they from the middle of ddp."""
    tree, (half, end) = METHODS[method](folder, steps)
    config = write_config(folder / "run.yaml", tree)
    launch(folder, [(e, config, sets_of(e)) for e in ("ddp", *engines)], 2)
    for engine in engines:
        up_to(folder / "ddp", half, folder / f"ddp to {engine}")
        up_to(folder / engine, half, folder / f"{engine} to ddp")
    launch(folder, [(f"ddp to {e}", config, sets_of(e)) for e in engines], 2)
    launch(folder, [(f"{e} to ddp", config, sets_of("ddp")) for e in engines], 1)
    alone = folder / "ddp"
    for engine in engines:
        runs = {"equal": engine, "from ddp": f"ddp to {engine}", "to ddp on 1 rank": f"{engine} to ddp"}
        found = {what: apart(alone, folder / run, end) for what, run in runs.items()}
        logged = worst(rows(alone), rows(folder / engine))
        table[method, engine] = {**found, "rows": logged[0]}
        print(f"\n{method}, {engine}, largest difference from ddp:", found, "of logged numbers:", logged)
        assert max(found["equal"], found["from ddp"], logged[0]) == 0
        assert found["to ddp on 1 rank"] <= 1e-4  # as ddp itself on another number of ranks


def test_every_engine_steps_saves_and_loads_as_ddp_and_one_player_at_a_time() -> None:
    done = run_ranks(2, str(REPO / "tests" / "ranks_engines.py"), timeout=900)
    print("".join(f"{line}\n" for line in done.stdout.splitlines() if "from ddp" in line))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("from ddp") >= 12


@pytest.mark.slow
def test_a_group_with_a_cpu_and_a_gpu_backend_sends_what_lies_on_the_host_over_gloo_under_every_engine() -> None:
    done = run_ranks(2, str(REPO / "tests" / "ranks_engines.py"), "two backends", timeout=900)
    assert done.returncode == 0 and "two backends served" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("device", "backend"), [("cuda:0", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_accelerate_starts_ranks_with_a_backend_for_each_kind_of_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("accelerate.PartialState", lambda **wishes: asked.update(wishes) or SimpleNamespace(device=1))
    monkeypatch.setattr(ranks, "pick_device", lambda *_: torch.device(device))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.start_ranks() == 1
    wait = datetime.timedelta(seconds=ranks.RANK_TIMEOUT_SEC)
    assert asked == {"cpu": device == "cpu", "backend": backend, "timeout": wait}


@pytest.mark.slow
def test_stylegan2_with_path_lengths_and_r1_is_the_same_sharded_and_goes_on_from_ddp(tmp_path: Path) -> None:
    tree, (half, end) = METHODS["stylegan2"](tmp_path, 2)
    config, engines = write_config(tmp_path / "run.yaml", tree), [e for e in ("fsdp2", "zero2") if e in ENGINES]
    launch(tmp_path, [(e, config, sets_of(e)) for e in ("ddp", *engines)], 2)
    for engine in engines:
        up_to(tmp_path / "ddp", half, tmp_path / f"ddp to {engine}")
    launch(tmp_path, [(f"ddp to {e}", config, sets_of(e)) for e in engines], 2)
    runs = [*engines, *(f"ddp to {engine}" for engine in engines)]
    found = {run: apart(tmp_path / "ddp", tmp_path / run, end) for run in runs}
    print("largest difference from ddp:", found)
    assert not any(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_whole_runs_of_every_method_are_the_same_under_every_engine_and_go_on_elsewhere(
    tmp_path: Path, method: str
) -> None:
    compare(tmp_path, method, [e for e in ENGINES if method not in WITHOUT_BLOCKS or not e.endswith(AGAIN)], STEPS)


CHAIN = [("ddp", 2), ("fsdp2", 1), ("zero2", 2), ("hsdp", 4), ("ddp", 4), ("fsdp2", 2)]


@pytest.mark.slow
@pytest.mark.skipif("zero2" not in ENGINES, reason="DeepSpeed is not installed")
def test_a_run_that_changes_engine_and_world_at_every_stop_logs_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    steps = 2 * len(CHAIN)
    tree, (_, end) = METHODS["stylegan2"](tmp_path, steps)
    config = write_config(tmp_path / "run.yaml", {**tree, "save_img": 16})
    launch(tmp_path, [("whole", config, ())], 1)
    for i, (engine, world) in enumerate(CHAIN):
        more = ("shard_ranks=2",) if engine == "hsdp" else ()
        launch(tmp_path, [("chain", config, (f"engine={engine}", f"total_img={(i + 1) * 16}", *more))], world)
    starts = json.loads((tmp_path / "chain" / "environment.json").read_text())["starts"]
    assert [(s["engine"]["name"], s["world_size"]) for s in starts] == [("ddp" if n == 1 else e, n) for e, n in CHAIN]
    logged = worst(rows(tmp_path / "whole"), rows(tmp_path / "chain"))
    print("\nlargest relative difference of logged numbers:", logged)
    assert logged[0] <= 1e-4 and apart(tmp_path / "whole", tmp_path / "chain", end) <= 1e-4


@pytest.mark.parametrize("engine", ["fsdp2", "hsdp", "zero1", "zero2"])
def test_one_rank_shares_with_nobody_under_any_engine(tmp_path: Path, engine: str) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "shards", engine=engine)))
    made = make_engine(config, torch.device("cpu"))
    assert type(made) is Ddp and made.described()["name"] == "ddp"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": "ddp", "shard_teacher": True}, "means nothing to engine ddp: it belongs to fsdp2, hsdp"),
        ({"engine": "fsdp2", "shard_ranks": 2}, "shard_ranks means nothing to engine fsdp2: it belongs to hsdp"),
        ({"engine": "fsdp2", "offload_optimizer": True}, "it belongs to zero1, zero2"),
        ({"engine": "hsdp", "shard_ranks": 3}, "shard_ranks 3 does not divide 2 ranks"),
    ],
)
def test_a_key_of_another_engine_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "shards", **changes))
    with pytest.raises(ConfigError) as told:
        load_config(path, world=2)
    assert sentence in str(told.value)


def test_a_missing_deepspeed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtrain.engine.zero import deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"zero1 and zero2 need DeepSpeed .*pip install 'sdtrain\[deepspeed\]'"):
        deepspeed(torch.device("cpu"))


def test_the_plan_weighs_what_sharding_saves_against_activations() -> None:
    net = {"weights_gb": 0.4, "gradients_gb": 2.0, "optimizer_gb": 0.8}
    networks = {"G": net, "D": net, "G_ema": {**net, "weights_gb": 0.4}}
    stages = [{"trains": ["G", "D"]}]
    assert memory_gb(networks, stages, "ddp", 4, False) == pytest.approx(0.8 + 0.4 + 4.0 + 1.6)
    assert memory_gb(networks, stages, "zero2", 4, False) == pytest.approx(0.8 + 0.4 + 4.0 + (1.6 + 0.8) / 4)
    assert memory_gb(networks, stages, "fsdp2", 4, True) == pytest.approx(0.8 + 0.4 + 4.0 + (1.6 + 0.8 + 0.4) / 4)
    found = compared(networks, stages, "ddp", 4, True, False)
    assert found["sent_gb_per_step"]["ddp"] == pytest.approx(2 * 1.6 * 3 / 4)
    assert advice(found, 100.0).endswith("(not worth it: activations bind)")
    assert "zero1 would save 1000.0 MB" in advice(found, 0.1)
    assert advice({**found, "ranks": 1}, 0.0) == "ddp; one rank shares with nobody"
