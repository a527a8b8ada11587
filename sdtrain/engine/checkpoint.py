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

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from sdtrain.engine.positions import MARKER, positions
from sdtrain.engine.ranks import first_said, from_main, is_main
from sdtrain.errors import RunError
from sdtrain.files import (
    fault_point,
    read_json,
    read_whole,
    require_regular,
    sha256_of_file,
    sweep,
    sync_folder,
    write_bytes,
    write_json,
)

UNFINISHED = ".writing-"
REPLACED = f"{UNFINISHED}old-"
STATE = "state.json"
TENSORS = ".safetensors"


def digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose marker and state are right. `tensors` reads no file whose digest is wrong."""

    path: Path
    state: dict[str, Any]
    files: dict[str, Any]
    """What the marker says of each file."""
    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Files that `read` has left in memory until they are asked for."""

    def read(self, names: Iterable[str]) -> str:
        """Hold these files, each read once and compared with its digest; why that cannot be done, or ""."""
        for name in names:
            if name not in self.files:
                return f"its marker does not list {name}"
            expected = self.files[name]
            try:
                data = read_whole(self.path / name, expected["bytes"])
                if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                    return f"{name} does not match its digest"
                if name.endswith(TENSORS):
                    self.held[name.removesuffix(TENSORS)] = load(data)
            except (OSError, SafetensorError) as error:
                return f"{name} cannot be read ({error})"
        return ""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of one file, [...] by official name, on the CPU. Raises `RunError` when it cannot be read."""
        if name not in self.held and (problem := self.read([f"{name}{TENSORS}"])):
            raise RunError(f"{self.path}: {problem}")
        return self.held.pop(name)

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


def verify(path: Path) -> str | None:
    """Why this folder is not a complete checkpoint, or None. Reads all of it."""
    try:
        files = marked(path)
    except ValueError as error:
        return str(error)
    return _first_misfit(path, files, digest)


def marked(path: Path) -> dict[str, Any]:
    """{file: {bytes, sha256}} of a folder's marker. Raises ValueError with the reason why there is none."""
    if not os.path.lexists(path / MARKER):
        raise ValueError("it has no marker: the save was interrupted")
    try:
        files = read_object(path / MARKER).get("files")
    except ValueError as error:
        raise ValueError(f"its marker is unreadable ({error})") from None
    if not isinstance(files, dict) or not files:
        raise ValueError("its marker lists no files")
    for name, facts in files.items():
        if "/" in name or not name.isprintable() or name in ("", ".", ".."):
            raise ValueError(f"its marker lists {name[:80]!r}, which is no plain file name")
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise ValueError(f"its marker does not say what {name[:80]} holds")
    return files


def _first_misfit(folder: Path, files: Mapping[str, Any], look: Callable[[Path], dict[str, Any]]) -> str | None:
    """What is wrong with the first file that is not as its marker says, or None."""
    for name, expected in files.items():
        try:
            if any(expected[what] != value for what, value in look(folder / name).items()):
                return f"{name} does not match its digest"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def size(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size}


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


Candidate = tuple[str | None, dict[str, Any], dict[str, Any], list[str]]
NOTHING: Candidate = (None, {}, {}, [])


def newest(root: Path, wanted: Callable[[str], bool] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and why each newer one was refused; the same on all ranks.

    Each rank reads and holds the files that it has `wanted`, and compares their digests on the way; all files must have
    their size, and be wanted by some rank. Without `wanted` the main rank compares all digests, and nothing is held.
    """
    found = _candidates(root, size if wanted else digest) if is_main() else None
    refused: list[str] = []
    while True:
        # ranks that saw a shared folder differently could not go on together
        name, state, files, reasons = from_main(next(found) if found else NOTHING)
        refused += reasons
        if name is None:
            return None, refused
        checkpoint = Checkpoint(root / name, state, files)
        problem = first_said(checkpoint.read(filter(wanted, files))) if wanted else None
        if not problem:
            return checkpoint, refused
        refused.append(f"{name} is not used: {problem}")


def _candidates(root: Path, look: Callable[[Path], dict[str, Any]]) -> Iterator[Candidate]:
    """(name, state, files) of one checkpoint after the other, newest first, and why those before it were refused."""
    refused: list[str] = []
    for path in reversed(positions(root)):
        try:
            files = marked(path)
            sound = {name: facts for name, facts in files.items() if name == STATE}
            if reason := _first_misfit(path, files, look) or _first_misfit(path, sound, digest):
                raise ValueError(reason)
            yield path.name, _state(path), files, refused
            refused = []
        except ValueError as error:
            refused.append(f"{path.name} is not used: {error}")
    yield None, {}, {}, refused


def _state(path: Path) -> dict[str, Any]:
    try:
        return read_object(path / STATE)
    except ValueError as error:
        raise ValueError(f"its {STATE} is unreadable ({error})") from None


def recover(root: Path) -> None:
    """Give a checkpoint its name back that was being replaced by one of the same position when the process died."""
    for old in root.glob(f"{REPLACED}img_*"):
        if not os.path.lexists(final := root / old.name.removeprefix(REPLACED)):
            os.rename(old, final)


# Writing


def begin_folder(tmp: Path) -> None:
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.parent.mkdir(exist_ok=True)  # but not the run folder: one that has vanished is not to begin anew
    tmp.mkdir()
    fault_point("begin")


def commit(tmp: Path, final: Path, files: Mapping[str, Any]) -> None:
    """Write the marker and give the folder its name: from here on it counts."""
    fault_point("before-marker")
    write_json(tmp / MARKER, {"files": files})
    fault_point("after-marker")
    if final.exists():  # it was refused when this run resumed from an older one, or it holds this very position
        old = final.with_name(f"{REPLACED}{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        fault_point("between-renames")
    os.rename(tmp, final)
    sync_folder(final.parent)
    fault_point("after-rename")


def tidy(final: Path, keep: int) -> None:
    """Point the hint at a folder that was just written, and drop the oldest beyond `keep`; 0 does neither."""
    if keep:
        write_bytes(final.parent / "latest", final.name.encode())
        fault_point("after-latest")
    retain(final.parent, keep, final)


def retain(root: Path, keep: int, last: Path | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `keep` (0 keeps all), and leftovers of interrupted saves.

    Later ones than `last` do not count: the run has left them behind, and they may be damaged. A checkpoint that is a
    link belongs to somebody else: it neither counts nor goes, nor does anything behind a root that is one.
    """
    if root.is_symlink():
        return
    sweep(root)
    for leftover in root.glob(f"{UNFINISHED}*"):
        if leftover.is_symlink():
            leftover.unlink()
        shutil.rmtree(leftover, ignore_errors=True)
    everything = [path for path in positions(root) if not path.is_symlink()]
    if last in everything:
        everything = everything[: everything.index(last) + 1]
    complete = [path for path in everything if (path / MARKER).exists()]  # never empty: one has just been written
    for unfinished in [p for p in everything[: everything.index(complete[-1])] if p not in complete]:
        shutil.rmtree(unfinished)  # a deletion that was interrupted
    for old in complete[:-keep] if keep else []:
        fault_point("retention")
        (old / MARKER).unlink()  # from here on it does not count, however far the deletion gets
        fault_point("mid-retention")
        shutil.rmtree(old)
