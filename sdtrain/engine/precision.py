"""What float32 means on a GPU: all 23 bits of mantissa, or the 10 of TF32."""

from __future__ import annotations

import os
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_precision(tf32: bool, deterministic: bool = False) -> dict[str, Any]:
    """Set float32 arithmetic of this process; returns what was set, for environment.json.

    tf32 false: matrix products and convolutions of float32 tensors compute in float32, which torch leaves to choice for
    the former and does not do for the latter by itself. deterministic: kernels whose result does not change from one
    call to the next, and a warning from torch for operations that have none. Call it before the first CUDA operation.
    """
    name = "tf32" if tf32 else "ieee"
    # The older switches go first: cudnn.flags and others still read them, and torch refuses to answer while the two
    # kinds of switch say different things.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for backend in _backends().values():
        backend.fp32_precision = name
    _set_deterministic(deterministic)
    return described()


def described() -> dict[str, Any]:
    """The switches as they stand."""
    precision = {f"{where}.fp32_precision": backend.fp32_precision for where, backend in _backends().items()}
    return {
        **precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        **({WORKSPACE: os.environ[WORKSPACE]} if WORKSPACE in os.environ else {}),
    }


def _backends() -> dict[str, Any]:
    cudnn: Any = torch.backends.cudnn
    return {"cuda.matmul": torch.backends.cuda.matmul, "cudnn.conv": cudnn.conv, "cudnn.rnn": cudnn.rnn}


def _set_deterministic(wanted: bool) -> None:
    torch.use_deterministic_algorithms(wanted, warn_only=True)  # some gradients (grid_sample) have no such kernel
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted  # the search for the fastest kernel may end differently every time
    if wanted:
        os.environ.setdefault(WORKSPACE, ":4096:8")
