"""Shards that lie. Without these a header could hold a process for ever, a label ask for all memory, a name in a
manifest run a command, and `sdtrain verify` call clean what a run stumbles over.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_pack import loose_tar, packed, parsed, photos, png, verified

from sdtrain.data.pack import pack, verify
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.reader import read_all
from sdtrain.data.read.remote import cached_path
from sdtrain.data.read.tars import scan_tar
from sdtrain.errors import DataError

__all__ = ["photos"]


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError("still at it after a minute")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    """12 images of 16 px in two classes and three shards."""
    packed(photos, tmp_path / "set", "--resolution", "16", "--labels", "folder", "--shard-count", "3")
    return tmp_path / "set"


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_index(folder: Path, **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    with np.load(folder / "index.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    np.savez(folder / "index.npz", **(found | {name: change(found[name]) for name, change in changes.items()}))


def refused(source: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(source, **options)  # type: ignore[arg-type]
    return str(caught.value)


def raw_tar(path: Path, name: str, size: bytes, pax: bytes = b"") -> Path:
    """One member whose header says `size`, behind a PAX header with `pax` as its record."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    blocks = bytes(block) + bytes(1024)
    if pax:
        head = tarfile.TarInfo("pax")
        head.type, head.size = tarfile.XHDTYPE, len(pax)
        blocks = head.tobuf(tarfile.USTAR_FORMAT) + pax + bytes(-len(pax) % 512) + blocks
    path.write_bytes(blocks)
    return path


def record(name: bytes, value: bytes) -> bytes:
    body = b" " + name + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


NO_SIZE = "damaged header: its size is not a number of bytes at byte "


@pytest.mark.parametrize(
    ("size", "pax", "reason"),
    [
        (b"\xff" * 10 + b"\xfe\x00", b"", NO_SIZE + "0"),  # -512
        (b"\x80" + b"\xff" * 11, b"", f"truncated tar: {(1 << 88) - 1 - 1024} bytes are missing"),
        (b"00000000001\0", record(b"size", b"1" * 5000), NO_SIZE),
        (b"00000000001\0", record(b"size", "\u00b2\u00b3".encode()), NO_SIZE),
        (b"00000000001\0", record(b"size", b"-512"), NO_SIZE),
        (b"00000000001\0", b"9" * 5000 + b" size=3\n", "damaged header: its attributes cannot be read at byte 512"),
    ],
    ids=["minus 512", "2 to the 88", "5000 digits", "superscripts", "minus in PAX", "endless PAX length"],
)
def test_a_size_that_is_none_is_damage_and_no_endless_walk(
    size: bytes, pax: bytes, reason: str, tmp_path: Path
) -> None:
    path = raw_tar(tmp_path / "x.tar", "a.png", size, pax)
    code, found = verified(str(path), tmp_path)
    assert code == 2 and any(text.startswith(reason) for _, _, text in found)
    assert refused(str(path)).endswith(f"run: sdtrain verify {path}")


def special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_is_named_and_never_waited_for(kind: str, shards: Path, tmp_path: Path) -> None:
    (shards / "shard-000001.tar").unlink()
    special(shards / "shard-000001.tar", kind)
    code, found = verified(shards, tmp_path)
    assert (code, found) == (2, [("shard-000001.tar", "", "cannot be read: not a regular file")])
    dataset = open_dataset(shards)
    assert dataset.damage == (("shard-000001.tar", "", "cannot be read: not a regular file"),)
    with pytest.raises(DataError, match="sample 00000004-im-08 in shard-000001.tar cannot be read"):
        read_all(dataset)
    loose = open_dataset(str(shards / "shard-*.tar"), keep_index=False)
    assert loose.num_samples == 8 and len(loose.damage) == 1


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_an_index_that_is_no_file_is_refused(kind: str, shards: Path, tmp_path: Path) -> None:
    (shards / "index.npz").unlink()
    special(shards / "index.npz", kind)
    assert "is not a usable index" in refused(shards) and "not a regular file" in refused(shards)
    assert verified(shards, tmp_path)[1][0][0] == "index.npz"


