"""Damaged and hostile data sets, pictures, archives and servers.

What a run would stumble over, `sdtrain verify` must find: readers of shards are asked both and compared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import socket
import struct
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fuzz.harness import Inputs
from sdtrain.data.pack import pack
from sdtrain.data.pack.checking import check_source
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.decoder import Decoder
from sdtrain.data.read.images import ImageRejected, decode_image
from sdtrain.data.read.index import FIELDS, build_index
from sdtrain.data.read.picture import read_picture
from sdtrain.data.read.pool import requests_of
from sdtrain.data.read.remote import fetch
from sdtrain.data.read.tars import BLOCK, ShardWriter
from sdtrain.errors import UserError

NUMBERS = (0, 1, -1, 4, 255, 511, 512, 4097, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
TEXTS = (
    "",
    "\0",
    "..",
    "../x",
    "/etc/passwd",
    "a" * 5000,
    "\u00b2\u00b3",
    "\udcff",
    "\x1b[31m",
    "%s%n",
    "-512",
    "1e400",
)
VALUES = (
    None,
    True,
    -1,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    10**30,
    *TEXTS,
    [],
    {},
    [[]],
    {"": {}},
    [None],
    [0] * 50,
)


# --- what all of them are made of


@functools.cache
def photo(number: int = 0, side: int = 16, kind: str = "PNG", mode: str = "RGB") -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(values).convert(mode), io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def damaged(random: Random, data: bytes) -> bytes:
    """The bytes with a few places changed, moved, cut or set to the ends of what numbers can be."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(out) + 1)
        span = random.choice((1, 2, 4, 8, 64, len(out) // 4 + 1))
        kind = random.randrange(7)
        if kind <= 2:
            out[at : at + 1] = bytes([random.randrange(256)])
        elif kind == 3:
            out[at : at + 4] = struct.pack(random.choice("<>") + "I", random.choice(NUMBERS) % 2**32)
        elif kind == 4:
            del out[at : at + span]
        elif kind == 5:
            out[at:at] = out[:span] if random.random() < 0.5 else random.randbytes(span)
        else:
            del out[at if random.random() < 0.3 else len(out) :]
    return bytes(out)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    return parser.parse_args(words)


# --- shards, alone or as a packed folder


def use_shards(path: Path) -> str:
    """What a run finds wrong, after `verify` has found something wrong as well."""
    with quiet():
        stumbled, found = _run_over(path), _verify(path)
    if stumbled and not found:
        raise AssertionError(f"verify calls clean what a run stumbles over: {stumbled}")
    return stumbled


def _verify(path: Path) -> list[Any]:
    try:
        return check_source(str(path), resolution=0, decode=True, workers=1)[0]
    except UserError as error:
        return [error]


def _run_over(path: Path) -> str:
    try:
        dataset = open_dataset(path, cache=path.parent / "cache", keep_index=False)
    except UserError as error:
        return str(error)
    if dataset.damage:
        return str(dataset.damage[0])
    dataset.describe()
    side = dataset.resolution
    if side is None:
        return _read_one_by_one(dataset)
    if side > 1024:
        return f"verify is to complain of a side of {side}" if _read_one_by_one(dataset) else ""
    buffer = np.zeros(3 * side * side, np.uint8)
    decoder = Decoder(dataset.shards, dataset.sha256, str(dataset.cache), False, limits=dataset.limits)
    bad = []
    for i in range(dataset.num_samples):
        bad += decoder.run(requests_of(dataset, np.array([i]), side), buffer)
    decoder.close()
    return str(bad[0]) if bad else ""


def _read_one_by_one(dataset: Any) -> str:
    for i in range(dataset.num_samples):
        try:
            decode_image(dataset.read(i), dataset.limits)
        except (OSError, EOFError, ImageRejected) as error:
            return str(error)
    return ""


def a_header(random: Random, name: str, size: int) -> bytes:
    """A tar header, often with a field that no writer would write, its sum right."""
    info = tarfile.TarInfo(name)
    info.size = size
    kinds = (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"L",
        b"x",
        b"g",
        b"\xff",
    )
    if random.random() < 0.3:
        info.type, info.linkname = random.choice(kinds), "a.png"
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))[-BLOCK:]
    if random.random() < 0.3:
        block[124:136] = random.choice(
            (
                b"\x80" + b"\xff" * 11,
                b"\xff" * 12,
                b"\xff" * 10 + b"\xfe\0",
                b"-0000000512\0",
                b"7" * 12,
                b" " * 12,
                b"\0" * 12,
            )
        )
    if random.random() < 0.2:
        block[random.randrange(BLOCK)] = random.randrange(256)
    if random.random() < 0.9:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def a_record(random: Random) -> bytes:
    key = random.choice(("size", "path", "GNU.sparse.size", "GNU.sparse.map", "linkpath", "mtime", "hdrcharset"))
    value = random.choice((*TEXTS, "100", "1" * 5000, "new.png", "new.cls", *map(str, NUMBERS)))
    body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(body) + random.choice((1, 2, 2, 3, 3, 4, 0, -5, 10**6, 10**20))
    return b"%d" % length + body


