"""Kernel distance (Binkowski et al. 2018): unbiased MMD with the cubic kernel, averaged over subsets."""

from __future__ import annotations

from torch import Tensor

NUM_SUBSETS = 100
SUBSET_SIZE = 1000


def kid(
    real: Tensor, fake: Tensor, *, num_subsets: int = NUM_SUBSETS, subset_size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0) over subsets of feature rows [n, d]; subsets shrink to the smaller set."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(subset_size, len(real), len(fake))
    found = kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=num_subsets, kid_subset_size=size, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
