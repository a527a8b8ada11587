"""Which bytes a run was trained on, as data that its checkpoints keep. Free of torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sdtrain.data.read.dataset import Dataset
from sdtrain.data.read.remote import is_remote
from sdtrain.files import open_regular, sha256_of_file

PIECES, PIECE_BYTES = 4, 4096  # of a shard in the quick form: thousands of shards on a network disk take seconds
LISTED = 5
Shard = dict[str, Any]


def identity(dataset: Dataset, full: bool = False) -> dict[str, Any]:
    """Hash, number of samples, and of each shard its name, bytes and digest: of some pieces, with `full` of all bytes.

    Times of files are left out: a copy of the same bytes elsewhere is the same data.
    """
    shards = [_shard(dataset, number, full) for number in range(len(dataset.shards))]
    return {"hash": dataset.hash, "samples": dataset.num_samples, "shards": shards}


def _shard(dataset: Dataset, number: int, full: bool) -> Shard:
    url = dataset.shards[number]
    claimed = dataset.sha256[number] if dataset.sha256 else ""
    known = {"name": os.path.basename(url), "bytes": int(dataset.index.shard_sizes[number]), "sha256": claimed}
    if is_remote(url):  # what is fetched is compared with the digest of its manifest
        return known
    try:
        known["pieces"], known["bytes"] = _pieces(Path(url))
        return {**known, "sha256": sha256_of_file(url)} if full else known
    except OSError:
        return {**known, "bytes": 0, "sha256": ""}


def _pieces(path: Path) -> tuple[str, int]:
    """A digest of evenly spaced pieces, the first and the last bytes among them, and the size."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for piece in range(PIECES):
            at = max(size - PIECE_BYTES, 0) * piece // (PIECES - 1)
            digest.update(os.pread(file.fileno(), PIECE_BYTES, at))
    return digest.hexdigest(), size


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words; [] when nothing does. What one of them does not know is equal."""
    found = [f"{old[what]} {what}, now {new[what]}" for what in ("samples",) if old[what] != new[what]]
    before, after = old["shards"], new["shards"]
    if len(before) != len(after):
        found.append(f"{len(before)} shards, now {len(after)}")
    changed = [text for one, two in zip(before, after, strict=False) if (text := _difference(one, two))]
    found += changed[:LISTED] + ([f"{len(changed) - LISTED} shards more"] if len(changed) > LISTED else [])
    if not found and old["hash"] != new["hash"]:
        found.append(f"hash {old['hash'][:12]}, now {new['hash'][:12]}: keys, labels or their order differ")
    return found


def _difference(old: Shard, new: Shard) -> str:
    if old["name"] != new["name"]:
        return f"shard {old['name']}, now {new['name']}"
    if old["bytes"] != new["bytes"]:
        return f"shard {old['name']} had {old['bytes']} bytes, now {new['bytes'] or 'none'}"
    known = [what for what in ("pieces", "sha256") if old.get(what) and new.get(what)]
    return f"shard {old['name']} has another content" if any(old[what] != new[what] for what in known) else ""
