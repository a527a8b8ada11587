"""What `accelerate launch` asks of a program, obeyed or refused: it only sets variables that nobody else here reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from sdtrain.config.keys import Config

Environment = Mapping[str, str]
NOTHING = ("", "0", "no", "none", "false", "off")
MULTI = "set distributed_type: MULTI_GPU in the launcher's configuration; engine: ddp is what there is"
# who asks: (what it is, the switch, the prefix of its settings)
SHARDING = (
    ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_"),
    ("FSDP", "ACCELERATE_USE_FSDP", "FSDP_"),
    ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM_"),
    ("tensor parallelism", "ACCELERATE_USE_TP", "ACCELERATE_TP_"),
)
PARALLEL = tuple(f"PARALLELISM_CONFIG_{what}_SIZE" for what in ("DP_SHARD", "TP", "CP", "SP"))


def check_launcher(config: Config, env: Environment = os.environ) -> None:
    """Raises `ConfigError` for the first setting of the launcher that this run would not follow."""
    problem = _sharding(env) or _precision(config, env) or _others(env)
    if problem:
        raise ConfigError(f"accelerate launch asks for {problem}")


def wants_cpu(env: Environment = os.environ) -> bool:
    """`accelerate launch --cpu`, or SDTRAIN_CPU."""
    return bool(env.get("SDTRAIN_CPU")) or _asked(env, "ACCELERATE_USE_CPU")


def _asked(env: Environment, name: str) -> bool:
    return env.get(name, "").strip().lower() not in NOTHING


def _sharding(env: Environment) -> str | None:
    for what, switch, prefix in SHARDING:
        settings = sorted(name for name in env if name.startswith(prefix))
        asked = [name for name in (switch, *settings) if _asked(env, name)]
        if asked:
            return f"{what} ({asked[0]}={env[asked[0]]}), which this version has not: {MULTI}"
    for name in PARALLEL:
        if env.get(name, "1").strip() not in ("1", *NOTHING):
            return f"parallelism_config ({name}={env[name]}), which this version has not: {MULTI}"
    return None


def _precision(config: Config, env: Environment) -> str | None:
    """`no` is what the launcher says when nobody has chosen, so it contradicts nothing."""
    name = "ACCELERATE_MIXED_PRECISION"
    asked = env.get(name, "no").strip().lower()
    if asked in NOTHING or asked in ("fp32", config.precision):
        return None
    mend = f"add --set precision={asked}, or" if asked == "bf16" else "precision can be fp32 or bf16;"
    where = f"mixed_precision: {asked} ({name}), but the run has precision: {config.precision}"
    return f"{where}; {mend} set mixed_precision: 'no' in the launcher's configuration"


def _others(env: Environment) -> str | None:
    if _asked(env, name := "ACCELERATE_DYNAMO_BACKEND"):
        said = f"compilation by torch dynamo (dynamo_backend: {env[name]}, {name}), for which sdtrain has no key"
        return f"{said}; set dynamo_backend: 'NO' in the launcher's configuration"
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if env.get(name, "1").strip() not in ("1", "auto", *NOTHING):
        said = f"gradient_accumulation_steps: {env[name]} ({name})"
        return f"{said}; here batch_size / ghost_batch says what an optimizer step adds up: leave it at 1"
    return None
