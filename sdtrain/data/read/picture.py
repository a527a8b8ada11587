"""Pictures for people: read with their depth and transparency, written back the same way.

What is accepted is decided by `sdtrain.data.read.images`; training reads 8-bit RGB from there, this module keeps the 16
bits and the alpha channel that training drops.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdtrain.data.read.budget import LIMITS, PictureLimits
from sdtrain.data.read.images import decode_image, read_file

ROWS = 64  # that are rounded at once: what they take stays in the processor's caches
PNG_LEVEL = 3  # of a photograph a third of the time of the usual 6, for files a tenth larger
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """rgb [H, W, 3] and alpha [H, W] (or None), `bits` a channel of a file, the colour profile.

    Values are float32 in [0, 1]; of a result they may be the whole numbers of its file already.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    bits: int = 8
    icc_profile: bytes | None = None


def read_picture(path: str | Path, limits: PictureLimits = LIMITS) -> Picture:
    """Read a picture, turned upright. Raises ImageRejected with the reason, or OSError."""
    return picture_of(read_file(path, limits), limits)


def picture_of(data: bytes, limits: PictureLimits = LIMITS) -> Picture:
    """The picture in the bytes of a file, turned upright. Raises ImageRejected with the reason."""
    image, notes = decode_image(data, limits)
    if "16-bit" in notes:
        return _sixteen_bits(data, turned="EXIF rotation" in notes)
    opened = Image.open(io.BytesIO(data))
    profile = opened.info.get("icc_profile") if opened.mode in ("RGB", "RGBA") else None
    if "alpha" not in notes:
        return Picture(_unit(np.asarray(image), 8), icc_profile=profile)
    rgba = _unit(np.asarray(ImageOps.exif_transpose(opened).convert("RGBA")), 8)
    return Picture(rgba[..., :3], rgba[..., 3], icc_profile=profile)


def picture_of_values(rgb: np.ndarray) -> Picture:
    """That of 8-bit values [H, W, 3]."""
    return Picture(_unit(rgb, 8))


def values_of(picture: Picture) -> np.ndarray:
    """[H, W, 3], or 4 with alpha: whole numbers up to the largest of the picture's depth."""
    layers = [picture.rgb] if picture.alpha is None else [picture.rgb, picture.alpha[..., None]]
    kind = np.uint16 if picture.bits == 16 else np.uint8
    if len(layers) == 1 and picture.rgb.dtype == kind:
        return picture.rgb
    values = np.empty((*picture.rgb.shape[:2], sum(layer.shape[2] for layer in layers)), kind)
    for first in range(0, len(values), ROWS):
        rows = slice(first, first + ROWS)
        parts = [layer[rows] if layer.dtype == kind else rounded(layer[rows], picture.bits) for layer in layers]
        np.concatenate(parts, axis=2, out=values[rows], casting="unsafe")
    return values


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    return (values.clip(0, 1) * (2**bits - 1)).round()


def _unit(values: np.ndarray, bits: int) -> np.ndarray:
    return values.astype(np.float32) / np.float32(2**bits - 1)


def _sixteen_bits(data: bytes, turned: bool) -> Picture:
    values = _decode_png_16(data) if data.startswith(PNG_SIGNATURE) else np.asarray(Image.open(io.BytesIO(data)))
    values = values[..., None] if values.ndim == 2 else values
    if turned:
        values = _turn(values, Image.open(io.BytesIO(data)).getexif().get(0x0112, 1))
    unit = _unit(values, 16)
    has_alpha = unit.shape[2] in (2, 4)
    colour = unit[..., :-1] if has_alpha else unit
    rgb = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    return Picture(rgb, unit[..., -1] if has_alpha else None, bits=16)


def _decode_png_16(data: bytes) -> np.ndarray:
    # Pillow hands 16-bit colour over as 8-bit
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces that its decoders will move
        from torchvision.io import ImageReadMode, decode_png

        values = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return values.permute(1, 2, 0).numpy()


def _turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF orientation 2..8 undone on [H, W, C]."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def png_of(picture: Picture) -> bytes:
    """A PNG of the picture's depth, with its alpha channel."""
    values = values_of(picture)
    return _encode_png_16(values) if picture.bits == 16 else _encode_png_8(values, picture.icc_profile)


def _encode_png_8(values: np.ndarray, profile: bytes | None) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG", icc_profile=profile, compress_level=PNG_LEVEL)
    return out.getvalue()


def _encode_png_16(values: np.ndarray) -> bytes:
    """A PNG of big-endian 16-bit RGB or RGBA, rows filtered against the row above (Pillow writes no such PNG)."""
    height, width, channels = values.shape
    lines = np.ascontiguousarray(values, ">u2").view(np.uint8).reshape(height, -1)
    above = np.concatenate([np.zeros_like(lines[:1]), lines[:-1]])
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), lines - above], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 16, 6 if channels == 4 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), PNG_LEVEL)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
