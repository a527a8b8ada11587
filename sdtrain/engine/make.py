"""Which engine a configuration asks for. A new one is a file beside this and a row here."""

from __future__ import annotations

import torch

from sdtrain.config.keys import Config
from sdtrain.engine.ddp import Ddp
from sdtrain.engine.phases import PhaseEngine

ENGINES: dict[str, type[PhaseEngine]] = {"ddp": Ddp}


def make_engine(config: Config, device: torch.device) -> PhaseEngine:
    """The engine of `config.engine`, which `config` has checked."""
    return ENGINES[config.engine](
        device,
        vars(config.optimizer),
        precision=config.precision,
        exact=config.summation == "exact",
        clamp=config.on_nonfinite == "clamp",
    )
