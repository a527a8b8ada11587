"""Improved precision and recall (Kynkaanniemi et al. 2019): is a sample inside the k-nearest-neighbour balls?"""

from __future__ import annotations

import torch
from torch import Tensor

from sdtrain.engine.ranks import rank, sum_over_ranks, world

K = 3
MOST_AT_ONCE = 1 << 28  # distances that torch-fidelity may hold at once, 2 GiB
DISTANCES_AT_ONCE = 1 << 24


def precision_recall(real: Tensor, fake: Tensor, *, k: int = K, half: bool = False) -> tuple[float, float]:
    """Precision (fakes within the real manifold) and recall (reals within the fake one) of feature rows [n, d].

    Distances are exact (float64), by torch-fidelity in a single process; ours are what it lacks. Several ranks share
    the rows out and all get the same result. `half=True` rounds features and distances to float16 as the StyleGAN2-ADA
    code does; the two can differ by single samples.
    """
    if not half and world() == 1 and k < min(len(real), len(fake)):
        return _in_one_process(real.double(), fake.double(), k)
    if half:
        real, fake = real.half(), fake.half()
    real, fake = real.double(), fake.double()
    precision = covered(fake, real, radii(real, k, half), half)
    return precision, covered(real, fake, radii(fake, k, half), half)


def _in_one_process(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    large = max(len(real), len(fake)) ** 2 > MOST_AT_ONCE
    found = prc_features_to_metric(
        fake, real, prc_neighborhood=k, prc_batch_size=4096, save_cpu_ram=large, verbose=False
    )
    # its means are float32: back to the fractions that they are of
    hits = round(found[KEY_METRIC_PRECISION] * len(fake)), round(found[KEY_METRIC_RECALL] * len(real))
    return hits[0] / len(fake), hits[1] / len(real)


def distances(x: Tensor, y: Tensor, half: bool) -> Tensor:
    """Euclidean, [n, m] float64; with `half` rounded to float16."""
    exact = torch.cdist(x, y)
    return exact.half().double() if half else exact


def radii(points: Tensor, k: int, half: bool = False) -> Tensor:
    """Distance of every point to its k-th nearest other one (the (k+1)-th smallest, itself included), [n]."""
    out = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    for rows in own_rows(len(points), len(points)):
        out[rows] = distances(points[rows], points, half).kthvalue(min(k + 1, len(points))).values
    sum_over_ranks([out])
    return out


def covered(probes: Tensor, points: Tensor, radius: Tensor, half: bool = False) -> float:
    """Share of the probes [n, d] within the ball, of `radius` [m], of at least one of the points [m, d]."""
    hits = torch.zeros(1, dtype=torch.int64, device=probes.device)
    for rows in own_rows(len(probes), len(points)):
        hits += (distances(probes[rows], points, half) <= radius).any(1).sum()
    sum_over_ranks([hits])
    return hits.item() / len(probes)


def own_rows(num_rows: int, num_columns: int) -> list[slice]:
    """Slices of rows for this rank, small enough that a slice's distances fit."""
    size = max(1, min(DISTANCES_AT_ONCE // max(num_columns, 1), -(-num_rows // world())))
    return [slice(at, at + size) for at in range(rank() * size, num_rows, world() * size)]
