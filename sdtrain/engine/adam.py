"""Adam on a CPU by torch's fused kernel, in a third of the time of its other forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam

FULL = 16  # numbers: vectors of the kernel are 64 bytes at most


class CpuAdam(torch.optim.Adam):
    """Gives a number the same bits wherever in a tensor it is, as engines that deal tensors out need.

    The kernel rounds the last numbers of a tensor, too few for a vector, another way. Here they move in a full one.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in moved]
            steps = [state["step"] for state in states]
            averages = ([state[slot].view(-1) for state in states] for slot in ("exp_avg", "exp_avg_sq"))
            numbers = [[p.detach().view(-1) for p in moved], [p.grad.reshape(-1) for p in moved], *averages]
            rests = [[t[len(t) - len(t) % FULL :] for t in tensors] for tensors in numbers]
            padded = [[F.pad(t, (0, -len(t) % FULL)) for t in tensors] for tensors in rests]
            bad: Tensor | None = getattr(self, "found_inf", None)
            _move(group, padded, [step.clone() for step in steps], bad)
            _move(group, [[t[: len(t) - len(t) % FULL] for t in tensors] for tensors in numbers], steps, bad)
            for i in (0, 2, 3):
                for rest, full in zip(rests[i], padded[i], strict=True):
                    rest.copy_(full[: len(rest)])

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        """step [], exp_avg and exp_avg_sq as the parameter [...]."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return state


def _move(group: dict[str, Any], numbers: list[list[Tensor]], steps: list[Tensor], bad: Tensor | None) -> None:
    """Parameters, gradients and both averages, [numbers] each; counts of steps []. In place, unless `bad` [] is 1."""
    params, grads, averages, squares = numbers
    beta1, beta2 = group["betas"]
    own = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
    unused: dict[str, Any] = {"amsgrad": False, "weight_decay": 0.0, "maximize": False}
    adam(params, grads, averages, squares, [], steps, fused=True, found_inf=bad, **own, **unused)
