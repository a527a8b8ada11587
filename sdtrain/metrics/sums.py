"""Moments of features as sums that can be added up: count, sum and sum of outer products, all in float64."""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureSums:
    """Sums over feature rows. float64, because in float32 the covariance of features with an offset is lost."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> FeatureSums:
        """Add rows [n, width]."""
        rows = features.to(self.sum)
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer += rows.T @ rows
        return self

    def merge(self, other: FeatureSums) -> FeatureSums:
        self.count += other.count
        self.sum += other.sum.to(self.sum)
        self.outer += other.outer.to(self.outer)
        return self

    def moments(self, ddof: int = 0) -> tuple[Tensor, Tensor]:
        """Mean [width] and covariance [width, width], divided by n - ddof (StyleGAN2-ADA: 0, torch-fidelity: 1)."""
        mean = self.sum / self.count
        cov = self.outer / self.count - torch.outer(mean, mean)
        return mean, cov * (self.count / (self.count - ddof)) if ddof else cov

    def state(self, prefix: str) -> dict[str, Tensor]:
        count = torch.tensor(self.count)
        return {f"{prefix}count": count, f"{prefix}sum": self.sum.cpu(), f"{prefix}outer": self.outer.cpu()}

    @classmethod
    def of_state(cls, state: dict[str, Tensor], prefix: str, device: torch.device | str = "cpu") -> FeatureSums:
        """The sums that `state` wrote: sum [width], outer [width, width] and their count."""
        sums = cls(len(state[f"{prefix}sum"]), device)
        sums.count = int(state[f"{prefix}count"])
        sums.sum.copy_(state[f"{prefix}sum"])
        sums.outer.copy_(state[f"{prefix}outer"])
        return sums
