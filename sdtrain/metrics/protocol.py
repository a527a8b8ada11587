"""How a number was measured, stored beside it; numbers of different protocols are not compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sdtrain.errors import ConfigError

# says where, not how: free to differ
DESCRIPTIVE = ("real_source", "fake_source", "split", "sdtrain")


def fingerprint(protocol: dict[str, Any]) -> str:
    """Hash of everything that decides a value."""
    binding = {key: value for key, value in protocol.items() if key not in DESCRIPTIVE}
    return hashlib.sha256(json.dumps(binding, sort_keys=True).encode()).hexdigest()[:16]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys in which two protocols disagree, with both values."""
    keys = sorted((one.keys() | other.keys()) - set(DESCRIPTIVE))
    return [f"{key}: {one.get(key)} and {other.get(key)}" for key in keys if one.get(key) != other.get(key)]


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises ConfigError that lists what differs when two results must not be compared."""
    found = differences(one, other)
    if found:
        raise ConfigError(
            f"These results were measured in different ways ({'; '.join(found)}), so their numbers do not compare; "
            "evaluate both with the same settings."
        )
