"""manifest.json of a packed folder: written last by packing; reading checks its types and the names of its shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtrain.errors import DataError
from sdtrain.files import read_json
from sdtrain.terminal import printable

MANIFEST_NAME = "manifest.json"
LARGEST_SIDE = 1 << 16


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed folder, of the right types, its shards under plain names. Raises DataError."""
    path = folder / MANIFEST_NAME
    try:
        manifest = read_json(path)
        shards = [_shard(entry) for entry in manifest["shards"]]
        known = {
            "shards": shards,
            "label_names": [str(name) for name in _list(manifest.get("label_names"))],
            "hash": str(manifest["hash"]),
            "resolution": _side(manifest.get("resolution")),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = printable(f"{error!r}")[:200]
        raise DataError(f"{path} is damaged ({reason}); run: sdtrain pack --reindex {folder}") from None
    strange = [shard["name"] for shard in shards if not is_plain_name(shard["name"])]
    if strange:
        raise DataError(
            f"{path} names the shard {strange[0][:80]!r}, which is no plain file name; "
            f"shards lie beside their manifest, run: sdtrain pack --reindex {folder}"
        )
    return {key: value for key, value in manifest.items() if _has_form(key, value)} | known


def _list(value: Any) -> list[Any]:
    if value is None or isinstance(value, list):
        return value or []
    raise ValueError(f"a list was expected, not {value!r:.40}")


def _has_form(key: str, value: Any) -> bool:
    """Whether what is told about the making of the shards, on which no run depends, can be read."""
    if key == "rejected":
        return isinstance(value, list) and all(_is_pair(pair) for pair in value)
    return isinstance(value, {"pack": dict, "converted": dict, "label_counts": list}.get(key, object))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


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
