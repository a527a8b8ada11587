"""Optimizer state, and with zero2 gradients, dealt out over ranks by DeepSpeed.

Networks are whole on every rank and called as they are: DeepSpeed never sees a forward or a backward of ours. Gradients
are summed as under ddp (`sums.py`) and handed over by one linear surrogate, sum of <p, g>, whose gradient is g.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.config.options import Optimizer
from sdtrain.contracts import Net, Tensors
from sdtrain.engine.ddp import Ddp
from sdtrain.engine.phases import Sharing
from sdtrain.engine.player import BasePlayer, Span, make_optimizer
from sdtrain.engine.ranks import rank
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
    package.utils.logger.setLevel(logging.WARNING)  # it tells its whole configuration
    if device.type == "cpu":  # gloo serves as well; the op would be compiled for minutes when it is first wanted
        package.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not package.comm.is_initialized():
        package.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    return package


def settings(sharing: Sharing, numbers: int) -> dict[str, Any]:
    """DeepSpeed's configuration: clipping, accumulation and precision are ours.

    Its buffers are as large as a player of so many `numbers` needs; by default it takes 2 GB each.
    """
    zero: dict[str, Any] = {"stage": sharing.stage, "reduce_bucket_size": numbers, "allgather_bucket_size": numbers}
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


ALIGNED = 16  # numbers: DeepSpeed lays parameters end to end, and CPU kernels round by the 64 bytes they begin at


def laid_out(params: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What DeepSpeed holds for each parameter: [...], a scalar as [1], on the same memory; and the same with padding.

    An engine of an earlier stage that is collected later tells its parameters that they belong to nobody: they are its
    own, or a save would find zeros in the place of this rank's moments.
    """
    held = [nn.Parameter(p.detach() if p.dim() else p.detach().view(1)) for p in params]
    padded = []
    for p in held:
        padded.append(p)
        if gap := -p.numel() % ALIGNED:
            padded.append(nn.Parameter(p.new_zeros(gap)))
    return held, padded


class ZeroPlayer(SumPlayer):
    """DeepSpeed's engine steps; its optimizer is the one of `player.py`, over this rank's part of all parameters."""

    def __init__(
        self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None, exact: bool, sharing: Sharing
    ) -> None:
        super().__init__(nets, options, span, lazy)
        self.exact = exact
        package = deepspeed(self.params[0].device)
        self.utils = package.utils
        self.held, self.padded = laid_out(self.params)
        self.optimizer = make_optimizer(self.padded, *self.settings(span[0]), options)
        model, wishes = nn.ParameterList(self.padded), settings(sharing, sum(p.numel() for p in self.padded))
        self.engine: Any = package.initialize(model=model, optimizer=self.optimizer, config=wishes)[0]
        for p, held in zip(self.params, self.held, strict=True):
            p.data = held.data.view(p.shape)

    def step(self) -> None:
        """DeepSpeed's backward of sum <p, g> leaves g where its step looks for it."""
        given = {id(h): g for h, g in zip(self.held, self.gradients(), strict=True)}
        super().clear()
        self.engine.backward(sum((h * given[id(h)].view_as(h) if id(h) in given else h * 0).sum() for h in self.padded))
        self.engine.step()

    def close(self) -> None:
        super().close()
        self.engine.destroy()

    @property
    def flat(self) -> Tensor:
        """[numbers] This rank's part of all parameters, which the optimizer moves."""
        part: Tensor = self.optimizer.param_groups[0]["params"][0]
        return part

    def state(self, at: int | None = None) -> dict[str, Tensor]:
        """See `contracts.Player`. All ranks together."""
        found = {}
        for (key, p), held in zip(self.named.items(), self.held, strict=True):
            for slot, value in self.optimizer.state.get(self.flat, {}).items():
                whole = value if slot == "step" else self.utils.safe_get_full_optimizer_state(held, slot).view(p.shape)
                if at in (None, rank()):  # all ranks have taken part in gathering it
                    found[f"{key}/{slot}"] = whole.detach().clone()
        return found

    def load_state(self, tensors: Tensors) -> None:
        """See `contracts.Player`. Raises `RunError` where parameters have taken different numbers of steps."""
        self.engine.optimizer.refresh_fp32_params()  # the networks may have been loaded since
        self.optimizer.state.clear()
        if not tensors:
            return
        steps = {int(tensors[name]) if (name := f"{key}/step") in tensors else 0 for key in self.named}
        if len(steps) > 1:
            raise RunError(
                "this checkpoint's parameters have taken different numbers of optimizer steps, and DeepSpeed counts "
                "them together; go on with engine: fsdp2 or ddp"
            )
        slots = sorted({name.rpartition("/")[2] for name in tensors} - {"step"})  # `state` gathers in this order
        step = torch.tensor(float(steps.pop()))
        self.optimizer.state[self.flat] = {"step": step, **{slot: torch.zeros_like(self.flat) for slot in slots}}
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for key, held in zip(self.named, self.held, strict=True):
            for slot in slots:
                value = tensors[f"{key}/{slot}"].to(self.flat.device).view_as(held)
                self.utils.safe_set_full_optimizer_state(held, value, slot)


class Zero(Ddp):
    """See `contracts.Engine`."""

    def player(self, nets: Sequence[Net], options: Optimizer, span: Span, lazy: int | None) -> BasePlayer:
        return ZeroPlayer(nets, options, span, lazy, self.exact, self.sharing)
