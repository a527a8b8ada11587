"""Whether a configuration that asks for activation checkpointing has a network with blocks. Torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sdtrain.config import schema
from sdtrain.config.declare import ROLES, Role
from sdtrain.errors import ConfigError


def with_blocks(role: Role) -> list[str]:
    """Kinds of a role whose networks can compute blocks again, in alphabetical order."""
    return [kind for kind in schema.kinds(role) if schema.model(kind).blocks.get(role)]


def split_by_blocks(model: Any) -> tuple[list[str], list[str]]:
    """The sections of `model`, as ROLE KIND: those whose networks can compute blocks again, and those that cannot."""
    sections: list[tuple[Role, str]] = [(role, vars(model)[role].kind) for role in ROLES if role in vars(model)]
    can = {role: kind in with_blocks(role) for role, kind in sections}
    named = [(can[role], f"{role} {kind}") for role, kind in sections]
    return [name for able, name in named if able], [name for able, name in named if not able]


def block_problems(config: Any) -> Iterator[tuple[str, str]]:
    """(keys, sentence) where `checkpoint_activations` would do nothing at all."""
    if not config.checkpoint_activations:
        return
    able, unable = split_by_blocks(config.model)
    if not able:
        kinds = "; ".join(f"of the {role}s {', '.join(with_blocks(role))} can" for role in ROLES)
        yield (
            "checkpoint_activations",
            f"checkpoint_activations: {' and '.join(unable)} cannot compute blocks again; {kinds}: leave the key out, "
            "or take one of these",
        )


def require_blocks(config: Any) -> None:
    """Raises `ConfigError` where a launcher has asked for what this run's networks cannot do."""
    for _, sentence in block_problems(config):
        raise ConfigError(f"accelerate launch asks for fsdp_activation_checkpointing, which is {sentence}")
