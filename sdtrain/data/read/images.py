"""What happens to every kind of image file, in one place, so that packing, streaming, verifying and upscaling agree.

| found                                             | outcome                                                        |
|---------------------------------------------------|----------------------------------------------------------------|
| RGB, 8 bits a channel                             | as it is                                                       |
| grey, bilevel                                     | converted: the value three times                               |
| palette, CMYK, YCbCr, Lab, HSV                    | converted by Pillow; colour profiles are not applied           |
| alpha (RGBA, LA, transparent palette)             | converted: laid over white                                     |
| 16 bits a channel                                 | converted: the high byte                                       |
| EXIF or TIFF orientation                          | converted: turned upright                                      |
| animated, several pages                           | rejected                                                       |
| a side under MIN_SIDE pixels                      | rejected                                                       |
| too many pixels, scans or MB (decompression bomb) | rejected from the header, before any pixel is decoded          |
| too slow to decode                                | rejected when its time is up (the limits: budget.py)           |
| 32-bit integer or floating point                  | rejected: the range of its values is unknown                   |
| truncated, corrupt, not an image                  | rejected                                                       |
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdtrain.data.read.budget import LIMITS, PAGES, SCANS, PictureLimits, TooSlow, within
from sdtrain.files import read_within

MAX_PIXELS = LIMITS.pixels
MIN_SIDE = 4
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
# Only raster formats that Pillow decodes by itself; EPS, for one, would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "MPO")
NAMES_OF_MODES = {
    "1": "bilevel",
    "L": "grey",
    "P": "palette",
    "LA": "alpha",
    "La": "alpha",
    "RGBA": "alpha",
    "PA": "alpha",
}
TRUNCATED_WORDS = ("truncated", "premature", "unexpected end", "not enough image data")
# Bytes a pixel as Pillow holds it; all other modes take 4.
HELD = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
SCAN_HEADER = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e]")
PROGRESSIVE_HEADER = re.compile(rb"\xff\xc2\x00.\x08", re.DOTALL)
STRIP_PIXELS = 1 << 20


class ImageRejected(ValueError):
    """An image file that is not used; the text is the reason."""


def decode_image(data: bytes, limits: PictureLimits = LIMITS) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode a file's bytes to an 8-bit RGB image and the conversions it needed (empty for plain RGB).

    Raises ImageRejected with the reason.
    """
    try:
        with within(limits.seconds):
            return _decode(data, limits)
    except TooSlow:
        raise ImageRejected(f"too slow: more than {limits.seconds:g} s of processor time") from None
    except MemoryError:
        raise ImageRejected("too large: there is not enough memory to decode it") from None


def load_image(path: str | Path, limits: PictureLimits = LIMITS) -> tuple[Image.Image, tuple[str, ...]]:
    """`decode_image` of a file. Raises ImageRejected, or OSError when the file cannot be read."""
    return decode_image(read_file(path, limits), limits)


def refuse_bytes(num_bytes: int, limits: PictureLimits = LIMITS) -> None:
    """Raise ImageRejected for a file of so many bytes, before they are read."""
    if num_bytes > limits.num_bytes:
        raise ImageRejected(_too_large(f"its file has {num_bytes / (1 << 20):.0f} MB", limits))


def read_file(path: str | Path, limits: PictureLimits = LIMITS) -> bytes:
    """The bytes of a picture's file. Raises OSError, or ImageRejected when they alone are too many."""
    try:
        return read_within(path, limits.num_bytes)
    except ValueError:
        raise ImageRejected(_too_large("its file has more", limits)) from None


def size_of_image(path: str | Path) -> tuple[int, int]:
    """Width and height from the header of a picture. Raises ImageRejected or OSError."""
    data = read_file(path)
    try:
        with within(LIMITS.seconds):
            return _open(data, LIMITS).size
    except TooSlow:
        raise ImageRejected(f"too slow: more than {LIMITS.seconds:g} s of processor time") from None


def to_chw(image: Image.Image) -> np.ndarray:
    """An RGB image as a new uint8 array [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def hush() -> None:
    """Silence Pillow's warnings about odd files, in a process that exists to decode; the outcome is reported anyway."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _decode(data: bytes, limits: PictureLimits) -> tuple[Image.Image, tuple[str, ...]]:
    image = _open(data, limits)
    deep = image.format == "PNG" and len(data) > 24 and data[24] == 16
    _refuse_large(image, len(data), _codec_bytes(image, data), limits)
    _load(image)
    notes: list[str] = []
    try:
        if _may_be_turned(image):
            _refuse_large(image, len(data), 4 if _is_turned(image) else 0, limits)
            image = _upright(image, notes)
        if image.mode != "RGB" or "transparency" in image.info:
            image = _to_rgb(image, notes)
    except (ImageRejected, MemoryError):
        raise
    except Exception as error:
        raise ImageRejected(f"corrupt: {_brief(error)}") from None
    if deep and "16-bit" not in notes:
        notes.append("16-bit")
    return image, tuple(notes)


def _open(data: bytes, limits: PictureLimits) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageRejected(f"decompression bomb: more than {limits.pixels} pixels") from None
    except Exception as error:  # Pillow's plugins raise many types on hostile bytes; every one means "unusable file"
        raise ImageRejected(_why_unreadable(data, error)) from None
    width, height = image.size
    if width * height > limits.pixels:
        raise ImageRejected(f"decompression bomb: {width}x{height} is more than {limits.pixels} pixels")
    if min(width, height) < MIN_SIDE:
        raise ImageRejected(f"too small: {width}x{height} has a side under {MIN_SIDE} pixels")
    _refuse_several_pages(image)
    _refuse_scans(image, data)
    return image


