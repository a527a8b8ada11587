"""Checkpoints that are complete or do not count.

    checkpoints/
      img_000123456/
        G.safetensors            a network under its official names
        G.optim.safetensors      its optimizer, PARAMETER/SLOT
        ghosts_0000.safetensors  what belongs to a ghost (pools); written by the rank that owns it
        state.json               position, stage, meters, method state
        complete.json            the marker, written last: size and sha256 of every other file
      latest                     a hint for people, never trusted

A checkpoint is written into `.writing-img_...`, synced, and renamed; a reader believes `complete.json` and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.engine.ranks import barrier, gather_objects, is_main
from sdtrain.errors import RunError

MARKER = "complete.json"
_fault = os.environ.get("SDTRAIN_FAULT", "")  # fault tests name a boundary at which the process dies


def fault_point(name: str) -> None:
    """Die without a word where a fault test asks for it; does nothing in a normal run."""
    if _fault and _fault == name:
        os._exit(9)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk, rename: readers see the old file or the new one, never a part."""
    tmp = path.with_name(f".{path.name}.writing")
    with open(tmp, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()} if hasattr(
            hashlib, "file_digest"
        ) else {"bytes": path.stat().st_size, "sha256": hashlib.sha256(file.read()).hexdigest()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    own = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    write_atomically(path, save(own))


def load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.path / f"{name}.safetensors")

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists()


def save_checkpoint(
    root: Path,
    seen_img: int,
    shared: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    ghosts: Mapping[int, Mapping[str, Tensor]],
    keep: int,
) -> Path:
    """Write one checkpoint with all ranks and drop the oldest beyond `keep` (0 keeps all), newest verified first.

    `shared` is written by the main rank, `ghosts` by the rank that owns them. Raises `RunError` on every rank when any
    rank could not write (disk full, folder gone); earlier checkpoints are untouched then.
    """
    final, tmp = root / f"img_{seen_img:09d}", root / f".writing-img_{seen_img:09d}"
    if is_main():
        shutil.rmtree(tmp, ignore_errors=True)
        _together(lambda: tmp.mkdir(parents=True), tmp)
    else:
        _together(lambda: None, tmp)
    files = _together(lambda: _write_files(tmp, shared if is_main() else {}, ghosts, state if is_main() else None), tmp)
    if is_main():
        fault_point("before-marker")
        write_atomically(tmp / MARKER, json.dumps({"files": {k: v for part in files for k, v in part.items()}}).encode())
        fault_point("after-marker")
        if final.exists():  # the same position again, after a resume from an older checkpoint
            shutil.rmtree(final)
        os.rename(tmp, final)
        sync_folder(root)
        write_atomically(root / "latest", final.name.encode())
        retain(root, keep)
    barrier()
    return final


def _write_files(folder: Path, shared: Mapping, ghosts: Mapping, state: Mapping | None) -> dict[str, dict]:
    names = []
    for name, tensors in [*shared.items(), *((f"ghosts_{g:04d}", t) for g, t in ghosts.items())]:
        save_tensors(folder / f"{name}.safetensors", tensors)
        names.append(f"{name}.safetensors")
        fault_point("mid-save")
    if state is not None:
        write_atomically(folder / "state.json", json.dumps(state).encode())
        names.append("state.json")
    return {name: digest(folder / name) for name in names}


def _together(action, folder: Path) -> list[Any]:
    """Run `action` on every rank; if it failed on one, all raise the same error."""
    try:
        mine: Any = action()
        problem = None
    except OSError as error:
        mine, problem = None, str(error)
    results = gather_objects((mine, problem))
    problems = [p for _, p in results if p]
    if problems:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent if folder.parent.exists() else "/").free
        raise RunError(
            f"cannot write the checkpoint {folder.name.removeprefix('.writing-')}: {problems[0]} ({free / 1e9:.1f} GB free); "
            "earlier checkpoints are untouched; free some space and start the same command again"
        )
    return [result for result, _ in results]


def retain(root: Path, keep: int) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, and leftovers of interrupted saves."""
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    complete = [p for p in sorted(root.glob("img_*")) if (p / MARKER).exists()]
    for old in complete[:-keep] if keep else []:
        fault_point("retention")
        (old / MARKER).unlink()  # from here on it does not count, however far the deletion gets
        shutil.rmtree(old)


def verify(path: Path) -> str | None:
    """Why this folder is not a complete checkpoint, or None."""
    marker = path / MARKER
    if not marker.exists():
        return "it has no marker: the save was interrupted"
    try:
        files = json.loads(marker.read_text())["files"]
    except (ValueError, KeyError, OSError) as error:
        return f"its marker is unreadable ({error})"
    for name, expected in files.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if digest(path / name) != expected:
            return f"{name} does not match its digest"
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one folder by name. Raises `RunError` with the reason when it is not complete."""
    reason = "there is no such folder" if not path.is_dir() else verify(path)
    if reason:
        raise RunError(f"{path}: not a usable checkpoint: {reason}; name another one or remove it to fall back to an older")
    return Checkpoint(path, json.loads((path / "state.json").read_text()))


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for every newer one that was refused. All ranks get the same."""
    found: tuple[str | None, list[str]] = (None, [])
    if is_main():
        found = _search(root)
    name, refused = gather_objects(found)[0]
    if name is None:
        return None, refused
    path = root / name
    return Checkpoint(path, json.loads((path / "state.json").read_text())), refused


def _search(root: Path) -> tuple[str | None, list[str]]:
    refused = []
    for path in sorted(root.glob("img_*"), reverse=True):
        reason = verify(path)
        if reason is None:
            return path.name, refused
        refused.append(f"{path.name} is not used: {reason}")
    return None, refused
