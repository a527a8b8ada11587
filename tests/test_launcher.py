"""Without these, a launcher's DeepSpeed, FSDP or half precision is dropped in silence and figures lie."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import REPO, run_python
from tiny import make_shards, tiny_config, write_config

from sdtrain.engine.launcher import check_launcher, wants_cpu
from sdtrain.errors import ConfigError


def said(precision: str = "fp32", **env: str) -> str:
    config: Any = SimpleNamespace(precision=precision)
    try:
        check_launcher(config, env)
    except ConfigError as error:
        return str(error)
    return ""


REFUSED = {
    "ACCELERATE_USE_DEEPSPEED=true": "asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED=true), which this version has not",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE=2": "asks for DeepSpeed (ACCELERATE_DEEPSPEED_ZERO_STAGE=2)",
    "ACCELERATE_USE_FSDP=true": "asks for FSDP (ACCELERATE_USE_FSDP=true)",
    "FSDP_SHARDING_STRATEGY=FULL_SHARD": "asks for FSDP (FSDP_SHARDING_STRATEGY=FULL_SHARD)",
    "ACCELERATE_USE_MEGATRON_LM=true": "asks for Megatron-LM (ACCELERATE_USE_MEGATRON_LM=true)",
    "ACCELERATE_USE_TP=true": "asks for tensor parallelism (ACCELERATE_USE_TP=true)",
    "PARALLELISM_CONFIG_TP_SIZE=2": "asks for parallelism_config (PARALLELISM_CONFIG_TP_SIZE=2)",
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR": "dynamo_backend: INDUCTOR",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4": "gradient_accumulation_steps: 4",
    "ACCELERATE_MIXED_PRECISION=fp16": "precision can be fp32 or bf16; set mixed_precision: 'no'",
    "ACCELERATE_MIXED_PRECISION=bf16": "but the run has precision: fp32; add --set precision=bf16, or set mixed_pre",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_of_the_launcher_that_a_run_would_not_follow_is_refused_by_name(setting: str) -> None:
    name, _, value = setting.partition("=")
    sentence = said(**{name: value})
    assert sentence.startswith("accelerate launch asks for ") and REFUSED[setting] in sentence
    assert "\n" not in sentence
    if any(word in setting for word in ("USE_", "_STAGE", "STRATEGY", "TP_SIZE")):
        assert "engine: ddp is what there is" in sentence and "distributed_type: MULTI_GPU" in sentence


def test_what_the_launcher_says_by_default_and_what_agrees_with_the_run_is_no_contradiction() -> None:
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}
    plain |= {"PARALLELISM_CONFIG_TP_SIZE": "1", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4"}
    assert said(**plain) == said("bf16", **plain) == said("bf16", ACCELERATE_MIXED_PRECISION="bf16") == ""


def test_a_launcher_that_says_cpu_keeps_ranks_off_the_gpu() -> None:
    assert wants_cpu({"ACCELERATE_USE_CPU": "True"}) and wants_cpu({"SDTRAIN_CPU": "1"})
    assert not wants_cpu({"ACCELERATE_USE_CPU": "False"}) and not wants_cpu({})


def launched(tmp_path: Path, *more: str, **launcher: Any) -> tuple[int, str]:
    """Two CPU ranks by `accelerate launch --config_file`; the exit code and all that was said."""
    tree = {**yaml.safe_load((REPO / "launch" / "cpu2.yaml").read_text()), **launcher}
    (tmp_path / "launcher.yaml").write_text(yaml.safe_dump(tree))
    run = write_config(tmp_path / "run.yaml", tiny_config(make_shards(tmp_path / "shards")))
    start = ("-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launcher.yaml"))
    done = run_python(*start, "sdtrain/main.py", "--cfg", str(run), "--out", str(tmp_path / "out"), *more)
    return done.returncode, done.stdout + done.stderr


FSDP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True}


def test_a_launch_with_fsdp_ends_before_ranks_meet_in_one_sentence(tmp_path: Path) -> None:
    code, told = launched(tmp_path, distributed_type="FSDP", fsdp_config=FSDP)
    assert code != 0 and not (tmp_path / "out").exists()
    assert told.count("sdtrain: accelerate launch asks for FSDP (ACCELERATE_USE_FSDP=true)") == 1, told
    assert "exitcode  : 2" in told  # torchrun reports the code of the ranks and ends with its own


def test_one_process_with_half_precision_ends_with_code_2(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run.yaml", tiny_config(make_shards(tmp_path / "shards")))
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "fp16"}
    done = run_python("sdtrain/main.py", "--cfg", str(run), "--out", str(tmp_path / "out"), env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "mixed_precision: fp16" in done.stderr
