"""What `accelerate launch` asks of a program, obeyed or refused: it only sets variables, and this is who reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from sdtrain.config.keys import Config

Environment = Mapping[str, str]
NOTHING = ("", "0", "no", "none", "false", "off", "no_wrap")
MEND = "in the launcher's configuration"
MULTI = f"set distributed_type: MULTI_GPU {MEND}"
# who asks: (what it is, the switch, the prefix of its settings)
STRANGE = (
    ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM_"),
    ("tensor parallelism", "ACCELERATE_USE_TP", "ACCELERATE_TP_"),
)
PARALLEL = tuple(f"PARALLELISM_CONFIG_{what}_SIZE" for what in ("DP_SHARD", "TP", "CP", "SP"))
ZERO, FSDP = "ACCELERATE_DEEPSPEED_", "FSDP_"
ZERO_KNOWN = ("ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE")
# what sdtrain does instead of settings of FSDP that change no number
NOT_FOLLOWED = {
    "FSDP_RESHARD_AFTER_FORWARD": "a network stays gathered until its phase is over",
    "FSDP_AUTO_WRAP_POLICY": "sdtrain cuts networks into blocks itself",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "sdtrain cuts networks into blocks itself",
    "FSDP_MIN_NUM_PARAMS": "sdtrain cuts networks into blocks itself",
}
MARKS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # one of which a launcher sets
PROC = Path("/proc")
PROGRAMS = {"torchrun", "accelerate", "accelerate-launch"}
MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch", "accelerate")
FILES = tuple(f"{module.replace('.', '/')}.py" for module in (*MODULES[:3], "accelerate.commands.accelerate_cli"))
FSDP_REFUSED = ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING_OFFLOAD", "IGNORED_MODULES")


@dataclass(frozen=True)
class Asked:
    """An engine that a launcher's configuration asks for."""

    engine: str
    words: str
    """How it says so."""
    offload: bool = False
    recompute: bool = False


def follow_launcher(config: Config, env: Environment = os.environ) -> Config:
    """The configuration with the engine that is used: the run's own, else what the launcher asks for, else ddp.

    Raises `ConfigError` for the first setting of the launcher that this run would not follow.
    """
    try:
        asked = asked_engine(env)
        _same_engine(config, asked)
        problem = _precision(config, env) or _others(env)
        if problem:
            raise Refused(problem)
    except Refused as refused:
        raise ConfigError(f"accelerate launch asks for {refused}") from None
    engine = config.engine or (asked.engine if asked else "ddp")
    offload = config.offload_optimizer or bool(asked and asked.offload)
    recompute = config.checkpoint_activations or bool(asked and asked.recompute)
    used: Config = replace(config, offload_optimizer=offload, checkpoint_activations=recompute)
    return replace(used, engine=engine)  # type: ignore[arg-type]


class Refused(Exception):
    """The end of a sentence."""


def asked_engine(env: Environment) -> Asked | None:
    """What the launcher's configuration wants to share networks by. Raises `Refused`."""
    for what, switch, prefix in STRANGE:
        if settings := _settings(env, switch, prefix):
            raise Refused(f"{what} ({settings[0]}={env[settings[0]]}), which sdtrain has not: {MULTI}")
    for name in PARALLEL:
        if env.get(name, "1").strip() not in ("1", *NOTHING):
            raise Refused(f"parallelism_config ({name}={env[name]}), which sdtrain has not: {MULTI}")
    if _settings(env, "ACCELERATE_USE_DEEPSPEED", ZERO):
        return _deepspeed(env)
    return _fsdp(env) if _settings(env, "ACCELERATE_USE_FSDP", FSDP) else None


def not_followed(env: Environment = os.environ) -> Iterator[str]:
    """Sentences on settings that are read, change no number, and are done another way here."""
    for name, instead in NOT_FOLLOWED.items():
        if _asked(env, name) and _asked(env, "ACCELERATE_USE_FSDP"):
            yield f"accelerate's {name.lower()}: {env[name]} is not followed: {instead}"


def said(env: Environment = os.environ) -> dict[str, str]:
    """Everything that `accelerate launch` has set, for environment.json."""
    prefixes = ("ACCELERATE_", FSDP, "PARALLELISM_CONFIG_")
    return {name: env[name] for name in sorted(env) if name.startswith(prefixes)}


def started_by_launcher(env: Environment = os.environ) -> bool:
    """Whether the parent of this process is torchrun or `accelerate launch`; anybody may export what they set."""
    return any(name in env for name in MARKS) and _launches(PROC / str(os.getppid()))


