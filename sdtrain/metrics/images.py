"""Where an evaluation reads images from: shards (`sdtrain.data`) or a plain folder of files, addressed by number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.errors import DataError


@dataclass(frozen=True)
class ImageFolder:
    """All images below a folder, in the order of their relative names. Free of torch until a batch is read."""

    source: str
    files: tuple[Path, ...]
    hash: str
    resolution: int | None

    @property
    def num_samples(self) -> int:
        return len(self.files)

    def describe(self) -> str:
        return f"{self.source}: {self.num_samples} images, {self.resolution or 'mixed'} px, {self.hash[:12]}"


def open_images(source: str | Path | list[str], allow_pipe: bool = False, keep_index: bool = True) -> Any:
    """A packed data set, a pattern of shards or a list of those, or a folder of images.

    `keep_index=False` writes nothing beside the shards. Raises DataError when there is nothing to read.
    """
    from sdtrain.data.read.dataset import open_dataset
    from sdtrain.data.read.images import is_image_name

    how: dict[str, Any] = {"allow_pipe": allow_pipe, "keep_index": keep_index}
    if isinstance(source, list):
        return open_dataset(source, **how)
    folder = Path(source)
    if not folder.is_dir() or (folder / "manifest.json").is_file() or any(folder.glob("*.tar")):
        return open_dataset(str(source), **how)
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file() and is_image_name(path.name)))
    if not files:
        raise DataError(
            f"{folder} holds neither shards nor images; give a packed data set or a folder of PNG or JPEG files."
        )
    return ImageFolder(str(source), files, _hash(folder, files), _resolution(files))


def batches(images: Any, indices: Sequence[int], batch_size: int, workers: int = 2) -> Iterator[Tensor]:
    """The asked images in order, uint8 [n, 3, R, R], n = batch_size but for the last. Unreadable ones: DataError."""
    if isinstance(images, ImageFolder):
        for at in range(0, len(indices), batch_size):
            yield torch.stack([_read(images, i) for i in indices[at : at + batch_size]])
    else:
        from sdtrain.data.read.reader import iterate

        for block, _ in iterate(images, indices, batch_size, workers):
            yield block


def _read(images: ImageFolder, i: int) -> Tensor:
    from sdtrain.data.read.images import ImageRejected, load_image, to_chw

    path = images.files[i]
    try:
        picture = load_image(path)[0]
    except (OSError, ImageRejected) as error:
        raise DataError(f"{path} cannot be read ({error}); delete or replace it.") from None
    if picture.size != (images.resolution, images.resolution):
        raise DataError(
            f"{path} has {picture.width} x {picture.height} pixels, but images to evaluate must be square and of one "
            f"size ({images.resolution or 'the first is not square'}); pack them with a resolution first."
        )
    return torch.from_numpy(to_chw(picture))


def _hash(folder: Path, files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _resolution(files: tuple[Path, ...]) -> int | None:
    """The side of the first image; the others are checked when they are read."""
    from PIL import Image

    try:
        with Image.open(files[0]) as picture:
            return picture.width if picture.width == picture.height else None
    except OSError as error:
        raise DataError(f"{files[0]} cannot be read ({error}); delete or replace it.") from None
