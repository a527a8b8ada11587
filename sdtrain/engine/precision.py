"""What float32 means on a GPU: all 23 bits of mantissa, or the 10 of TF32."""

from __future__ import annotations

from typing import Any

import torch


def set_precision(tf32: bool) -> None:
    """Set float32 arithmetic of this process, before the first CUDA operation.

    Without `tf32`, matrix products and convolutions of float32 tensors compute in float32, which torch leaves to choice
    for the former and does not do for the latter by itself.
    """
    # The older switches go first: cudnn.flags and others still read them, and torch refuses to answer while the two
    # kinds of switch say different things.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for backend in _backends().values():
        backend.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.benchmark = True  # shapes repeat, so the search for the fastest kernel pays


def described() -> dict[str, str]:
    """The switches as they stand, for environment.json."""
    return {f"{where}.fp32_precision": backend.fp32_precision for where, backend in _backends().items()}


def _backends() -> dict[str, Any]:
    cudnn: Any = torch.backends.cudnn
    return {"cuda.matmul": torch.backends.cuda.matmul, "cudnn.conv": cudnn.conv, "cudnn.rnn": cudnn.rnn}