def make_tar(random: Random, folder: Path) -> Path:
    data = b""
    for number in range(random.randrange(1, 6)):
        if random.random() < 0.3:
            record = a_record(random)
            data += a_header(random, "pax", len(record))[:156] + random.choice((b"x", b"L", b"g"))
            data += bytes(BLOCK - len(data) % BLOCK)
            data = _summed(data) + record + bytes(-len(record) % BLOCK)
        content = photo(number % 2) if random.random() < 0.7 else random.choice((b"", b"1", b"99999", photo(3, 12)))
        name = random.choice(
            (f"{number}.png", f"{number}.png", f"{number}.cls", f"{number}.lq.png", "0.png", "x/../y.png", "a.pkl")
        )
        data += a_header(random, name, len(content)) + content + bytes(-len(content) % BLOCK)
    data += bytes(2 * BLOCK)
    path = folder / "x.tar"
    path.write_bytes(damaged(random, data) if random.random() < 0.3 else data)
    return path


def _summed(data: bytes) -> bytes:
    block = bytearray(data[-BLOCK:])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:-BLOCK] + bytes(block)


def make_labels(random: Random, folder: Path) -> Path:
    """Shards whose .cls members hold anything."""
    writer = ShardWriter(folder / "x.tar")
    odd = (
        *(str(n).encode() for n in NUMBERS),
        b"",
        b"\n",
        b"1 2",
        b"\xb2",
        "\u0663".encode(),
        b"0" * 40,
        b"1.0",
        b"nan",
        b"\0",
    )
    for number in range(4):
        writer.add(f"{number}.png", photo(number))
        if random.random() < 0.9:
            label = random.choice(odd) if random.random() < 0.4 else b"%d" % random.randrange(4)
            writer.add(f"{number}.cls", damaged(random, label) if random.random() < 0.2 else label)
    writer.close()
    return folder / "x.tar"


def packed_folder(folder: Path) -> dict[str, Any]:
    """Two shards of three pictures in two classes with index and manifest; returns the manifest."""
    paths, shards = [folder / f"shard-{n:06d}.tar" for n in range(2)], []
    for shard, path in enumerate(paths):
        writer = ShardWriter(path)
        for number in range(3):
            writer.add(f"{shard}{number}.png", photo(number))
            writer.add(f"{shard}{number}.cls", b"%d" % (number % 2))
        size, digest = writer.close()
        shards.append({"name": path.name, "size": size, "sha256": digest, "count": 3})
    from sdtrain.data.pack.packing import manifest_of

    build_index(paths, [path.name for path in paths])[0].save(folder / "index.npz")
    manifest = manifest_of(shards, 16, ["a", "b"]) | {"label_counts": [4, 2], "pack": {"plan": "x"}, "converted": {}}
    return manifest | {"rejected": [["x.png", "too small: 1x1"]]}


