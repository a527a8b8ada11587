"""Inputs that would cost more than they are worth. Without these a picture, an index, an archive or a server could take
all memory or time of the machine, and `sdtrain verify` could call clean what a run stumbles over.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from PIL import Image
from test_pack import loose_tar, packed, parsed, photo, photos, png, refusal, verified
from test_verify import edit, edit_index, refused, shards

from sdtrain.commands import upscaler
from sdtrain.data.pack import pack
from sdtrain.data.read import download
from sdtrain.data.read.budget import PictureLimits, TooSlow, within
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.images import ImageRejected, decode_image
from sdtrain.data.read.patterns import expand
from sdtrain.data.read.reader import iterate
from sdtrain.data.read.remote import fetch
from sdtrain.errors import DataError

__all__ = ["photos", "shards"]


def rejection(data: bytes, **limits: float) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode_image(data, PictureLimits(**limits))  # type: ignore[arg-type]
    return str(caught.value)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def slow_picture(side: int = 1500) -> bytes:
    """Numbers as text, which are read one by one: a second or more."""
    return b"P3 %d %d 255\n" % (side, side) + b"7 " * (3 * side * side)


def directories(count: int) -> bytes:
    """A TIFF of so many pages of 16 x 16 pixels."""
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    size, first = 2 + len(rows) + 4, 24
    nexts = [first + size * (page + 1) for page in range(count - 1)] + [0]
    pages = b"".join(struct.pack("<H", len(tags)) + rows + struct.pack("<I", after) for after in nexts)
    return b"II*\0" + struct.pack("<I", first) + bytes(16) + pages


# --- one picture


def test_a_picture_is_refused_by_the_memory_it_needs_before_it_is_decoded() -> None:
    data = encoded(Image.new("RGBA", (1024, 1024)), "PNG")
    assert rejection(data, megabytes=8) == (
        "too large: 1024x1024 in mode RGBA needs 9 MB, a picture may take 8 MB of memory"
    )
    assert decode_image(data, PictureLimits(megabytes=9))[1] == ("alpha",)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    assert "needs 9 MB" in rejection(encoded(Image.new("RGB", (1024, 1024)), "JPEG", exif=rotated), megabytes=8)
    assert "needs 11 MB" in rejection(
        encoded(Image.new("RGB", (1024, 1024)), "JPEG", progressive=True, subsampling=0), megabytes=8
    )


def test_what_is_said_to_be_needed_is_what_is_needed(tmp_path: Path) -> None:
    """Peak memory of decoding 16 megapixels in each mode, in a process of its own, against the budget."""
    code = (
        "import io, resource, sys; from PIL import Image\n"
        "from sdtrain.data.read.budget import PictureLimits; from sdtrain.data.read.images import decode_image\n"
        "mode, kind, most = sys.argv[1], sys.argv[2], int(sys.argv[3]); buffer = io.BytesIO(sys.stdin.buffer.read())\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "decode_image(open(sys.argv[4], 'rb').read()); before = peak()\n"
        "decode_image(buffer.getvalue(), PictureLimits(megabytes=most)); print(peak() - before)"
    )
    for mode, kind, most in (("RGBA", "PNG", 130), ("I;16", "PNG", 98), ("RGB", "WEBP", 194), ("P", "GIF", 82)):
        data = encoded(Image.new(mode, (4096, 4096)), kind)
        small = tmp_path / "small"
        small.write_bytes(encoded(Image.new(mode, (8, 8)), kind))
        words = [sys.executable, "-c", code, mode, kind, str(most), str(small)]
        done = subprocess.run(words, input=data, cwd=REPO, capture_output=True, check=True)
        assert int(done.stdout) <= most + 8, (mode, kind)


def test_a_large_picture_with_transparency_has_the_same_pixels_as_a_small_one() -> None:
    values = np.random.default_rng(0).integers(0, 256, (1500, 1501, 4), dtype=np.uint8)
    whole = np.asarray(decode_image(encoded(Image.fromarray(values), "PNG"))[0])
    part = np.asarray(decode_image(encoded(Image.fromarray(values[690:710]), "PNG"))[0])
    assert np.array_equal(whole[690:710], part)


def test_thousands_of_scans_or_pages_are_refused_at_once() -> None:
    data = encoded(photo(0, 64), "JPEG", progressive=True)
    many = data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 3000 + b"\xff\xd9"
    assert rejection(many, seconds=1).startswith("decompression bomb: 30")
    assert decode_image(data)[0].size == (64, 64)
    assert rejection(directories(20_000), seconds=1) == "animated: 100+ frames or pages"
    assert rejection(directories(3)) == "animated: 3 frames or pages"


def test_a_picture_that_takes_too_long_is_stopped() -> None:
    begun = time.process_time()
    assert rejection(slow_picture(), seconds=0.05) == "too slow: more than 0.05 s of processor time"
    assert time.process_time() - begun < 5
    with within(60):  # and the clock is off again
        decode_image(png())


def test_the_clock_counts_work_and_not_waiting() -> None:
    with within(0.05):
        time.sleep(0.3)
    with pytest.raises(TooSlow), within(0.05):
        while True:
            pass


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_picture_counts_as_bad_also_in_the_decoding_processes(workers: int, tmp_path: Path) -> None:
    path = loose_tar(tmp_path / "x.tar", [(f"{n}.png", png(n, 16)) for n in range(8)] + [("slow.ppm", slow_picture())])
    # half a second: the first picture of a new process pays for what it imports
    dataset = replace(open_dataset(str(path), keep_index=False), limits=PictureLimits(seconds=0.5))
    bad: list[tuple[str, str, str]] = []
    got = sum(len(images) for images, _ in iterate(dataset, range(9), 4, workers=workers, bad=bad))
    assert got == 8 and bad == [("x.tar", "slow", "too slow: more than 0.5 s of processor time")]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_memory_of_a_picture_is_limited_in_a_run_as_in_verify(workers: int, tmp_path: Path) -> None:
    large = encoded(Image.new("L", (2048, 2048)), "PNG")
    path = loose_tar(tmp_path / "x.tar", [("a.png", png(0)), ("b.png", large)])
    dataset = open_dataset(str(path), keep_index=False, limits=PictureLimits(megabytes=16))
    bad: list[tuple[str, str, str]] = []
    list(iterate(replace(dataset, resolution=16), range(2), 2, workers=workers, bad=bad))
    reason = "too large: 2048x2048 in mode L needs 21 MB, a picture may take 16 MB of memory"
    assert bad == [("x.tar", "b", reason)]
    assert verified(str(path), tmp_path, "--max-image-mb", "16") == (2, [("x.tar", "b.png", reason)])
    assert "needs 21 MB" in refusal(
        str(_folder(tmp_path, large)), str(tmp_path / "o"), "--keep", "--max-image-mb", "16"
    )


def _folder(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(data)
    return tmp_path / "folder"


def test_the_plan_of_a_packing_is_the_same_as_before_there_was_a_limit_of_memory(photos: Path, tmp_path: Path) -> None:
    plain = packed(photos, tmp_path / "a", "--keep")["pack"]["plan"]
    assert packed(photos, tmp_path / "b", "--keep", "--max-image-mb", "512")["pack"]["plan"] == plain
    assert packed(photos, tmp_path / "c", "--keep", "--max-image-mb", "511")["pack"]["plan"] != plain


def test_an_enlargement_beyond_the_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upscaler, "available_bytes", lambda: 1 << 30)
    with pytest.raises(DataError, match=r"^its result of 8000x8000 pixels needs 1464 MB of memory, 1024 MB are free"):
        upscaler.refuse_result(2000, 2000, 4, upscaler.RESULT_BYTES)
    upscaler.refuse_result(1000, 1000, 4, upscaler.DEEP_BYTES)


# --- what lists the pictures


def test_an_index_that_claims_what_it_does_not_hold_is_refused_without_the_memory(shards: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 27,)})
    with np.load(shards / "index.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    with zipfile.ZipFile(shards / "index.npz", "w") as archive:
        for name, values in found.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, values)
            archive.writestr(f"{name}.npy", header.getvalue() if name == "offset" else buffer.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "is not a usable index" in refused(shards)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_manifest_has_so_many_bytes_and_items_and_no_more(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtrain.files.MAX_ITEMS", 10)
    assert "more than 10 items" in refused(shards)
    (shards / "manifest.json").write_bytes(b" " * (1 << 26) + b"{}")
    assert f"is damaged (ValueError('it is longer than {1 << 26} bytes'))" in refused(shards)


@pytest.mark.parametrize("change", [{"pack": [1]}, {"converted": 3}, {"rejected": [1]}, {"rejected": None}])
def test_a_history_of_another_form_stops_nothing(change: dict, shards: Path, photos: Path) -> None:
    edit(shards, lambda manifest: manifest.update(change))
    assert open_dataset(shards).num_samples == 12
    assert "choose another folder" in refusal(str(photos), str(shards), "--keep")
    assert pack.run(parsed(pack, str(shards), "--reindex")) == 0


def test_a_pattern_stands_for_a_million_shards_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtrain.data.read.patterns.SHARDS", 1000)
    for pattern in ("x-{0..99999999999}.tar", "{0..99}{0..99}", "{a,b}" * 60):
        with pytest.raises(DataError, match="stands for more than 1000 names"):
            expand(f"{tmp_path}/{pattern}")
    for pattern in ("{" * 5000, "a\0b"):
        with pytest.raises(DataError, match="is no pattern of shards"):
            expand(pattern)


# --- archives


def test_an_entry_that_unfolds_to_more_than_it_says_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png())
        archive.writestr("b.png", bytes(200 << 20))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 1000)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = packed(path, tmp_path / "out", "--keep", "--max-rejected", "50%")
    assert made["rejected"] == [["b.png", "damaged zip entry: Bad CRC-32 for file 'b.png'"]]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_an_entry_beyond_a_picture_or_of_another_compression_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png())
        archive.writestr("b.png", bytes(2 << 20))
        archive.writestr("c.png", bytes(1000), zipfile.ZIP_BZIP2)
    made = packed(path, tmp_path / "out", "--keep", "--max-rejected", "90%", "--max-image-mb", "1")
    assert made["rejected"] == [
        ["b.png", "too large: its file has 2 MB, a picture may take 1 MB of memory"],
        ["c.png", "damaged zip entry: its compression (kind 12) is not supported"],
    ]


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2")] ^= 0xFF  # the table's first entry
    path.write_bytes(data)
    assert "is a damaged zip archive (" in refusal(str(path), str(tmp_path / "out"), "--keep")


# --- servers


@contextlib.contextmanager
def server(send: Callable[[socket.socket], None]) -> Iterator[str]:
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listening.accept()[0]
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    send(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/x.tar"
        listening.shutdown(socket.SHUT_RDWR)


def says(*parts: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: [connection.sendall(part) for part in parts] and None


def drips(*parts: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        connection.sendall(parts[0])
        while True:
            connection.sendall(parts[1])
            time.sleep(0.02)

    return send


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("send", "why"),
    [
        (drips(b"", b"H"), "too slow: 0 bytes in "),
        (drips(OK, b"X"), "too slow: 0 bytes in "),
        (drips(OK + b"Content-Length: 99999\r\n\r\n", b"x"), "too slow: "),
        (drips(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"), "too slow: 0 bytes in "),
        (
            says(OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"fff\r\n" + bytes(4095) + b"\r\n"] * 30),
            "more bytes than",
        ),
        (says(OK + b"Content-Length: 200000\r\n\r\n", bytes(200_000)), "it has more bytes than it should"),
        (says(OK + b"Content-Length: 9\r\n\r\nshort"), "the connection ended after 5 of 9 bytes"),
        (says(OK + b"Content-Length: \xb2\r\n\r\nx"), "invalid literal for int"),
        (says(OK + b"Content-Encoding: gzip\r\n\r\nx"), "the server sends it in another encoding"),
        (says(b"HTTP/1.1 500 \x1b[31mred\r\n\r\nx"), "HTTP Error 500: \\x1b[31mred"),
        (says(b"HTTP/1.1 206 Part\r\n\r\nx"), "the server answers 206 instead of 200"),
        (says(b"HTTP/1.1 302 x\r\nLocation: file:///etc/passwd\r\n\r\n"), "is not allowed"),
        (says(b"HTTP/1.1 302 x\r\nLocation: ftp://127.0.0.1/x\r\n\r\n"), "unknown url type: ftp"),
        (says(b"HTTP/1.1 302 x\r\nLocation: /again\r\n\r\n"), "infinite loop"),
        (says(OK + b"X: half a hea"), "the server sends nothing"),
        (says(b"nonsense\r\n\r\n"), "nonsense"),
        (says(b""), "Remote end closed connection without response"),
    ],
)
def test_a_server_that_lies_drips_or_never_ends_gets_one_sentence_and_leaves_nothing(
    send: Callable, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "DOWNLOAD_SEC", 0.5)
    monkeypatch.setattr(download, "WATCH_SEC", 0.05)
    with server(send) as url, pytest.raises(DataError) as caught:
        fetch(url, tmp_path, most=100_000)
    assert str(caught.value).startswith(f"fetching {url} into {tmp_path} failed (") and why in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock-x.tar"]


def test_a_plain_answer_arrives_whole_with_and_without_a_length(tmp_path: Path) -> None:
    body = np.random.default_rng(0).bytes(300_000)
    chunked = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    heads = (b"Content-Length: 300000\r\n\r\n" + body, b"Transfer-Encoding: chunked\r\n\r\n" + chunked, b"\r\n" + body)
    for number, head in enumerate(heads):
        with server(says(OK + head)) as url:
            assert fetch(url, tmp_path / str(number), most=300_000).read_bytes() == body


# --- what a run stumbles over, verify reports


def _swap(folder: Path) -> None:
    with np.load(folder / "index.npz") as arrays:
        shards = arrays["shards"]
    edit_index(folder, shards=lambda _: shards[[1, 0, 2]])


def _cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _blank(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[600:900] = bytes(300)
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "index.npz").unlink(), "index.npz"),
    "index of another kind": (lambda f: (f / "index.npz").write_bytes(b"junk"), "index.npz"),
    "index in another order": (_swap, "index.npz"),
    "index with shards too short": (lambda f: edit_index(f, shard_sizes=lambda a: a - 512), "index.npz"),
    "index with shards too long": (lambda f: edit_index(f, shard_sizes=lambda a: a + 512), "index.npz"),
    "index with other offsets": (lambda f: edit_index(f, offset=lambda a: a - 100), "index.npz"),
    "index with other labels": (lambda f: edit_index(f, label=lambda a: a + 1), "index.npz"),
    "manifest of another size of pictures": (lambda f: edit(f, lambda m: m.update(resolution=8)), "shard-000000.tar"),
    "manifest with fewer classes": (lambda f: edit(f, lambda m: m.update(label_names=["a"])), "shard-000002.tar"),
    "shard that is gone": (lambda f: (f / "shard-000001.tar").unlink(), "shard-000001.tar"),
    "shard that is cut": (lambda f: _cut(f / "shard-000001.tar", 0.7), "shard-000001.tar"),
    "shard that is empty": (lambda f: _cut(f / "shard-000001.tar", 0), "shard-000001.tar"),
    "picture that is damaged": (_blank, "shard-000000.tar"),
}


def stumbles(source: Path) -> bool:
    """Whether a run would refuse a data set, name damage in it, or count one of its samples as bad."""
    try:
        dataset = open_dataset(str(source), keep_index=False)
        bad: list[tuple[str, str, str]] = []
        list(iterate(dataset, range(dataset.num_samples), 4, workers=0, bad=bad))
    except DataError:
        return True
    return bool(dataset.damage or bad)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_a_run_stumbles_over_is_found_by_verify(damage: str, shards: Path, tmp_path: Path) -> None:
    assert verified(shards, tmp_path) == (0, [])
    change, place = DAMAGE[damage]
    change(shards)
    assert stumbles(shards)
    code, found = verified(shards, tmp_path)
    assert code == 2 and place in {shard for shard, _, _ in found}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"shards": []}', '{"shards": [{"name": "x.tar"}], "hash": "x"}', '{"hash": "x", "shards": [null]}'],
)
def test_a_manifest_that_no_run_can_read_ends_verify_with_the_same_words(text: str, shards: Path) -> None:
    (shards / "manifest.json").write_text(text)
    said = refused(shards) if text != '{"shards": []}' else ""
    with pytest.raises(DataError) as caught:
        verified(shards, shards)
    assert "manifest.json is damaged (" in str(caught.value) and said in str(caught.value)


LOOSE: dict[str, list[tuple[str, bytes]]] = {
    "label beyond the samples": [("a.png", png(0)), ("a.cls", b"7"), ("b.png", png(1)), ("b.cls", b"0")],
    "label that is no number": [("a.png", png(0)), ("a.cls", b"x"), ("b.png", png(1))],
    "no picture": [("a.txt", b"x")],
    "picture of another size": [(f"{n}.png", png(n, 16 if n < 9 else 12)) for n in range(10)],
    "picture that is none": [("a.png", png(0)), ("b.png", b"<html>")],
    "picture of no bytes": [("a.png", png(0)), ("b.png", b"")],
    "animated picture": [("a.png", png(0)), ("b.tif", directories(3))],
    "picture with many scans": [("a.png", png(0)), ("b.jpg", encoded(photo(0), "JPEG", progressive=True) * 300)],
    "second picture of a key": [("a.png", png(0)), ("a.jpg", png(1))],
}


@pytest.mark.parametrize("damage", LOOSE)
def test_what_a_run_stumbles_over_in_loose_shards_is_found_by_verify(damage: str, tmp_path: Path) -> None:
    path = loose_tar(tmp_path / "x.tar", LOOSE[damage])
    code, found = verified(str(path), tmp_path)
    assert stumbles(path) and code == 2 and {shard for shard, _, _ in found} == {"x.tar"}


def test_a_damaged_index_that_was_kept_beside_loose_shards_is_made_again(tmp_path: Path) -> None:
    path = loose_tar(tmp_path / "x.tar", [("a.png", png(0))])
    open_dataset(str(path))
    [kept] = tmp_path.glob(".index-*.npz")
    kept.write_bytes(zlib.compress(b"junk"))
    assert open_dataset(str(path)).num_samples == 1 and verified(str(path), tmp_path) == (0, [])
    assert json.loads(json.dumps(open_dataset(str(path)).index.shards.tolist())) == ["x.tar"]
