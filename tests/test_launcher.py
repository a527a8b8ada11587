"""Without these, a launcher's DeepSpeed, FSDP or half precision is dropped in silence and figures lie."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import REPO, run_python
from tiny import make_shards, tiny_config, write_config

from sdtrain.config.blocks import require_blocks
from sdtrain.engine.launcher import follow_launcher, not_followed, wants_cpu
from sdtrain.errors import ConfigError

MODEL = {"generator": SimpleNamespace(kind="fastgan"), "discriminator": SimpleNamespace(kind="projected")}


@dataclass(frozen=True)
class Keys:
    precision: str = "fp32"
    engine: str | None = None
    offload_optimizer: bool = False
    checkpoint_activations: bool = False
    model: Any = field(default_factory=lambda: SimpleNamespace(**MODEL))


def followed(keys: Any = Keys(), **env: str) -> Any:  # noqa: B008
    used = follow_launcher(keys, env)
    require_blocks(used)
    return used


def said(precision: str = "fp32", engine: str | None = None, **env: str) -> str:
    try:
        followed(Keys(precision=precision, engine=engine), **env)
    except ConfigError as error:
        return str(error)
    return ""


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
REFUSED = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE=3": "under which no penalty with second derivatives works; FSDP 2 shares weights",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE=auto": "zero_stage can be 0, 1 or 2",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE=ds.json": "deepspeed_config_file (ACCELERATE_DEEPSPEED_CONFIG_FILE=ds.json)",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=cpu": "deepspeed_offload_param_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=nvme": "it can be none or cpu",
    "ACCELERATE_USE_FSDP=true": "asks for FSDP (ACCELERATE_USE_FSDP=true) of version 1: set fsdp_version: 2",
    "FSDP_SHARDING_STRATEGY=FULL_SHARD": "asks for FSDP (FSDP_) of version 1",
    "ACCELERATE_USE_MEGATRON_LM=true": "asks for Megatron-LM (ACCELERATE_USE_MEGATRON_LM=true)",
    "ACCELERATE_USE_TP=true": "asks for tensor parallelism (ACCELERATE_USE_TP=true)",
    "PARALLELISM_CONFIG_TP_SIZE=2": "asks for parallelism_config (PARALLELISM_CONFIG_TP_SIZE=2)",
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR": "dynamo_backend: INDUCTOR",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4": "gradient_accumulation_steps: 4",
    "ACCELERATE_MIXED_PRECISION=fp16": "precision can be fp32 or bf16; set mixed_precision: 'no'",
    "ACCELERATE_MIXED_PRECISION=bf16": "but the run has precision: fp32; add --set precision=bf16, or set mixed_pre",
}
REFUSED_OF_AN_ENGINE = [
    ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true (FSDP_OFFLOAD_PARAMS)"),
    (
        {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        "fsdp_activation_checkpointing, which is checkpoint_activations: generator fastgan and discriminator projected",
    ),
    ({**FSDP2, "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "it can be FULL_SHARD (fsdp2) or HYBRID_SHARD (hsdp)"),
    ({**ZERO2, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "here optimizer.PLAYER.clip_norm says it"),
]


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_of_the_launcher_that_a_run_would_not_follow_is_refused_by_name(setting: str) -> None:
    name, _, value = setting.partition("=")
    sentence = said(**{name: value})
    assert sentence.startswith("accelerate launch asks for ") and REFUSED[setting] in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(("env", "sentence"), REFUSED_OF_AN_ENGINE)
def test_what_an_engine_of_the_launcher_is_asked_beyond_sharing_is_refused_by_name(
    env: dict[str, str], sentence: str
) -> None:
    assert sentence in said(**env)


def test_a_run_without_an_engine_takes_the_one_that_the_launcher_asks_for() -> None:
    assert followed().engine == "ddp"
    assert followed(**FSDP2).engine == "fsdp2"
    assert followed(**FSDP2, FSDP_SHARDING_STRATEGY="HYBRID_SHARD").engine == "hsdp"
    for stage, engine in (("0", "ddp"), ("1", "zero1"), ("2", "zero2")):
        assert followed(**{**ZERO2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}).engine == engine
    able = Keys(model=SimpleNamespace(generator=SimpleNamespace(kind="stylegan2")))
    again = followed(able, **FSDP2, FSDP_ACTIVATION_CHECKPOINTING="true")
    assert again.checkpoint_activations and not followed(able, **FSDP2).checkpoint_activations
    host = followed(**ZERO2, ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    assert host.offload_optimizer and not followed(**ZERO2).offload_optimizer


def test_a_run_with_an_engine_keeps_it_unless_the_launcher_asks_for_another() -> None:
    assert followed(Keys(engine="zero1")).engine == "zero1"
    assert followed(Keys(engine="fsdp2"), **FSDP2).engine == "fsdp2"
    assert said(engine="fsdp2", **ZERO2) == (
        "accelerate launch asks for DeepSpeed ZeRO-2 (ACCELERATE_DEEPSPEED_ZERO_STAGE=2), which is engine: zero2, but "
        "the run has engine: fsdp2; leave the key out or say --set engine=zero2, or set distributed_type: MULTI_GPU in "
        "the launcher's configuration"
    )


def test_what_is_done_another_way_without_changing_a_number_is_said() -> None:
    [sentence] = not_followed({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "true"})
    assert "fsdp_reshard_after_forward: true is not followed: a network stays gathered" in sentence
    assert not list(not_followed({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}))


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


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_launch_file_brings_its_engine_and_the_run_folder_says_which_was_used(tmp_path: Path, engine: str) -> None:
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    shipped = yaml.safe_load((REPO / "launch" / f"{engine}.yaml").read_text())
    code, told = launched(tmp_path, "--set", "total_img=16", **{**shipped, "num_processes": 2})
    assert code == 0, told
    [start] = json.loads((tmp_path / "out" / "environment.json").read_text())["starts"]
    assert start["engine"]["name"] == engine and start["world_size"] == 2
    assert {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & start["launcher"].keys()
    assert f"engine {engine}" in told
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["engine"] == engine


def test_a_launch_with_the_first_fsdp_ends_before_ranks_meet_in_one_sentence(tmp_path: Path) -> None:
    code, told = launched(tmp_path, distributed_type="FSDP", fsdp_config={"fsdp_version": 1})
    assert code != 0 and not (tmp_path / "out").exists()
    assert told.count("sdtrain: accelerate launch asks for FSDP (ACCELERATE_USE_FSDP=true) of version 1") == 1, told
    assert "exitcode  : 2" in told  # torchrun reports the code of the ranks and ends with its own


def test_one_process_with_half_precision_ends_with_code_2(tmp_path: Path) -> None:
    run = write_config(tmp_path / "run.yaml", tiny_config(make_shards(tmp_path / "shards")))
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "fp16"}
    done = run_python("sdtrain/main.py", "--cfg", str(run), "--out", str(tmp_path / "out"), env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "mixed_precision: fp16" in done.stderr