def make_manifest(random: Random, folder: Path) -> Path:
    manifest = packed_folder(folder)
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        _change(random, manifest)
    text = json.dumps(manifest).encode()
    if random.random() < 0.2:
        text = damaged(random, text)
    if random.random() < 0.1:
        text = random.choice(
            (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b"\xff\xfe", b"", b"null", b'"\xff"', b"\0")
        )
    (folder / "manifest.json").write_bytes(text)
    return folder


def _change(random: Random, tree: Any) -> None:
    """Another value, no value or a stranger's key somewhere in a tree of JSON."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = random.choice(keys) if keys else None
        below = tree[key] if key is not None else None
        if not (isinstance(below, (dict, list)) and below and random.random() < 0.7):
            break
        tree = below
    if key is None:
        return
    kind = random.randrange(4)
    if kind == 0:
        del tree[key]
    elif kind == 1 and isinstance(tree, list):
        tree.append(random.choice((tree[key], *VALUES)))
    else:
        tree[key] = random.choice((*VALUES, *NUMBERS))


def use_manifest(path: Path) -> str:
    """As a run and `verify` read it; then `pack` looks at it, as a place to write and as one to rebuild."""
    stumbled = use_shards(path)
    source = path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(photo())
    with quiet():
        with contextlib.suppress(UserError):
            pack.run(parsed(str(source), str(path), "--keep", "--workers", "1"))
        pack.run(parsed(str(path), "--reindex"))
    if (again := _run_over(path)) and "differ" not in again:
        raise AssertionError(f"a rebuilt folder cannot be read: {again}")
    return stumbled


def make_index(random: Random, folder: Path) -> Path:
    (folder / "manifest.json").write_text(json.dumps(packed_folder(folder)))
    with np.load(folder / "index.npz") as found:
        arrays = {name: found[name] for name in FIELDS}
    members = {name: _npy(value) for name, value in arrays.items()}
    for _ in range(random.choice((0, 1, 1, 2))):
        name = random.choice(FIELDS)
        members[name] = _changed_npy(random, arrays[name])
    if random.random() < 0.1:
        del members[random.choice(FIELDS)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    data = buffer.getvalue()
    (folder / "index.npz").write_bytes(damaged(random, data) if random.random() < 0.3 else data)
    return folder


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values)
    return buffer.getvalue()


def _changed_npy(random: Random, values: np.ndarray) -> bytes:
    kind = random.randrange(6)
    if kind == 0:
        return damaged(random, _npy(values))
    if kind == 1:
        header = {"descr": random.choice(("<i8", "|O", "<U0", "<U9999999", "|V0", ">f8")), "fortran_order": False}
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, header | {"shape": random.choice(((2**60,), (), (0,), (2**31, 2**31), (6,)))}
        )
        return buffer.getvalue() + bytes(random.choice((0, 100)))
    if kind == 2:
        return _npy(values[: random.randrange(len(values) + 1)])
    if kind == 3 or values.dtype.kind == "U":
        return _npy(
            values.astype(random.choice(("<U3", "S3", "f8", "i8", "u1", "i4")))
            if values.dtype.kind != "U"
            else values[::-1]
        )
    changed = values.copy()
    limits = np.iinfo(values.dtype)
    changed[random.randrange(len(values))] = min(max(random.choice(NUMBERS), limits.min), limits.max)
    return _npy(changed)


# --- pictures


KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM")
MODES = {"JPEG": ("RGB", "L", "CMYK"), "GIF": ("P",), "WEBP": ("RGB", "RGBA"), "PPM": ("RGB", "L")}


def make_image(random: Random, folder: Path) -> Path:
    kind = random.choice(KINDS)
    data = photo(
        random.randrange(3), random.choice((16, 33)), kind, random.choice(MODES.get(kind, ("RGB", "RGBA", "L", "P")))
    )
    if random.random() < 0.1:
        data = _tagged(random)
    elif kind == "PNG" and random.random() < 0.6:
        data = _chunks_changed(random, data)
    elif kind == "JPEG" and random.random() < 0.3:
        data = data[:-2] + data[data.index(b"\xff\xda") : -2] * random.choice((1, 90, 3000)) + b"\xff\xd9"
    path = folder / f"x.{kind.lower()}"
    path.write_bytes(damaged(random, data) if random.random() < 0.8 else data)
    return path


def _chunks_changed(random: Random, data: bytes) -> bytes:
    """A PNG whose chunks are changed and whose sums are right nevertheless."""
    parts, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        parts.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    place = random.randrange(len(parts))
    name, content = parts[place]
    kind = random.randrange(4)
    if kind == 0:
        parts[place] = (name, damaged(random, content))
    elif kind == 1:
        header = (
            random.choice((4, 16, 8191, 70_000, 2**31)),
            random.choice((4, 16, 8191)),
            random.choice((1, 2, 8, 16)),
        )
        parts[0] = (
            b"IHDR",
            struct.pack(">IIBBBBB", *header, random.choice((0, 2, 3, 4, 6)), 0, 0, random.choice((0, 1))),
        )
    else:
        extra = random.choice((b"eXIf", b"tRNS", b"acTL", b"iCCP", b"zTXt", b"iTXt", b"PLTE", b"fcTL", b"fdAT"))
        bomb = b"x\0\0" + zlib.compress(bytes(10**6))
        parts.insert(place, (extra, random.choice((b"", random.randbytes(20), bomb, b"Exif\0\0II*\0" + bytes(8)))))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return data[:8] + b"".join(chunks)


def _tagged(random: Random) -> bytes:
    """A TIFF of one or many directories with any numbers in them."""
    out, num_pages = b"II*\0" + struct.pack("<I", 24) + bytes(16), random.choice((1, 1, 1, 2, 3000))
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
    for _ in range(random.randrange(4)):
        tag = random.choice((*tags, 274, 320, 322, 323, 324, 325, 330, 339, 700, 34665))
        tags[tag] = random.choice(NUMBERS) % 2**32
    for page in range(num_pages):
        rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
        after = len(out) + 2 + len(rows) + 4
        out += struct.pack("<H", len(tags)) + rows + struct.pack("<I", after if page < num_pages - 1 else 0)
    return out


def use_image(path: Path) -> str:
    """As packing, verifying and training decode it, then as `upscale` reads it."""
    with quiet():
        try:
            image, _ = decode_image(path.read_bytes())
        except ImageRejected as reason:
            return str(reason)
        assert image.mode == "RGB" and np.asarray(image).shape == (image.height, image.width, 3)
        with contextlib.suppress(ImageRejected):
            assert read_picture(path).rgb.shape == (image.height, image.width, 3)
    return ""


# --- archives and lists for `sdtrain pack`


def make_zip(random: Random, folder: Path) -> Path:
    buffer = io.BytesIO()
    method = random.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for number in range(random.randrange(1, 4)):
            names = (
                f"{number}.png",
                "a/1.png",
                "../x.png",
                "/x.png",
                "a\x1b[31m.png",
                "C:\\x.png",
                "\u00b2.png",
                "x" * 300 + ".png",
            )
            info = zipfile.ZipInfo(random.choice(names))
            info.compress_type = method
            if random.random() < 0.2:
                info.external_attr = 0o120777 << 16  # a symbolic link
            content = random.choice((photo(number), photo(number), b"", b"/etc/passwd", bytes(3_000_000)))
            archive.writestr(info, content)
    data = bytearray(buffer.getvalue())
    for _ in range(random.choice((0, 1, 1, 3))):
        _lie(random, data)
    path = folder / "x.zip"
    path.write_bytes(damaged(random, bytes(data)) if random.random() < 0.4 else data)
    return path


def _lie(random: Random, data: bytearray) -> None:
    """Another number in a header of an archive: sizes, sums, offsets, counts, flags."""
    mark, places = random.choice(((b"PK\1\2", range(6, 46)), (b"PK\3\4", range(4, 30)), (b"PK\5\6", range(4, 22))))
    at = data.find(mark)
    if at >= 0:
        place = at + random.choice(places)
        size = random.choice((1, 2, 4))
        data[place : place + size] = (random.choice(NUMBERS) % 256**size).to_bytes(size, "little")


def make_list(random: Random, folder: Path) -> Path:
    (folder / "source").mkdir()
    for number in range(3):
        (folder / "source" / f"{number}.png").write_bytes(photo(number))
    lines = [random.choice(("0.png", "1.png", "#x", *TEXTS)) for _ in range(random.randrange(4))]
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    path = folder / "list.txt"
    if random.random() < 0.1:
        os.mkfifo(path)
    else:
        path.write_bytes(damaged(random, text) if random.random() < 0.5 else text)
    return path


def use_zip(path: Path) -> None:
    with quiet():
        pack.run(parsed(str(path), str(path.parent / "out"), "--keep", "--workers", "1", "--max-rejected", "100%"))


def use_list(path: Path) -> None:
    with quiet():
        pack.run(
            parsed(
                str(path.parent / "source"), str(path.parent / "out"), "--keep", "--workers", "1", "--list", str(path)
            )
        )


# --- servers


def make_answer(random: Random, folder: Path) -> Path:
    """What a server sends for each of its connections, as it goes over the wire."""
    body = photo(random.randrange(3), 32)
    status = random.choice(
        ("HTTP/1.1 200 OK",) * 6
        + ("HTTP/1.1 500 \x1b[31mno", "HTTP/1.1 206 x", "HTTP/1.1 304 x", "HTTP/9 2", "junk", "HTTP/1.1 302 x")
    )
    lengths = (str(len(body)),) * 4 + (*map(str, NUMBERS), "\u00b2", "abc", "1" * 5000, f"{len(body)}, 5")
    headers = [f"Content-Length: {random.choice(lengths)}"]
    if random.random() < 0.3:
        headers = ["Transfer-Encoding: chunked"]
        size = random.choice((b"%x" % len(body),) * 3 + (b"-5", b"ffffffffffffffff", b"zz", b"", b"1" * 70_000))
        body = size + b"\r\n" + body + random.choice((b"\r\n0\r\n\r\n", b"\r\n", b"", b"\r\n0\r\n" + b"X: y\r\n" * 500))
    places = (
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "//",
        "http://[",
        "/again",
        "\u00b2",
        "pipe:touch x",
        "http://127.0.0.1:1/x",
    )
    if "302" in status or random.random() < 0.1:
        headers.append(f"Location: {random.choice(places)}")
    if random.random() < 0.2:
        headers += random.choice(
            (["Content-Encoding: gzip"], ["X: " + "y" * 70_000], ["X: y"] * 200, ["no colon"], [" folded"])
        )
    data = "\r\n".join([status, *headers, "", ""]).encode() + body
    path = folder / "answer"
    path.write_bytes(damaged(random, data) if random.random() < 0.4 else data)
    return path


def use_answer(path: Path) -> None:
    """Fetch from a server that answers so; whatever comes of it, the cache holds one whole file or none."""
    cache = path.parent / "cache"
    with _serving(path.read_bytes()) as port:
        try:
            fetch(f"http://127.0.0.1:{port}/x.tar", cache, most=1 << 20)
        except UserError:
            left = [found.name for found in cache.rglob("*") if found.is_file() and not found.name.startswith(".lock-")]
            assert not left, f"left behind: {left}"
            raise


@contextlib.contextmanager
def _serving(answer: bytes) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve, args=(server, answer), daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer)


CLASSES: dict[str, Inputs] = {
    "tar shards": Inputs(make_tar, use_shards),
    "labels": Inputs(make_labels, use_shards),
    "manifests": Inputs(make_manifest, use_manifest),
    "indexes": Inputs(make_index, use_shards),
    "images": Inputs(make_image, use_image),
    "zips": Inputs(make_zip, use_zip),
    "lists": Inputs(make_list, use_list),
    "http answers": Inputs(make_answer, use_answer),
}
