"""rFID: the Frechet distance in features of an untrained Inception (Sauer et al. 2022), averaged over seeds.

StyleGAN-XL publishes one random network and no rule that made it; SD-GAN reports a mean and a spread over five
evaluations. Here the network is made by a written rule from a seed, and a result always names both, so that anyone can
make the same network again. Absolute values compare only between results of the same rule, seeds and real images.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from typing import Any

CALIBRATION_IMAGES = 128
CALIBRATION_BATCH = 32

RULE = (
    "Inception-v3 in the FID topology. Convolutions: normal with variance 2 / fan in, numbers from blake2b-64 of "
    "('random inception', seed, module name). Batch norms: gain 1, bias 0, eps 1e-3, statistics = average over batches "
    f"of {CALIBRATION_BATCH} of {CALIBRATION_IMAGES} real images in train mode, one pass, momentum None."
)
RULE_HASH = hashlib.sha256(RULE.encode()).hexdigest()[:16]


def summary(values: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """What a result says about rFID: mean, sample standard deviation (ddof 1; 0 for one seed), values, seeds, rule."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "rfid": statistics.fmean(values),
        "rfid_std": spread,
        "rfid_values": list(values),
        "rfid_seeds": list(seeds),
        "rfid_std_ddof": 1,
        "rfid_rule": RULE_HASH,
    }
