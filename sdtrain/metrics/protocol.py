"""How a number was measured, stored beside it; numbers of different protocols are not compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from sdtrain.errors import ConfigError

# says where, not how: free to differ
DESCRIPTIVE = ("real_source", "fake_source", "split", "sdtrain")
NETWORKS = ("lite0", "dinov2", "clip")
OF_NETWORKS = (*NETWORKS, *(f"fd_{network}" for network in NETWORKS))  # of generators, of super-resolution
# whoever has no such entry did not measure what it is about
OPTIONAL = ("metrics", "features", "kid", "pr_k", "pr_precision", "rfid", "fid", "lpips", *OF_NETWORKS)


def latents_seed(seed: int, split: str) -> int:
    """The latents of a split: the next seed for `test`, since those of validation have chosen the weights."""
    return seed + 1 if split == "test" else seed


def fingerprint(protocol: dict[str, Any]) -> str:
    """Hash of everything that decides a value."""
    binding = {key: value for key, value in protocol.items() if key not in DESCRIPTIVE}
    return hashlib.sha256(json.dumps(binding, sort_keys=True).encode()).hexdigest()[:16]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys in which two protocols disagree, with both values."""
    keys = sorted((one.keys() | other.keys()) - set(DESCRIPTIVE))
    unlike = [key for key in keys if one.get(key) != other.get(key)]
    return [f"{short(key)}: {short(one.get(key))} and {short(other.get(key))}" for key in unlike]


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises ConfigError that lists what differs when two results must not be compared."""
    found = differences(one, other)
    if found:
        raise ConfigError(
            f"These results were measured in different ways ({'; '.join(found)}), so their numbers do not compare; "
            "evaluate both with the same settings."
        )


def conflicts(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What keeps two results out of one table, a short phrase each. Other latents are no other protocol, nor is it one
    to have measured a metric more."""
    found = []
    for key in sorted((one.keys() | other.keys()) - {*DESCRIPTIVE, "latents_seed", "metrics"}):
        a, b = one.get(key), other.get(key)
        if a == b or key in OPTIONAL and None in (a, b):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{phrase}" for phrase in conflicts(a, b)]
        else:
            found.append(f"{key} {short(a)} and {short(b)}")
    return found


def whole(protocols: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What any of several that do not conflict says: a third may conflict with the one and not with the other."""
    found: dict[str, Any] = {}
    for protocol in protocols:
        found = {**protocol, **{key: value for key, value in found.items() if value is not None}}
    return found


def short(value: Any) -> str:
    """The value as text; of a long one, such as a hash, the beginning."""
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
