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
| more than MAX_PIXELS pixels (decompression bomb)  | rejected from the header, before any pixel is decoded          |
| 32-bit integer or floating point                  | rejected: the range of its values is unknown                   |
| truncated, corrupt, not an image                  | rejected                                                       |
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# 67 million pixels are 200 MB of RGB: above any camera of the datasets, far below what hurts a worker.
MAX_PIXELS = 1 << 26
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


class ImageRejected(ValueError):
    """An image file that is not used; the text is the reason."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode a file's bytes to an 8-bit RGB image and the conversions it needed (empty for plain RGB).

    Raises ImageRejected with the reason.
    """
    image = _open(data, max_pixels)
    deep = image.format == "PNG" and len(data) > 24 and data[24] == 16
    _load(image)
    notes: list[str] = []
    if _may_be_turned(image):
        image = _upright(image, notes)
    if image.mode != "RGB" or "transparency" in image.info:
        image = _to_rgb(image, notes)
    if deep and "16-bit" not in notes:
        notes.append("16-bit")
    return image, tuple(notes)


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, tuple[str, ...]]:
    """`decode_image` of a file. Raises ImageRejected, or OSError when the file cannot be read."""
    return decode_image(Path(path).read_bytes(), max_pixels)


def to_chw(image: Image.Image) -> np.ndarray:
    """An RGB image as a new uint8 array [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def hush() -> None:
    """Silence Pillow's warnings about odd files, in a process that exists to decode; the outcome is reported anyway."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageRejected(f"decompression bomb: more than {max_pixels} pixels") from None
    except Exception as error:  # Pillow's plugins raise many types on hostile bytes; every one means "unusable file"
        raise ImageRejected(_why_unreadable(data, error)) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRejected(f"decompression bomb: {width}x{height} is more than {max_pixels} pixels")
    if min(width, height) < MIN_SIDE:
        raise ImageRejected(f"too small: {width}x{height} has a side under {MIN_SIDE} pixels")
    _refuse_several_pages(image)
    return image


def _refuse_several_pages(image: Image.Image) -> None:
    # MPO is a JPEG with a preview attached; its first picture is the photograph.
    try:
        pages = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    except Exception as error:
        raise ImageRejected(f"corrupt: {_brief(error)}") from None
    if pages > 1:
        raise ImageRejected(f"animated: {pages} frames or pages")


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:
        kind = "truncated" if any(word in str(error).lower() for word in TRUNCATED_WORDS) else "corrupt"
        raise ImageRejected(f"{kind}: {_brief(error)}") from None


def _may_be_turned(image: Image.Image) -> bool:
    return "exif" in image.info or "xmp" in image.info or image.format in ("TIFF", "MPO")


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        turned = image.getexif().get(0x0112, 1) not in (0, 1)
        if not turned:
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
        high_byte = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        notes.append("alpha")
        return _over_white(image)
    notes.append(NAMES_OF_MODES.get(mode, mode))
    return image.convert("RGB")


def _fits_16_bits(image: Image.Image) -> bool:
    values = np.asarray(image)
    return bool(values.min() >= 0 and values.max() < 1 << 16)


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
