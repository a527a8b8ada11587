"""`compile: frozen` changes time and rounding alone. Without these it could rename weights, keep old ones in a graph,
be applied where second derivatives are wanted, or end a run in its first step with a traceback.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, run_python
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, write_config

sys.path.insert(0, str(REPO / "tests" / "fakecuda"))
from cases import PENALTIES, SMALL, STYLE, STYLENAT, configurations, stages, trainer_of  # noqa: E402

from sdtrain.config.load import load_config  # noqa: E402
from sdtrain.engine.compiled import compile_parts, described, parts_of, warm_up  # noqa: E402
from sdtrain.errors import ConfigError  # noqa: E402
from sdtrain.models.rrdbnet.networks import Generator, GeneratorOptions  # noqa: E402

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
FROZEN = "compile=frozen"
COMPILED = {
    "projected baseline": "D (1 part)",
    "projected SD, LPIPS, T": "D (1 part), LPIPS (5 parts)",
    "stylegan2 SD": "G_ema (8 parts)",
    "stylegan2 R1, path length": "G_ema (8 parts)",
    "stylegan2 ADA, T": "G_ema (8 parts)",
    "r3gan": "G_ema (6 parts)",
    "Real-ESRGAN": "G_ema (1 part), G_T (1 part), PerceptualLoss (1 part)",
    "GCFSR": "G_ema (5 parts), G_T (5 parts), PerceptualLoss (1 part)",
}


def test_a_compiled_average_says_the_same_follows_its_weights_and_keeps_their_names() -> None:
    torch.manual_seed(0)
    net = Generator(GeneratorOptions(num_feat=4, num_grow_ch=4, num_block=1)).eval().requires_grad_(False)
    plain, names = copy.deepcopy(net), list(net.state_dict())
    torch._dynamo.utils.counters.clear()
    compile_parts(dict(parts_of("G_ema", net)))
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(net(x), plain(x), **ROUNDING)
    for moved in (net, plain):  # as an average moves, in place
        torch._foreach_mul_(list(moved.parameters()), 0.9)
    torch.testing.assert_close(net(x), plain(x), **ROUNDING)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "nothing was compiled"
    assert list(net.state_dict()) == names == list(copy.deepcopy(net).state_dict())


@pytest.mark.parametrize("name", COMPILED)
def test_what_is_compiled_is_frozen_and_has_no_second_derivatives(tmp_path: Path, name: str) -> None:
    trainer = trainer_of(tmp_path, configurations(tmp_path)[name], FROZEN, device="cpu")
    assert described(trainer.parts) == COMPILED[name]
    assert not any(p.requires_grad for part in trainer.parts.values() for p in part.parameters())


def test_the_features_of_D_stay_plain_where_r1_differentiates_them_twice(tmp_path: Path) -> None:
    keys = tiny_config(tmp_path, **SMALL, sd__loss="lpips-vgg", r1__gamma=1.0)
    assert described(trainer_of(tmp_path, keys, FROZEN, device="cpu").parts) == "LPIPS (5 parts)"


@pytest.mark.parametrize("name", ["stylegan2 ADA, T", "Real-ESRGAN", "GCFSR"])
def test_warming_up_moves_no_network_and_no_state(tmp_path: Path, name: str) -> None:
    trainer = trainer_of(tmp_path, configurations(tmp_path)[name], FROZEN, device="cpu")

    def state() -> tuple[dict[str, Any], Any]:
        held = {f"{n}.{k}": v.clone() for n, net in trainer.nets.items() for k, v in net.state().items()}
        return held, (copy.deepcopy(trainer.method.state()), trainer.method.ghost_state(), trainer.engine.meter.sums)

    for _ in stages(trainer):
        before, others = state()
        with torch.compiler.set_stance("force_eager"):
            warm_up(trainer)
        after, now = state()
        assert others == now and [n for n in before if not torch.equal(before[n], after[n])] == []


@pytest.mark.parametrize(
    "keys, sets, said",
    [
        (STYLENAT, [FROZEN], "compile: frozen has nothing to compile in this run"),
        ({**STYLE, **PENALTIES}, [FROZEN, "engine=fsdp2", "shard_teacher=true"], "shard_teacher: false"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_what_to_do(
    tmp_path: Path, keys: dict[str, Any], sets: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as told:
        trainer_of(tmp_path, tiny_config(tmp_path, **json.loads(json.dumps(keys))), *sets, device="cpu")
    assert said in str(told.value)


def test_a_plan_says_what_would_be_compiled_and_compiles_nothing(tmp_path: Path) -> None:
    from sdtrain.plan import make_plan, render

    write_config(tmp_path / "tiny.yaml", tiny_config(make_shards(tmp_path / "shards")))
    torch._dynamo.utils.counters.clear()
    for sets, line in (([], False), ([FROZEN], True)):
        text = render(make_plan(load_config(tmp_path / "tiny.yaml", sets)))
        assert ("  compiled    D (1 part)" in text) is line
    assert not torch._dynamo.utils.counters["stats"]


@pytest.mark.slow
def test_a_missing_compiler_ends_a_run_before_its_first_step_with_one_sentence(tmp_path: Path) -> None:
    write_config(tmp_path / "tiny.yaml", tiny_config(make_shards(tmp_path / "shards")))
    env = {"CXX": "/absent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "SDTRAIN_CPU": "1"}
    out = tmp_path / "out"
    done = run_python(
        "sdtrain/main.py", "--cfg", str(tmp_path / "tiny.yaml"), "--out", str(out), "--set", FROZEN, env=env
    )
    assert done.returncode == 2, done.stderr
    assert "compile: frozen cannot compile D.feature_network on this machine" in done.stderr
    assert "Traceback" not in done.stderr and not rows(out) and not list((out / "checkpoints").glob("img_*"))


@pytest.mark.slow
def test_runs_with_compiled_parts_resume_and_share_under_every_engine_up_to_rounding(tmp_path: Path) -> None:
    clock = {"total_img": 48, "log_img": 16, "save_img": 16, "batch_size": 16, "ghost_batch": 4}
    keys = {**STYLE, **PENALTIES, **clock, "sd__loss": "l1"}
    file = write_config(tmp_path / "tiny.yaml", tiny_config(make_shards(tmp_path / "shards"), **keys))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")

    def job(out: str, *sets: str) -> dict[str, Any]:
        return {"args": ["--cfg", str(file), "--out", str(tmp_path / out), *(p for s in sets for p in ("--set", s))]}

    run_jobs(tmp_path, [job("plain"), job("one", FROZEN), job("half", FROZEN, "total_img=32"), job("half", FROZEN)])
    run_jobs(tmp_path, [job(engine, FROZEN, f"engine={engine}") for engine in ("ddp", "fsdp2", "zero2")], ranks=2)
    plain, whole = tensors(tmp_path / "plain", 48), tensors(tmp_path / "one", 48)
    assert plain.keys() == whole.keys() and not any("_orig_mod" in name for name in whole)
    first, compiled = (rows(tmp_path / out, "train")[0] for out in ("plain", "one"))
    assert all(compiled[n] == pytest.approx(first[n], rel=1e-4, abs=1e-5) for n in ("G/adv", "G/sd", "D/real"))
    for out in ("half", "ddp", "fsdp2", "zero2"):
        found = rows(tmp_path / out, "train")
        assert [row["G/sd"] for row in found] == pytest.approx([row["G/sd"] for row in rows(tmp_path / "one", "train")])
