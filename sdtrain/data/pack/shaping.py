"""What packing does to one decoded image: crop, resize, tile, encode. The filter is named because FID depends on it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image

from sdtrain.data.read.budget import LIMITS, PictureLimits
from sdtrain.data.read.images import ImageRejected, decode_image

# All of Pillow's filters widen with the reduction (they antialias); "nearest" does not.
FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The choices of one packing, recorded in the manifest. `resolution` 0 keeps sizes; `tile` 0 does not cut."""

    resolution: int = 0
    crop: str = "none"
    resize: str = "lanczos"
    enlarge: bool = False
    tile: int = 0
    stride: int = 0
    format: str = "png"
    quality: int = 95
    max_pixels: int = LIMITS.pixels
    max_image_mb: int = LIMITS.megabytes

    @property
    def limits(self) -> PictureLimits:
        return PictureLimits(self.max_pixels, self.max_image_mb)


def pieces(data: bytes, shape: Shape) -> tuple[list[tuple[str, bytes]], tuple[str, ...]]:
    """What one file becomes: ([(extension, encoded bytes)], conversions). Raises ImageRejected with the reason."""
    image, notes = decode_image(data, shape.limits)
    kept = KEPT_FORMATS.get(_format_of(data), "") if shape.format == "keep" and not notes else ""
    if shape.tile:
        return [encode(tile, shape) for tile in tiles(image, shape.tile, shape.stride)], notes
    shaped = to_resolution(image, shape) if shape.resolution else image
    if kept and shaped is image:
        return [(kept, data)], notes
    return [encode(shaped, shape)], notes


def to_resolution(image: Image.Image, shape: Shape) -> Image.Image:
    """A square of `shape.resolution`; the same object when nothing had to be done. Raises ImageRejected."""
    side, target = min(image.size), shape.resolution
    if image.width != image.height:
        if shape.crop == "none":
            raise ImageRejected(f"not square: {image.width}x{image.height}")
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side < target and not shape.enlarge:
        raise ImageRejected(f"too small: {side} px for --resolution {target}")
    return image if side == target else image.resize((target, target), FILTERS[shape.resize])


def tiles(image: Image.Image, size: int, stride: int) -> Iterator[Image.Image]:
    """Squares in rows; the last of a row or column is moved inwards so that every pixel is covered.

    Raises ImageRejected for an image smaller than one.
    """
    if min(image.size) < size:
        raise ImageRejected(f"too small: {image.width}x{image.height} for --tile {size}")
    for top in _starts(image.height, size, stride):
        for left in _starts(image.width, size, stride):
            yield image.crop((left, top, left + size, top + size))


def _starts(length: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, length - size + 1, stride))
    return starts if starts[-1] == length - size else [*starts, length - size]


def encode(image: Image.Image, shape: Shape) -> tuple[str, bytes]:
    """(extension, file bytes); PNG unless JPEG was asked for. JPEG keeps full colour resolution (4:4:4)."""
    buffer = io.BytesIO()
    clean = Image.frombytes("RGB", image.size, image.tobytes())  # without EXIF, profiles and text of the source
    if shape.format == "jpeg":
        clean.save(buffer, "JPEG", quality=shape.quality, subsampling=0)
        return "jpg", buffer.getvalue()
    clean.save(buffer, "PNG", compress_level=6)
    return "png", buffer.getvalue()


def key_of(number: int, name: str) -> str:
    """Sorts like the source and still tells the file: running number and the cleaned base name."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(name).stem)[:48].strip("-")
    return f"{number:08d}-{stem}" if stem else f"{number:08d}"


def _format_of(data: bytes) -> str:
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""
