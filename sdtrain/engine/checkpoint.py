"""Checkpoints that are complete or do not count.

    checkpoints/
      img_000123456/
        G.safetensors            a network under its official names
        G.optim.safetensors      its optimizer, PARAMETER/SLOT
        ghosts_0000.safetensors  what belongs to a ghost (pools); written by the rank that owns it
        state.json               position, stage, meters, method state
        complete.json            the marker, written last: size and sha256 of every other file
      latest                     a hint for people, never trusted

A checkpoint is written into `.writing-img_...`, synced and renamed; a reader believes `complete.json` and nothing else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdtrain.contracts import Tensors
from sdtrain.engine.ranks import gather_objects, is_main
from sdtrain.engine.writing import cannot_write
from sdtrain.errors import RunError
from sdtrain.files import (
    fault_point,
    load_tensors,
    read_json,
    require_regular,
    save_tensors,
    sha256_of_file,
    sweep,
    sync_folder,
    write_bytes,
    write_json,
)

MARKER = "complete.json"
UNFINISHED = ".writing-"
STATE = "state.json"


def digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of one file, [...] by official name, on the CPU. Raises `RunError` when it cannot be read."""
        try:
            return load_tensors(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.path}/{name}.safetensors cannot be read ({error})") from None

    def shapes(self, name: str) -> dict[str, list[int]]:
        """Those of one file's tensors by official name, from its header alone. Raises `RunError` as `tensors`."""
        path = self.path / f"{name}.safetensors"
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} cannot be read ({error})") from None

    def require_fit(self, name: str, wanted: Mapping[str, Sequence[int]]) -> None:
        """Raise `RunError` unless one file has these names and shapes; nothing is loaded."""
        found, own = self.shapes(name), {key: list(shape) for key, shape in wanted.items()}
        wrong = [key for key in own if own[key] != found.get(key)] + [key for key in found if key not in own]
        if wrong:
            key = wrong[0]
            what = f"{key} is {found.get(key, 'absent')} in the file and {own.get(key, 'absent')} in this run"
            raise RunError(
                f"{self.path}/{name}.safetensors holds something else: {what}, and {len(wrong) - 1} more tensors "
                "differ; nothing was loaded: put the right file back, or take the configuration that it was made with"
            )

    def refuse(self, wrong: str | None) -> None:
        """Raise `RunError` with what is wrong with it, unless nothing is."""
        if wrong:
            raise RunError(f"{self.path} is whole, but not of this run: {wrong}; move it away to go on without it")

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

    `shared` ({file: {name: [...]}}) is written by the main rank, `ghosts` ({ghost: {name: [...]}}) by the rank that
    owns them. Raises `RunError` on every rank when any rank could not write (disk full, folder gone); earlier
    checkpoints are untouched then.
    """
    final = write_folder(root, seen_img, shared, state, ghosts)
    together(lambda: _tidy(root, final, keep) if is_main() else None, final, root.parent)
    return final


def write_folder(
    root: Path,
    seen_img: int,
    shared: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any] | None = None,
    ghosts: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write ROOT/img_... with all ranks, marker last; one of that name is replaced. Raises as `save_checkpoint`.

    `shared`: {file: {name: [...]}}, `ghosts`: {ghost: {name: [...]}}; any shapes and devices.
    """
    final, tmp, ghosts = root / f"img_{seen_img:09d}", root / f"{UNFINISHED}img_{seen_img:09d}", ghosts or {}
    needed = sum(t.nbytes for tensors in [*shared.values(), *ghosts.values()] for t in tensors.values())
    together(lambda: _begin(tmp) if is_main() else None, tmp, root.parent, needed)
    mine = (shared, state) if is_main() else ({}, None)
    files = together(lambda: _write_files(tmp, mine[0], ghosts, mine[1]), tmp, root.parent, needed)
    listed = {name: facts for part in files for name, facts in part.items()}
    together(lambda: _commit(tmp, final, listed) if is_main() else None, tmp, root.parent, needed)
    return final


def _begin(tmp: Path) -> None:
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.parent.mkdir(exist_ok=True)  # but not the run folder: one that has vanished is not to begin anew
    tmp.mkdir()
    fault_point("begin")


def _commit(tmp: Path, final: Path, files: Mapping[str, Any]) -> None:
    """Write the marker and give the folder its name: from here on it counts."""
    fault_point("before-marker")
    write_json(tmp / MARKER, {"files": files})
    fault_point("after-marker")
    if final.exists():  # it was refused when this run resumed from an older one, or it holds this very position
        os.rename(final, final.with_name(f"{UNFINISHED}old-{final.name}"))
        fault_point("between-renames")
    os.rename(tmp, final)
    sync_folder(final.parent)
    fault_point("after-rename")