def test_a_label_of_two_thousand_million_is_bounded_by_the_number_of_samples(tmp_path: Path) -> None:
    members = [("a.png", png(0)), ("a.cls", b"2147483647"), ("b.png", png(1)), ("b.cls", b"1")]
    path = loose_tar(tmp_path / "x.tar", members)
    assert refused(str(path)) == (
        f"sample a in x.tar has the label 2147483647, with 2 samples, more classes than samples; labels count from 0, "
        f"run: sdtrain verify {path}"
    )
    assert verified(str(path), tmp_path) == (2, [("x.tar", "a", "label 2147483647 means more classes than samples")])
    with pytest.raises(DataError, match="has the label 2147483647"):
        pack.run(parsed(pack, str(tmp_path), "--reindex"))


def test_a_label_outside_the_classes_of_the_manifest_is_refused(shards: Path, tmp_path: Path) -> None:
    edit(shards, lambda manifest: manifest.update(label_names=["a"]))
    assert "has the label 1, with 1 classes in the manifest; labels count from 0" in refused(shards)
    assert {reason for _, _, reason in verified(shards, tmp_path)[1]} == {"label 1 is outside 1 classes"}


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/x.tar", "sub/x.tar", "..", "", "pipe:touch canary", "http://h/x.tar"]
)
def test_a_shard_name_in_a_manifest_stays_in_its_folder(
    name: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards)
    edit(shards, lambda manifest: manifest["shards"][0].update(name=name))
    edit_index(shards, shards=lambda names: np.array([name, *names[1:]]))
    for source in (shards, "."):
        message = refused(source)
        assert f"manifest.json names the shard {name!r}, which is no plain file name" in message
    with pytest.raises(DataError, match="no plain file name"):
        verify.run(parsed(verify, str(shards)))
    assert not (shards / "canary").exists()


def test_a_file_named_like_a_command_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loose_tar(tmp_path / "pipe:touch canary;.tar", [("a.png", png(0))])
    assert read_all(open_dataset("*.tar", allow_pipe=True)).shape == (1, 3, 16, 16)
    assert not (tmp_path / "canary").exists()


def test_commands_are_refused_unless_they_are_allowed(shards: Path, tmp_path: Path) -> None:
    source = f"pipe:touch {tmp_path}/canary; cat {shards}/shard-000000.tar"
    assert refused(source, cache=tmp_path / "cache") == (
        f"{source} would run a command; allow it with --allow-pipe, or for a run with --set data.allow_pipe=true"
    )
    with pytest.raises(DataError, match="would run a command"):
        verify.run(parsed(verify, source))
    assert not (tmp_path / "canary").exists()
    dataset = open_dataset(source, cache=tmp_path / "cache", allow_pipe=True)
    assert dataset.num_samples == 4 and (tmp_path / "canary").exists() and dataset.allow_pipe


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[]", "null", '{"shards": 3, "hash": "x"}', '{"shards": [], "hash": "x", "resolution": Infinity}'],
)
def test_a_manifest_of_another_kind_is_damage(content: str, shards: Path) -> None:
    (shards / "manifest.json").write_text(content)
    assert refused(shards).startswith(f"{shards}/manifest.json is damaged (")


