"""Engines against ddp on two real ranks. Without these a run would depend on how its networks are dealt out.

The table engine x method x (runs, equal to ddp, resumes elsewhere):

    python -m pytest -q -s -m slow tests/test_engines.py
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, run_python, run_ranks
from test_sdakd import FACES, settings, tar
from test_style_training import R3GAN, STYLE, STYLENAT
from tiny import make_shards, rows, tensors, tiny_config, worst, write_config

from sdtrain.config.load import load_config
from sdtrain.engine.cost import advice, compared, memory_gb
from sdtrain.engine.ddp import Ddp
from sdtrain.engine.make import make_engine
from sdtrain.errors import ConfigError

ENGINES = {"fsdp2": (), "hsdp": ("shard_ranks=1",), "fsdp2 + teacher": ("shard_teacher=true",)}
if importlib.util.find_spec("deepspeed"):
    ENGINES |= {"zero1": (), "zero2": (), "zero2 + offload": ("offload_optimizer=true",)}
# kernels may round a matrix by the address it is gathered to
TOLERANCE = {("stylenat", "fsdp2"): 1e-6, ("stylenat", "hsdp"): 1e-6, ("stylenat", "fsdp2 + teacher"): 1e-6}
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
    "gcfsr": sdakd(FACES),
}
table: dict[tuple[str, str], list[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def printed() -> Iterator[None]:
    """The table, when its tests are over."""
    yield
    for (method, engine), cells in table.items():
        print(f"{method:<12} {engine:<16} {', '.join(cells)}")


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
        limit = TOLERANCE.get((method, engine), 0.0)
        runs = {"equal": engine, "from ddp": f"ddp to {engine}", "to ddp on 1 rank": f"{engine} to ddp"}
        found = {what: apart(alone, folder / run, end) for what, run in runs.items()}
        logged = worst(rows(alone), rows(folder / engine))
        table[method, engine] = [f"{what} {a:.1e}" for what, a in found.items()] + [f"rows {logged[0]:.1e}"]
        print(f"\n{method}, {engine}, largest difference from ddp:", found, "of logged numbers:", logged)
        assert max(found["equal"], found["from ddp"]) <= limit
        assert logged[0] <= limit * 1e3
        assert found["to ddp on 1 rank"] <= 1e-4  # as ddp itself on another number of ranks


def test_every_engine_steps_saves_and_loads_as_ddp_and_one_player_at_a_time() -> None:
    done = run_ranks(2, str(REPO / "tests" / "ranks_engines.py"), timeout=900)
    print("".join(f"{line}\n" for line in done.stdout.splitlines() if "from ddp" in line))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("from ddp") >= 12


def test_stylegan2_with_path_lengths_and_r1_is_the_same_sharded(tmp_path: Path) -> None:
    tree, (_, end) = METHODS["stylegan2"](tmp_path, 2)
    config, engines = write_config(tmp_path / "run.yaml", tree), [e for e in ("fsdp2", "zero2") if e in ENGINES]
    launch(tmp_path, [(e, config, sets_of(e)) for e in ("ddp", *engines)], 2)
    found = {engine: apart(tmp_path / "ddp", tmp_path / engine, end) for engine in engines}
    print("largest difference from ddp:", found)
    assert not any(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_20_steps_of_every_method_are_the_same_under_every_engine_and_go_on_elsewhere(
    tmp_path: Path, method: str
) -> None:
    compare(tmp_path, method, list(ENGINES), 20)


CHAIN = [("ddp", 2), ("fsdp2", 1), ("zero2", 2), ("hsdp", 4), ("ddp", 4), ("fsdp2", 2)]


@pytest.mark.slow
@pytest.mark.skipif("zero2" not in ENGINES, reason="DeepSpeed is not installed")
def test_a_run_that_changes_engine_and_world_at_every_stop_logs_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    steps = 2 * len(CHAIN)
    tree, (_, end) = METHODS["stylegan2"](tmp_path, steps)
    config = write_config(tmp_path / "run.yaml", {**tree, "save_img": 16})
    launch(tmp_path, [("whole", config, ())], 1)
    for i, (engine, ranks) in enumerate(CHAIN):
        more = ("shard_ranks=2",) if engine == "hsdp" else ()
        launch(tmp_path, [("chain", config, (f"engine={engine}", f"total_img={(i + 1) * 16}", *more))], ranks)
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
