"""Where packing takes images from: a folder (also of an LMDB export's .webp files) or a zip archive, in name order."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdtrain.data.read.budget import LIMITS, LIST_BYTES, PictureLimits
from sdtrain.data.read.images import ImageRejected, is_image_name, read_file, refuse_bytes
from sdtrain.errors import DataError
from sdtrain.files import read_within
from sdtrain.terminal import printable


@dataclass(frozen=True)
class SourceFile:
    """One image file: its path inside the source, size in bytes and class (-1 without)."""

    name: str
    size: int
    label: int = -1


def list_source(source: Path) -> list[SourceFile]:
    """All image files of a folder or zip in the order of their names. Raises DataError when there is none."""
    if not source.exists():
        raise DataError(f"{source} does not exist; give a folder of images or a zip archive")
    if source.is_dir():
        files = _folder_files(source)
    elif source.is_file() and zipfile.is_zipfile(source):
        files = _zip_files(source)
    else:
        raise DataError(f"{source} is neither a folder nor a zip archive; unpack it first")
    if not files:
        raise DataError(
            f"{source} holds no image files; looked for png, jpg, webp, bmp, tif, gif and ppm in all sub-folders"
        )
    return sorted(files, key=lambda f: f.name)


def _folder_files(folder: Path) -> list[SourceFile]:
    if (folder / "data.mdb").is_file():
        raise DataError(
            f"{folder} is an LMDB; export it to a folder of .webp files first (lsun's own data.py export does that)"
        )
    paths = (path for path in folder.rglob("*") if is_image_name(path.name) and path.is_file())
    return [SourceFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def _zip_files(path: Path) -> list[SourceFile]:
    with open_zip(path) as archive:
        entries = [entry for entry in archive.infolist() if is_image_name(entry.filename)]
    return [SourceFile(entry.filename, entry.file_size) for entry in entries]


def open_zip(path: Path) -> zipfile.ZipFile:
    """An archive to read. Raises DataError for a damaged one."""
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises many types on hostile bytes; every one means "unusable file"
        raise DataError(
            f"{path} is a damaged zip archive ({printable(str(error))[:200]}); make or fetch it again"
        ) from None


class SourceReader:
    """Reads files of a source by name; each process opens its own."""

    def __init__(self, source: Path, limits: PictureLimits = LIMITS) -> None:
        self._source, self._limits = source, limits
        self._archive = None if source.is_dir() else open_zip(source)

    def read(self, name: str) -> bytes:
        """Raises OSError, or ImageRejected for a damaged or encrypted entry and for more bytes than are allowed."""
        if self._archive is None:
            return read_file(self._source / name, self._limits)
        info = self._archive.getinfo(name)
        refuse_bytes(info.file_size, self._limits)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # those that unfold step by step
            raise ImageRejected(f"damaged zip entry: its compression (kind {info.compress_type}) is not supported")
        try:
            with self._archive.open(info) as entry:
                return entry.read(info.file_size + 1)  # not all of it, which unfolds what the table keeps quiet about
        except OSError:
            raise
        except Exception as error:  # damaged, encrypted, unknown
            raise ImageRejected(f"damaged zip entry: {printable(str(error))[:200]}") from None


def select(files: Sequence[SourceFile], listed: str | None, excluded: str | None) -> list[SourceFile]:
    """Keep the files a list names and drop those another names. Lists hold paths or base names, one a line.

    Raises DataError when a name is not found, or nothing is left.
    """
    chosen = list(files)
    if listed:
        wanted = _names_in(listed)
        chosen = [f for f in files if _named(f, wanted)]
        _all_found(wanted, files, listed)
    if excluded:
        unwanted = _names_in(excluded)
        _all_found(unwanted, files, excluded)
        chosen = [f for f in chosen if not _named(f, unwanted)]
    if not chosen:
        raise DataError(f"the lists leave none of {len(files)} images; check --list and --exclude-list")
    return chosen


def _names_in(path: str) -> set[str]:
    try:
        lines = read_within(path, LIST_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise DataError(f"list {path} cannot be read ({reason}); give a text file with one name a line") from None
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def _named(file: SourceFile, names: set[str]) -> bool:
    return file.name in names or PurePosixPath(file.name).name in names


def _all_found(names: set[str], files: Sequence[SourceFile], path: str) -> None:
    known = {f.name for f in files} | {PurePosixPath(f.name).name for f in files}
    missing = sorted(names - known)
    if missing:
        shown = ", ".join(printable(name[:80]) for name in missing[:3])
        raise DataError(
            f"list {path} names {len(missing)} files that the source lacks ({shown}); names are paths inside it"
        )


def with_folder_labels(files: Sequence[SourceFile]) -> tuple[list[SourceFile], list[str]]:
    """Class = the first folder of the path, numbered in name order. Raises DataError for images outside any folder."""
    tops = [PurePosixPath(f.name).parts for f in files]
    loose = [f.name for f, parts in zip(files, tops, strict=True) if len(parts) < 2]
    if loose:
        raise DataError(
            f"{len(loose)} images lie in no class folder ({loose[0]}); move them, or pack with --labels none"
        )
    names = sorted({parts[0] for parts in tops})
    number = {name: i for i, name in enumerate(names)}
    return [SourceFile(f.name, f.size, number[parts[0]]) for f, parts in zip(files, tops, strict=True)], names
