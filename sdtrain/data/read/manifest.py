"""manifest.json of a packed folder: written last by packing; reading checks its types and the names of its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtrain.errors import DataError
from sdtrain.files import open_regular

MANIFEST_NAME = "manifest.json"
LARGEST_SIDE = 1 << 16


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed folder, of the right types, its shards under plain names. Raises DataError."""
    path = folder / MANIFEST_NAME
    try:
        with open(open_regular(path)) as file:
            manifest = json.load(file)
        shards = [_shard(entry) for entry in manifest["shards"]]
        known = {
            "shards": shards,
            "label_names": [str(name) for name in manifest.get("label_names") or ()],
            "hash": str(manifest["hash"]),
            "resolution": _side(manifest.get("resolution")),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run: sdtrain pack --reindex {folder}") from None
    strange = [shard["name"] for shard in shards if not is_plain_name(shard["name"])]
    if strange:
        raise DataError(
            f"{path} names the shard {strange[0][:80]!r}, which is no plain file name; "
            f"shards lie beside their manifest, run: sdtrain pack --reindex {folder}"
        )
    return {**manifest, **known}


def _shard(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": str(entry["name"]),
        "size": int(entry["size"]),
        "sha256": str(entry["sha256"]),
        "count": int(entry["count"]),
    }


def hash_of(shards: Sequence[dict[str, Any]]) -> str:
    """The hash of a set: that of its shards' digests in order."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()


def _side(value: object) -> int | None:
    if value is None or (isinstance(value, int) and 0 < value <= LARGEST_SIDE):
        return value
    raise ValueError(f"resolution {value!r}")


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder and cannot be read as an address or a command."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")
