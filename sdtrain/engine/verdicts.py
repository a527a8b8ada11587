"""Whether losses and gradients were finite, asked on the device and read a step late, so that the host never waits.

A phase that is not finite moves nobody, whenever its answer is read: the optimizer skips it on the device, and every
phase after it too. Its rank learns of it a step later, with all others, and ends then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdtrain.contracts import Terms


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One phase of one step."""

    phase: str
    step: int
    terms: Terms
    bad: Tensor
    """bool []: of all ranks together."""


class Sent:
    """Answers on their way to the host."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked = asked
        flags = torch.stack([one.bad for one in asked])
        self.flags = flags.to("cpu", non_blocking=True)  # read after `arrived`
        self.arrived = torch.cuda.Event()
        self.arrived.record()

    def first_bad(self) -> Asked | None:
        self.arrived.synchronize()
        return next((one for one, bad in zip(self.asked, self.flags.tolist(), strict=True) if bad), None)


class Verdicts:
    """What has been asked and not been read."""

    def __init__(self, device: torch.device) -> None:
        self.any_bad = torch.zeros((), device=device)  # float32, as optimizers want `found_inf`
        self.asked: list[Asked] = []
        self.sent: list[Sent] = []

    def ask(self, one: Asked) -> Tensor:
        """`found_inf` of the optimizer: float32 [], 1 where this phase or one before it was not finite."""
        self.asked.append(one)
        self.any_bad = torch.maximum(self.any_bad, one.bad.float())
        return self.any_bad

    def read(self, late: bool) -> Asked | None:
        """The first phase that was not finite; `late`: of those that were asked in the step before this one."""
        if self.asked:
            self.sent.append(Sent(self.asked))
            self.asked = []
        ready, self.sent = (self.sent[:-1], self.sent[-1:]) if late else (self.sent, [])
        return next(filter(None, (answer.first_bad() for answer in ready)), None)