@pytest.mark.parametrize(
    ("field", "change", "why"),
    [
        ("offset", lambda a: a + (1 << 40), "a sample lies outside its shard"),
        ("size", lambda a: a - (1 << 40), "a sample lies outside its shard"),
        ("shard", lambda a: a + 9, "a sample lies in a shard that is not listed"),
        ("label", lambda a: a - 9, "a label is negative"),
        ("key_ends", lambda a: a + 1, "the cuts between keys are wrong"),
        ("label", lambda a: a[:-1], "arrays differ in length"),
        ("label", lambda a: a.astype(float), "an array is of another type"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(field: str, change: Callable, why: str, shards: Path) -> None:
    edit_index(shards, **{field: change})
    assert f"is not a usable index ({why})" in refused(shards)


def test_an_index_that_could_unfold_to_any_size_is_refused(shards: Path) -> None:
    with np.load(shards / "index.npz") as arrays:
        np.savez_compressed(shards / "index.npz", **{name: arrays[name] for name in arrays.files})
    assert "its arrays are compressed" in refused(shards)


def test_verify_compares_labels_and_keys_of_the_index_with_the_shards(shards: Path, tmp_path: Path) -> None:
    edit_index(shards, label=lambda labels: 1 - labels)
    code, found = verified(shards, tmp_path)
    assert code == 2 and len(found) == 3
    assert {reason for _, _, reason in found} == {"index differs from the shard; run: sdtrain pack --reindex"}


def test_verify_names_shards_that_only_the_index_lists(shards: Path, tmp_path: Path) -> None:
    def drop(manifest: dict) -> None:
        manifest["shards"].pop()
        manifest["count"] -= 4

    edit(shards, drop)
    todo = "run: sdtrain pack --reindex"
    assert set(verified(shards, tmp_path)[1]) == {
        ("index.npz", "shard-000002.tar", f"shard is listed, but not in the manifest; {todo}"),
        ("shard-000002.tar", "", "not in the manifest"),
        ("manifest.json", "", f"its hash is not that of the digests it lists; {todo}"),
    }


def test_verify_adds_up_the_manifest(shards: Path, tmp_path: Path) -> None:
    edit(shards, lambda manifest: manifest.update(count=13))
    reason = "it counts 13 images, its shards 12; run: sdtrain pack --reindex"
    assert verified(shards, tmp_path) == (2, [("manifest.json", "", reason)])


def test_verify_finds_one_key_in_two_packed_shards(shards: Path, tmp_path: Path) -> None:
    (shards / "shard-000001.tar").write_bytes((shards / "shard-000000.tar").read_bytes())
    assert pack.run(parsed(pack, str(shards), "--reindex")) == 0
    code, found = verified(shards, tmp_path)
    assert code == 2 and found[0] == ("shard-000001.tar", "00000000-im-00", "duplicate key: also in shard-000000.tar")
    assert len(found) == 4


def test_verify_takes_the_resolution_of_loose_shards_from_the_first_images_as_a_run_does(tmp_path: Path) -> None:
    members = [(f"{n}.png", png(n, 8)) for n in range(9)] + [("z.png", png(9, 12))]
    path = loose_tar(tmp_path / "m.tar", members)
    assert verified(str(path), tmp_path) == (2, [("m.tar", "z.png", "wrong resolution: 12x12, not 8x8")])
    mixed = loose_tar(tmp_path / "n.tar", [("1.png", png(1, 8)), ("2.png", png(2, 12))])
    assert verified(str(mixed), tmp_path) == (0, [])


def test_verify_and_reindex_walk_each_shard_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[str] = []
    for user in ("pack.checking", "read.index"):
        monkeypatch.setattr(f"sdtrain.data.{user}.scan_tar", lambda path: walked.append(str(path)) or scan_tar(path))
    assert verified(str(shards / "*.tar"), tmp_path) == (0, [])
    assert sorted(walked) == sorted(map(str, shards.glob("*.tar")))
    walked.clear()
    assert pack.run(parsed(pack, str(shards), "--reindex")) == 0 and len(walked) == 3


def test_reindex_minds_neither_a_pattern_in_the_name_nor_a_damaged_index_of_loose_shards(tmp_path: Path) -> None:
    folder = tmp_path / "set[1]"
    folder.mkdir()
    loose_tar(folder / "x.tar", [("a.png", png(0))])
    open_dataset(folder)
    [kept] = folder.glob(".index-*.npz")
    kept.write_bytes(b"junk")
    assert pack.run(parsed(pack, str(folder), "--reindex")) == 0
    assert open_dataset(folder).resolution == 16


def test_verify_finds_partners_that_do_not_fit_and_those_that_are_missing(tmp_path: Path) -> None:
    members = [("a.png", png(0, 16)), ("a.lq.png", png(0, 4)), ("b.png", png(1, 16)), ("b.lq.png", png(1, 5))]
    path = loose_tar(tmp_path / "p.tar", [*members, ("c.png", png(2, 16)), ("d.png", png(3)), ("d.lq.png", b"")])
    assert verified(str(path), tmp_path) == (
        2,
        [
            ("p.tar", "b.lq.png", "5x5 is no whole part of the image's 16x16"),
            ("p.tar", "d.lq.png", "empty member (0 bytes)"),
            ("p.tar", "c", "missing member: no low-quality partner, unlike others"),
        ],
    )


def test_verify_finds_samples_without_a_label_beside_labelled_ones(tmp_path: Path) -> None:
    path = loose_tar(tmp_path / "x.tar", [("a.png", png(0)), ("a.cls", b"0"), ("b.png", png(1))])
    assert verified(str(path), tmp_path) == (2, [("x.tar", "b", "missing member: no label, unlike others")])


def test_members_that_are_sparse_or_links_or_beyond_any_picture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in (("a.png", tarfile.LNKTYPE), ("b.png", tarfile.GNUTYPE_SPARSE), ("c.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        info = tarfile.TarInfo("d.png")
        info.pax_headers = {"GNU.sparse.realsize": "9"}
        info.size = 9
        tar.addfile(info, io.BytesIO(b"123456789"))
    huge = tarfile.TarInfo("e.png")
    huge.size = 1 << 31
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    with open(path, "r+b") as file:  # a hole of 2 GiB costs no disk
        file.seek(last.offset_data + 512)
        file.write(huge.tobuf(tarfile.GNU_FORMAT))
        file.truncate(last.offset_data + 1024 + huge.size + 1024)
    assert [(member, reason) for _, member, reason in verified(str(path), tmp_path)[1]] == [
        ("a.png", "refused: hard link member"),
        ("b.png", "refused: sparse member, its bytes do not lie in a row"),
        ("c.png", "refused: special file member"),
        ("d.png", "refused: sparse member, its bytes do not lie in a row"),
        ("e.png", "refused: 2147483648 bytes are more than any picture has"),
    ]


def test_names_cannot_paint_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loose_tar(tmp_path / "x.tar", [("\x1b[2Jgone.png", b"junk")])
    assert verified(str(tmp_path / "x.tar"), tmp_path)[0] == 2
    assert "\x1b" not in capsys.readouterr().out


def test_a_lock_of_the_cache_that_is_a_link_is_not_followed(shards: Path, tmp_path: Path) -> None:
    source, cache, victim = f"pipe:cat {shards}/shard-000000.tar", tmp_path / "cache", tmp_path / "victim"
    place = cached_path(source, cache)
    place.parent.mkdir(parents=True)
    victim.write_text("precious")
    place.with_name(f".lock-{place.name}").symlink_to(victim)
    assert refused(source, cache=cache, allow_pipe=True).startswith(f"fetching {source} into {cache} failed (")
    assert victim.read_text() == "precious" and not place.exists()


def test_verify_reads_shards_behind_an_address(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    damaged = bytearray((shards / "shard-000002.tar").read_bytes())
    damaged[600] ^= 0xFF
    (shards / "shard-000002.tar").write_bytes(damaged)
    code, found = verified(f"http://127.0.0.1:{httpd.server_port}/", tmp_path)
    httpd.shutdown()
    assert code == 2 and [shard for shard, _, _ in found] == ["shard-000002.tar"] and "has sha256" in found[0][2]
