"""The rules of precision, and every region and switch that keeps them. Nothing else of the package says how to round.

What is float32 on every device, inside `full_precision` whatever `precision` and `tf32` say:

    weights, gradients, optimizers, averages of weights (Eq. 1), pass state (running statistics, w_avg, u and v)
    sigma of spectral norm, demodulation, the mapping network, images as they are added up, statistics of a minibatch
    T and its grid, matrices and margins of ADA, degradations (never in TF32 either)
    losses and their means: adversarial, L_SD, LPIPS after its trunk, MS-SSIM, VGG distances, L_MLP, penalties
    features and sums of every metric (never in TF32 either; sums in float64)

What `precision: bf16` changes: convolutions and products of the trained networks, by autocast, outside of penalties
with second derivatives (R1, R2, path length), which stay float32. bfloat16 has the range of float32, so nothing is
scaled.

What is float16: blocks of StyleGAN2 that say so (`num_low_precision_res`), on a GPU. There is no loss scaling: as in
the official code their activations are clamped (`conv_clamp`), weights and styles are brought into range before a
modulated convolution (`half_range`), and gradients that still overflow are replaced with `on_nonfinite: clamp`.

What `tf32` changes: the factors of float32 products and convolutions on a GPU, except where it says "never" above.

What `deterministic` changes, on a GPU: kernels that repeat their bits, at a cost. With it, or on a CPU, and with sums
of ghosts in float64 (`summation: exact`) a run repeats itself to the bit on machines alike, on any number of ranks.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sdtrain.config.keys import Config

WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used


def full_precision(device: torch.device | str) -> AbstractContextManager[object]:
    """No autocast inside; the meta device, where shapes are worked out, has none to begin with."""
    kind = torch.device(device).type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def exact_sums(config: Config, device: torch.device | str) -> bool:
    """Whether gradients of single ghosts are added up in float64 (`summation`) on this kind of device."""
    if config.summation == "auto":
        return config.deterministic or torch.device(device).type == "cpu"
    return config.summation == "exact"


def set_precision(tf32: bool, deterministic: bool = False) -> None:
    """Set float32 arithmetic of this process, before the first CUDA operation.

    Without `tf32`, matrix products and convolutions of float32 tensors compute in float32, which torch leaves to choice
    for the former and does not do for the latter by itself. `deterministic`: kernels that repeat their bits.
    """
    # The older switches go first: cudnn.flags and others still read them, and torch refuses to answer while the two
    # kinds of switch say different things.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for backend in _backends().values():
        backend.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.benchmark = not deterministic  # shapes repeat, so the search for the fastest kernel pays
    torch.backends.cudnn.deterministic = deterministic
    # a few kernels have no such form, and torch says which
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs, decides nothing
    if deterministic:
        os.environ.setdefault(*WORKSPACE)


def described() -> dict[str, Any]:
    """The switches as they stand, for environment.json."""
    found: dict[str, Any] = {f"{where}.fp32_precision": b.fp32_precision for where, b in _backends().items()}
    return found | {"deterministic": torch.are_deterministic_algorithms_enabled()}


def _backends() -> dict[str, Any]:
    cudnn: Any = torch.backends.cudnn
    return {"cuda.matmul": torch.backends.cuda.matmul, "cudnn.conv": cudnn.conv, "cudnn.rnn": cudnn.rnn}
