"""Without these, one odd file in a million ends a run, fills the memory, or trains the network on wrong colours."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.pack.shaping import Shape, pieces
from sdtrain.data.read.images import MAX_PIXELS, ImageRejected, decode_image, load_image, to_chw
from sdtrain.data.read.pool import requests_of


def photo(width: int = 16, height: int = 16) -> Image.Image:
    ramp = np.arange(width * height * 3, dtype=np.int64).reshape(height, width, 3)
    return Image.fromarray((ramp * 7 % 256).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header says any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def rejection(data: bytes) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode_image(data)
    return str(caught.value)


def test_plain_rgb_is_untouched_and_needs_no_conversion() -> None:
    image, notes = decode_image(encoded(photo()))
    assert notes == () and np.array_equal(np.asarray(image), np.asarray(photo()))


def test_planes_are_those_of_the_image_also_when_it_is_not_square() -> None:
    image = photo(20, 12)
    assert np.array_equal(to_chw(image), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "kind", "note"),
    [
        ("L", "PNG", "grey"),
        ("1", "PNG", "bilevel"),
        ("P", "PNG", "palette"),
        ("CMYK", "JPEG", "CMYK"),
        ("LA", "PNG", "alpha"),
        ("RGBA", "PNG", "alpha"),
        ("YCbCr", "TIFF", "YCbCr"),
    ],
)
def test_other_modes_become_rgb_with_the_reason_recorded(mode: str, kind: str, note: str) -> None:
    image, notes = decode_image(encoded(photo().convert(mode), kind))
    assert image.mode == "RGB" and image.size == (16, 16) and notes == (note,)


def test_grey_keeps_its_values_in_all_three_channels() -> None:
    grey = photo().convert("L")
    planes = to_chw(decode_image(encoded(grey))[0])
    assert all(np.array_equal(plane, np.asarray(grey)) for plane in planes)


def test_cmyk_jpeg_shows_the_colour_it_was_made_of() -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    pixel = decode_image(encoded(red, "JPEG", quality=95))[0].getpixel((8, 8))
    assert pixel[0] > 240 and max(pixel[1:]) < 15


def test_sixteen_bit_grey_is_reduced_to_its_high_byte() -> None:
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image, notes = decode_image(encoded(Image.fromarray(deep)))
    assert notes == ("16-bit",) and np.array_equal(np.asarray(image)[..., 0].reshape(-1), np.arange(256))


def test_sixteen_bit_colour_is_recorded_as_converted() -> None:
    raw = b"".join(b"\0" + b"\x80\x01" * 3 * 16 for _ in range(16))
    data = png_claiming(16, 16)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    image, notes = decode_image(data[:8] + b"".join(chunks))
    assert notes == ("16-bit",) and image.getpixel((0, 0)) == (128, 128, 128)


def test_transparent_pixels_are_laid_over_white() -> None:
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (8, 0, 16, 16))
    image, _ = decode_image(encoded(half))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((15, 0)) == (0, 0, 255)


def test_a_transparent_colour_of_an_rgb_png_is_laid_over_white() -> None:
    image, notes = decode_image(encoded(Image.new("RGB", (16, 16), (1, 2, 3)), transparency=(1, 2, 3)))
    assert notes == ("alpha",) and image.getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied_once_and_recorded() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image, notes = decode_image(encoded(photo(16, 8), "JPEG", exif=exif, quality=100))
    assert image.size == (8, 16) and notes == ("EXIF rotation",)
    upright, notes = decode_image(encoded(photo(16, 8), "JPEG", exif=Image.Exif(), quality=100))
    assert upright.size == (16, 8) and notes == ()


def test_animated_images_are_rejected() -> None:
    frames = [photo().convert("P"), photo().rotate(90).convert("P"), photo().rotate(180).convert("P")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rejection(data) == "animated: 3 frames or pages"


def test_one_by_one_images_are_rejected() -> None:
    assert rejection(encoded(photo(1, 1))) == "too small: 1x1 has a side under 4 pixels"


def test_bombs_are_rejected_from_the_header_without_a_spike_of_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert rejection(png_claiming(9000, 9000)) == f"decompression bomb: 9000x9000 is more than {MAX_PIXELS} pixels"
    assert rejection(png_claiming(30000, 30000)) == f"decompression bomb: more than {MAX_PIXELS} pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_truncated_files_are_rejected_as_truncated() -> None:
    for data in (encoded(photo(64, 64), "JPEG"), encoded(photo(64, 64))):
        assert rejection(data[: len(data) * 2 // 3]).startswith("truncated: ")


def test_garbage_html_and_empty_files_are_rejected_by_name() -> None:
    assert rejection(b"<html><body>404 Not Found</body></html>") == "not an image: it looks like HTML or XML"
    assert rejection(b"") == "empty file"
    assert rejection(b"hello world" * 10) == "not an image in a known format"


def test_a_damaged_png_body_is_rejected_as_corrupt() -> None:
    data = bytearray(encoded(photo(64, 64)))
    data[60:90] = bytes(30)
    assert rejection(bytes(data)).startswith("corrupt: ")


def test_float_images_are_rejected_because_their_range_is_unknown() -> None:
    assert rejection(encoded(photo().convert("F"), "TIFF")) == "values of mode F have no known range"


def test_postscript_is_never_handed_to_a_program() -> None:
    assert rejection(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image in a known format"


@pytest.mark.filterwarnings("ignore")
def test_random_bytes_after_a_real_header_never_raise_anything_else() -> None:
    noise = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        data = encoded(photo(32, 32), kind)
        for _ in range(40):
            broken = bytearray(data)
            for at in noise.integers(0, len(broken), 8):
                broken[at] = noise.integers(0, 256)
            try:
                decode_image(bytes(broken[: noise.integers(1, len(broken) + 1)]))
            except ImageRejected as reason:
                assert str(reason)


def test_files_are_read_by_the_same_rules(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(photo().convert("L")))
    assert load_image(tmp_path / "a.png")[1] == ("grey",)


def test_keep_copies_the_bytes_only_where_nothing_is_converted() -> None:
    plain, grey = encoded(photo(), "JPEG"), encoded(photo().convert("L"), "JPEG")
    shape = Shape(format="keep")
    assert pieces(plain, shape)[0] == [("jpg", plain)]
    (ext, data), notes = pieces(grey, shape)[0][0], pieces(grey, shape)[1]
    assert ext == "png" and data != grey and notes == ("grey",)


def test_the_resize_filter_decides_the_pixels() -> None:
    data = encoded(photo(64, 64))
    results = {f: pieces(data, Shape(resolution=16, resize=f))[0][0][1] for f in ("box", "lanczos", "bicubic")}
    box = np.asarray(decode_image(results["box"])[0]).astype(int)
    mean = np.asarray(photo(64, 64)).astype(float).reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(box - mean).max() <= 0.51 and len(set(results.values())) == 3


def test_tiles_cover_every_pixel_of_an_uneven_image() -> None:
    made, _ = pieces(encoded(photo(40, 20)), Shape(tile=16, stride=16))
    assert len(made) == 3 * 2
    last = decode_image(made[-1][1])[0]
    assert np.array_equal(np.asarray(last), np.asarray(photo(40, 20))[4:20, 24:40])


def test_request_rows_lie_behind_one_another() -> None:
    class Index:
        shard = offset = size = np.arange(4)

    class FakeDataset:
        index = Index()

    rows = requests_of(FakeDataset(), np.array([2, 3]), 8)  # type: ignore[arg-type]
    assert rows[:, 0].tolist() == [0, 192] and rows[:, 1].tolist() == [2, 3]
