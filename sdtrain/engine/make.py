"""Which engine a configuration asks for. A new one is a file beside this and a row here."""

from __future__ import annotations

import os
from importlib import import_module

import torch

from sdtrain.config.keys import Config
from sdtrain.engine.ddp import Ddp
from sdtrain.engine.phases import PhaseEngine, Sharing
from sdtrain.engine.ranks import world
from sdtrain.precision import exact_sums

ENGINES: dict[str, type[PhaseEngine] | str] = {  # MODULE:CLASS is imported when it is asked for
    "ddp": Ddp,
    "fsdp2": "sdtrain.engine.fsdp:Fsdp",
    "hsdp": "sdtrain.engine.fsdp:Fsdp",
    "zero1": "sdtrain.engine.zero:Zero",
    "zero2": "sdtrain.engine.zero:Zero",
}


def make_engine(config: Config, device: torch.device) -> PhaseEngine:
    """The engine of `config.engine`, which `config` has checked; one rank has nobody to share with."""
    name = (config.engine or "ddp") if world() > 1 else "ddp"
    row = ENGINES[name]
    if isinstance(row, str):
        module, _, kind = row.partition(":")
        row = getattr(import_module(module), kind)
    assert not isinstance(row, str)
    return row(
        device,
        vars(config.optimizer),
        precision=config.precision,
        exact=exact_sums(config, device),
        clamp=config.on_nonfinite == "clamp",
        sharing=sharing_of(config, name),
        late=config.on_nonfinite == "stop" and not name.startswith("zero"),  # DeepSpeed steps by itself
    )


def sharing_of(config: Config, name: str) -> Sharing:
    return Sharing(
        name=name,
        ranks=config.shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", world())) if name == "hsdp" else None,
        teacher=config.shard_teacher,
        stage={"zero1": 1, "zero2": 2}.get(name, 0),
        offload=config.offload_optimizer,
    )