def _launches(process: Path) -> bool:
    """A launcher is a program of that name, or a module after python's -m."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    named = {Path(word).name for word in words[:2]} & PROGRAMS
    run = any(flag == "-m" and module in MODULES for flag, module in zip(words, words[1:]))
    return bool(named) or run or any(word.endswith(FILES) for word in words[1:2])


def wants_cpu(env: Environment = os.environ) -> bool:
    """`accelerate launch --cpu`, or SDTRAIN_CPU."""
    return bool(env.get("SDTRAIN_CPU")) or _asked(env, "ACCELERATE_USE_CPU")


def _asked(env: Environment, name: str) -> bool:
    return env.get(name, "").strip().lower() not in NOTHING


def _settings(env: Environment, switch: str, prefix: str) -> list[str]:
    """Those that ask for something."""
    return [name for name in (switch, *sorted(n for n in env if n.startswith(prefix))) if _asked(env, name)]


def _deepspeed(env: Environment) -> Asked:
    stage, device = env.get(f"{ZERO}ZERO_STAGE", "2").strip(), f"{ZERO}OFFLOAD_OPTIMIZER_DEVICE"
    words = f"DeepSpeed ZeRO-{stage} ({ZERO}ZERO_STAGE={stage})"
    if stage == "3":
        raise Refused(
            f"{words}, under which no penalty with second derivatives works; FSDP 2 shares weights out and can them: "
            f"set distributed_type: FSDP with fsdp_version: 2 (launch/fsdp2.yaml), or zero_stage: 2 {MEND}"
        )
    if stage not in ("0", "1", "2"):
        raise Refused(f"{words}; zero_stage can be 0, 1 or 2")
    if _asked(env, device) and env[device].strip().lower() != "cpu":
        raise Refused(f"offload_optimizer_device: {env[device]} ({device}); it can be none or cpu")
    for name in _settings(env, f"{ZERO}CONFIG_FILE", ZERO):
        if name.removeprefix(ZERO) not in ZERO_KNOWN:
            key = name.removeprefix("ACCELERATE_").lower()
            raise Refused(f"{key} ({name}={env[name]}), which sdtrain does not follow: leave it out {MEND}")
    clip = "ACCELERATE_GRADIENT_CLIPPING"
    if _asked(env, clip) and env[clip] not in ("0.0", "auto"):
        raise Refused(f"gradient_clipping: {env[clip]} ({clip}); here optimizer.PLAYER.clip_norm says it: leave it out")
    return Asked("ddp" if stage == "0" else f"zero{stage}", words, offload=_asked(env, device))


def _fsdp(env: Environment) -> Asked:
    version, strategy = env.get("FSDP_VERSION", "1").strip(), env.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").strip()
    words = f"FSDP ({'ACCELERATE_USE_FSDP=true' if _asked(env, 'ACCELERATE_USE_FSDP') else 'FSDP_'})"
    if version != "2":
        raise Refused(f"{words} of version {version}: set fsdp_version: 2 {MEND} (launch/fsdp2.yaml)")
    for name in (f"{FSDP}{key}" for key in FSDP_REFUSED):
        if _asked(env, name):
            raise Refused(f"{name.lower()}: {env[name]} ({name}), which sdtrain does not follow: leave it out {MEND}")
    engine = {"FULL_SHARD": "fsdp2", "1": "fsdp2", "HYBRID_SHARD": "hsdp", "4": "hsdp"}.get(strategy)
    if engine is None:
        raise Refused(f"fsdp_sharding_strategy: {strategy}; it can be FULL_SHARD (fsdp2) or HYBRID_SHARD (hsdp)")
    return Asked(engine, words, recompute=_asked(env, f"{FSDP}ACTIVATION_CHECKPOINTING"))


def _same_engine(config: Config, asked: Asked | None) -> None:
    if asked and config.engine and config.engine != asked.engine:
        raise Refused(
            f"{asked.words}, which is engine: {asked.engine}, but the run has engine: {config.engine}; leave the key "
            f"out or say --set engine={asked.engine}, or {MULTI}"
        )


def _precision(config: Config, env: Environment) -> str | None:
    """`no` is what the launcher says when nobody has chosen, so it contradicts nothing."""
    name = "ACCELERATE_MIXED_PRECISION"
    asked = env.get(name, "no").strip().lower()
    if asked in NOTHING or asked in ("fp32", config.precision):
        return None
    mend = f"add --set precision={asked}, or" if asked == "bf16" else "precision can be fp32 or bf16;"
    where = f"mixed_precision: {asked} ({name}), but the run has precision: {config.precision}"
    return f"{where}; {mend} set mixed_precision: 'no' {MEND}"


def _others(env: Environment) -> str | None:
    if _asked(env, name := "ACCELERATE_DYNAMO_BACKEND"):
        told = f"compilation by torch dynamo (dynamo_backend: {env[name]}, {name}), for which sdtrain has no key"
        return f"{told}; set dynamo_backend: 'NO' {MEND}"
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if env.get(name, "1").strip() not in ("1", "auto", *NOTHING):
        told = f"gradient_accumulation_steps: {env[name]} ({name})"
        return f"{told}; here batch_size / ghost_batch says what an optimizer step adds up: leave it at 1"
    return None