def _tidy(root: Path, final: Path, keep: int) -> None:
    write_bytes(root / "latest", final.name.encode())
    fault_point("after-latest")
    retain(root, keep)


def _write_files(
    folder: Path, shared: Mapping[str, Tensors], ghosts: Mapping[int, Tensors], state: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    names = []
    for name, tensors in [*shared.items(), *((f"ghosts_{g:04d}", t) for g, t in ghosts.items())]:
        save_tensors(folder / f"{name}.safetensors", tensors)
        names.append(f"{name}.safetensors")
        fault_point("mid-save")
    if state is not None:
        write_json(folder / STATE, state)
        names.append(STATE)
    return {name: digest(folder / name) for name in names}


def together(action: Callable[[], Any], folder: Path, run_folder: Path, needed: int = 0) -> list[Any]:
    """Run `action` on every rank, and wait for all; if it failed on one, all raise the same `RunError`.

    An unfinished `folder` is removed then; `needed` bytes are part of the message.
    """
    mine, problem = None, ""
    try:
        mine = action()
    except OSError as error:
        wanted = folder.with_name(folder.name.removeprefix(UNFINISHED))
        problem = cannot_write(wanted, error, run_folder, needed)
    results = gather_objects((mine, problem))
    if problem := next((p for _, p in results if p), ""):
        if is_main() and folder.name.startswith(UNFINISHED):
            shutil.rmtree(folder, ignore_errors=True)
        raise RunError(problem)
    return [result for result, _ in results]


def retain(root: Path, keep: int) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, and leftovers of interrupted saves.

    A checkpoint that is a link belongs to somebody else: it neither counts nor goes, nor does anything behind a root
    that is one.
    """
    if root.is_symlink():
        return
    sweep(root)
    for leftover in root.glob(f"{UNFINISHED}*"):
        if leftover.is_symlink():
            leftover.unlink()
        shutil.rmtree(leftover, ignore_errors=True)
    everything = sorted(path for path in root.glob("img_*") if not path.is_symlink())
    complete = [p for p in everything if (p / MARKER).exists()]  # never empty: one has just been written
    for unfinished in [p for p in everything if p not in complete and p < max(complete)]:
        shutil.rmtree(unfinished)  # a deletion that was interrupted
    for old in complete[:-keep] if keep else []:
        fault_point("retention")
        (old / MARKER).unlink()  # from here on it does not count, however far the deletion gets
        fault_point("mid-retention")
        shutil.rmtree(old)


def verify(path: Path) -> str | None:
    """Why this folder is not a complete checkpoint, or None."""
    if not os.path.lexists(path / MARKER):
        return "it has no marker: the save was interrupted"
    try:
        files = read_object(path / MARKER).get("files")
    except ValueError as error:
        return f"its marker is unreadable ({error})"
    if not isinstance(files, dict) or not files:
        return "its marker lists no files"
    return next((wrong for name, expected in files.items() if (wrong := _misfit(path, name, expected))), None)


def _misfit(folder: Path, name: str, expected: object) -> str | None:
    """What is wrong with a file that a marker lists, or None."""
    if "/" in name or not name.isprintable() or name in ("", ".", ".."):
        return f"its marker lists {name[:80]!r}, which is no plain file name"
    try:
        found = digest(folder / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if found == expected else f"{name} does not match its digest"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that somebody may have damaged. Raises ValueError with the reason in a few words."""
    try:
        found = read_json(path)
    except OSError as error:
        raise ValueError(error.strerror) from None
    except ValueError as error:
        raise ValueError(f"no JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was refused; the same on all ranks."""
    found: tuple[str | None, dict[str, Any], list[str]] = (None, {}, [])
    if is_main():  # digests are read once, and ranks that saw a shared folder differently could not go on together
        found = _search(root)
    name, state, refused = gather_objects(found)[0]
    return None if name is None else Checkpoint(root / name, state), refused


def _search(root: Path) -> tuple[str | None, dict[str, Any], list[str]]:
    refused: list[str] = []
    for path in sorted(root.glob("img_*"), reverse=True):
        reason = verify(path)
        try:
            if reason is None:
                return path.name, read_object(path / STATE), refused
        except ValueError as error:
            reason = f"its {STATE} is unreadable ({error})"
        refused.append(f"{path.name} is not used: {reason}")
    return None, {}, refused
