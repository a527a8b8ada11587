"""Optimizer state, and with zero2 gradients, dealt out over ranks by DeepSpeed.

Networks are whole on every rank and called as they are: DeepSpeed never sees a forward or a backward of ours. Gradients
are summed as under ddp (`sums.py`) and handed over by one linear surrogate, sum of <p, g>, whose gradient is g.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.config.options import Optimizer
from sdtrain.contracts import Net, Tensors
from sdtrain.engine.ddp import Ddp
from sdtrain.engine.phases import Sharing
from sdtrain.engine.player import BasePlayer, Span
from sdtrain.engine.sums import SumPlayer
from sdtrain.errors import ConfigError, RunError


def deepspeed(device: torch.device) -> Any:
    """The package, told which device it is for. Raises `ConfigError` where it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is imported
    try:
        import deepspeed as package
    except ImportError as error:
        raise ConfigError(
            f"engine zero1 and zero2 need DeepSpeed ({error}): pip install 'sdtrain[deepspeed]', or use engine: fsdp2"
        ) from None
    return package


def settings(sharing: Sharing) -> dict[str, Any]:
    """DeepSpeed's configuration: clipping, accumulation and precision are ours."""
    zero: dict[str, Any] = {"stage": sharing.stage}
    if sharing.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # it clips to 1 unless told
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class ZeroPlayer(SumPlayer):
    """DeepSpeed's engine steps; its optimizer is the one of `player.py`, over this rank's part of all parameters."""

    def __init__(
        self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None, exact: bool, sharing: Sharing
    ) -> None:
        super().__init__(nets, options, span, lazy)
        self.exact = exact
        package = deepspeed(self.params[0].device)
        self.utils = package.utils
        made = package.initialize(
            model=nn.ParameterList(self.params), optimizer=self.optimizer, config=settings(sharing)
        )
        self.engine: Any = made[0]

    def step(self) -> None:
        gradients = self.gradients()
        super().clear()
        self.engine.backward(sum((p * g).sum() for p, g in zip(self.params, gradients, strict=True)))
        self.engine.step()

    def close(self) -> None:
        super().close()
        self.engine.destroy()

    def slots(self) -> dict[str, Tensor]:
        """What the optimizer holds of this rank's part of all parameters, [...] by slot; empty before the first step."""
        return next((s for s in self.optimizer.state.values() if s), {})

    def state(self) -> dict[str, Tensor]:
        """See `contracts.Player`. All ranks together."""
        found = {}
        for key, p in self.named.items():
            for slot, value in self.slots().items():
                whole = value if not value.dim() else self.utils.safe_get_full_optimizer_state(p, slot)
                found[f"{key}/{slot}"] = whole.detach().clone()
        return found
