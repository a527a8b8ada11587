"""float32 results whatever precision the training around has chosen: no autocast, no TF32, no graph.

Degradations end in rounding to 8 bits and to JPEG coefficients, where ten bits of mantissa are not enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sdtrain.precision import full_precision


def matmul_exact(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] @ [..., K, N] -> [..., M, N] in full float32.

    On CUDA it goes through float64, which no TF32 switch of the process can lower.
    """
    if a.is_cuda:
        return (a.double() @ b.double()).float()
    return a @ b


@contextmanager
def exact_math(device: torch.device) -> Iterator[None]:
    """A region without gradients and without autocast."""
    with torch.no_grad(), full_precision(device):
        yield