def _refuse_several_pages(image: Image.Image) -> None:
    try:
        pages = _num_pages(image)
    except Exception as error:
        raise ImageRejected(f"corrupt: {_brief(error)}") from None
    if pages > 1:
        raise ImageRejected(f"animated: {pages}{'+' * (pages == PAGES)} frames or pages")


def _num_pages(image: Image.Image) -> int:
    # MPO is a JPEG with a preview attached; its first picture is the photograph.
    if image.format in ("JPEG", "MPO"):
        return 1
    if image.format != "TIFF":
        return int(getattr(image, "n_frames", 1))
    pages = 1
    try:  # each step looks through all directories before it
        while pages < PAGES:
            image.seek(pages)
            pages += 1
    except EOFError:
        image.seek(0)
    return pages


def _refuse_scans(image: Image.Image, data: bytes) -> None:
    """Each scan goes over the whole picture, and can have a few bytes."""
    if image.format == "TIFF" and image.info.get("compression") == "jpeg" and PROGRESSIVE_HEADER.search(data):
        raise ImageRejected("decompression bomb: progressive JPEG inside a TIFF")
    scans = _num_scans(data) if image.format in ("JPEG", "MPO") else 0
    if scans > SCANS:
        raise ImageRejected(f"decompression bomb: {scans} scans, no camera makes more than {SCANS}")


def _num_scans(data: bytes) -> int:
    scans = data.count(b"\xff\xda")
    return scans if scans <= SCANS else len(SCAN_HEADER.findall(data))


def _codec_bytes(image: Image.Image, data: bytes) -> float:
    """What is held for a pixel beside the picture: by the decoder, or afterwards by the conversion."""
    converted = 0 if image.mode == "RGB" and "transparency" not in image.info else 4
    if image.format in ("JPEG", "MPO"):
        return max(converted, _coefficient_bytes(getattr(image, "layer", ())) if _num_scans(data) > 1 else 0)
    if image.format == "TIFF":
        return max(converted, _chunk_bytes(image))
    return 8 if image.format == "WEBP" else converted


def _coefficient_bytes(layers: tuple[tuple[int, int, int, int], ...]) -> float:
    """A JPEG in several scans keeps 2 bytes for every value of every channel until the last has been read."""
    areas = [wide * high for _, wide, high, _ in layers]
    return 2 * sum(areas) / max([*areas, 1])


def _chunk_bytes(image: Image.Image) -> float:
    """A TIFF is unpacked in strips or tiles, which can be as large as they like."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    depth = sum(tags.get(258, (8,))) / 8 if isinstance(tags.get(258, (8,)), tuple) else 8
    width, height = image.size
    tile = tags.get(322, width), tags.get(323, min(tags.get(278, height), height))
    if not all(isinstance(side, int) and side > 0 for side in tile):
        return depth
    return depth * tile[0] * tile[1] / (width * height)


def _refuse_large(image: Image.Image, num_bytes: int, beside: float, limits: PictureLimits) -> None:
    width, height = image.size
    need = num_bytes + width * height * (HELD.get(image.mode, 4) + beside)
    if need > limits.num_bytes:
        what = f"{width}x{height} in mode {image.mode} needs {math.ceil(need / (1 << 20))} MB"
        raise ImageRejected(_too_large(what, limits))


def _too_large(what: str, limits: PictureLimits) -> str:
    return f"too large: {what}, a picture may take {limits.megabytes} MB of memory"


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        kind = "truncated" if any(word in str(error).lower() for word in TRUNCATED_WORDS) else "corrupt"
        raise ImageRejected(f"{kind}: {_brief(error)}") from None


def _may_be_turned(image: Image.Image) -> bool:
    return "exif" in image.info or "xmp" in image.info or image.format in ("TIFF", "MPO")


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(0x0112, 1) not in (0, 1)


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        if not _is_turned(image):
            return image
        upright = ImageOps.exif_transpose(image)
    except Exception as error:
        raise ImageRejected(f"corrupt: orientation unreadable, {_brief(error)}") from None
    notes.append("EXIF rotation")
    return upright


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    mode = image.mode
    if mode == "F" or (mode == "I" and not _fits_16_bits(image)):
        raise ImageRejected(f"values of mode {mode} have no known range")
    if mode.startswith("I"):
        notes.append("16-bit")
        return _in_strips(image, _high_byte)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        notes.append("alpha")
        return _in_strips(image, _over_white)
    notes.append(NAMES_OF_MODES.get(mode, mode))
    return image.convert("RGB")


def _fits_16_bits(image: Image.Image) -> bool:
    low, high = image.getextrema()
    return bool(low >= 0 and high < 1 << 16)  # type: ignore[operator]


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A conversion a few rows at a time, so that what it needs on its way stays small."""
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return convert(image)
    out = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        out.paste(convert(image.crop((0, top, image.width, min(top + rows, image.height)))), (0, top))
    return out


def _high_byte(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _why_unreadable(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if data[:512].lstrip()[:1] == b"<":
        return "not an image: it looks like HTML or XML"
    known = data[:8] == b"\x89PNG\r\n\x1a\n" or data[:3] == b"\xff\xd8\xff"
    return f"corrupt: {_brief(error)}" if known else "not an image in a known format"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:120]
