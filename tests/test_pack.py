"""Without these, a killed or damaged packing passes for a data set, and a run finds out after a day."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, run_python
from PIL import Image

from sdtrain.data.pack import pack, verify
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.images import decode_image
from sdtrain.errors import DataError

COMMAND = "import sys; from sdtrain.cli import main; sys.exit(main())"


def photo(number: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(12):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        photo(number).save(folder / "ab"[number % 2] / f"im {number:02d}.png")
    return folder


def packed(source: Path, out: Path, *options: str) -> dict:
    assert pack.run(parsed(pack, str(source), str(out), "--workers", "1", *options)) == 0
    return json.loads((out / "manifest.json").read_text())


def parsed(module: object, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(words)


def verified(source: Path | str, tmp_path: Path, *options: str) -> tuple[int, list[tuple[str, str, str]]]:
    report = tmp_path / "report.json"
    code = verify.run(parsed(verify, str(source), "--workers", "1", "--report", str(report), *options))
    rows = json.loads(report.read_text())["damage"]
    return code, [(row["shard"], row["member"], row["reason"]) for row in rows]


def loose_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(number: int = 0, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    photo(number, side).save(buffer, "PNG")
    return buffer.getvalue()


def refusal(*words: str) -> str:
    with pytest.raises(DataError) as caught:
        pack.run(parsed(pack, *words))
    return str(caught.value)


def test_webdataset_alone_reads_every_sample_in_order(photos: Path, tmp_path: Path) -> None:
    import webdataset

    packed(photos, tmp_path / "out", "--resolution", "16", "--labels", "folder", "--shard-count", "3")
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.reraise_exception))
    assert [s["__key__"] for s in samples[:2]] == ["00000000-im-00", "00000001-im-02"] and len(samples) == 12
    assert [int(s["cls"]) for s in samples] == [0] * 6 + [1] * 6
    assert np.array_equal(np.asarray(decode_image(samples[1]["png"])[0]), np.asarray(photo(2)))


def test_the_result_does_not_depend_on_processes_or_on_the_run(photos: Path, tmp_path: Path) -> None:
    options = ("--resolution", "8", "--shard-count", "3")
    first = packed(photos, tmp_path / "one", *options)
    assert pack.run(parsed(pack, str(photos), str(tmp_path / "two"), "--workers", "2", *options)) == 0
    assert json.loads((tmp_path / "two" / "manifest.json").read_text()) == first


def test_the_manifest_records_filter_labels_digests_and_counts(photos: Path, tmp_path: Path) -> None:
    (photos / "a" / "grey.png").write_bytes(_grey_png())
    (photos / "b" / "broken.jpg").write_bytes(b"<html>")
    manifest = packed(photos, tmp_path / "out", "--resolution", "8", "--resize", "box", "--labels", "folder")
    assert (manifest["count"], manifest["resolution"], manifest["pack"]["resize"]) == (13, 8, "box")
    assert (manifest["label_names"], manifest["label_counts"]) == (["a", "b"], [7, 6])
    assert manifest["converted"] == {"grey": 1}
    assert manifest["rejected"] == [["b/broken.jpg", "not an image: it looks like HTML or XML"]]


def _grey_png() -> bytes:
    buffer = io.BytesIO()
    photo(99).convert("L").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_zip_gives_the_same_shards_as_its_folder(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.rglob("*.png"):
            archive.write(path, path.relative_to(photos))
    options = ("--resolution", "16", "--labels", "folder")
    from_zip = packed(tmp_path / "photos.zip", tmp_path / "z", *options)
    assert from_zip["hash"] == packed(photos, tmp_path / "f", *options)["hash"]


def test_lists_split_a_source_without_overlap(photos: Path, tmp_path: Path) -> None:
    names = tmp_path / "val.txt"
    names.write_text("# held out\na/im 00.png\nim 01.png\n")
    held_out = packed(photos, tmp_path / "val", "--keep", "--list", str(names))
    rest = packed(photos, tmp_path / "train", "--keep", "--exclude-list", str(names))
    assert (held_out["count"], rest["count"]) == (2, 10)
    names.write_text("nobody.png\n")
    message = refusal(str(photos), str(tmp_path / "x"), "--keep", "--list", str(names))
    assert message == f"list {names} names 1 files that the source lacks (nobody.png); names are paths inside it"


def test_tiles_become_samples_of_their_own(photos: Path, tmp_path: Path) -> None:
    manifest = packed(photos, tmp_path / "out", "--tile", "8", "--stride", "4")
    assert manifest["count"] == 12 * 9 and manifest["resolution"] == 8
    assert open_dataset(tmp_path / "out").locate(1) == ("shard-000000.tar", "00000000-im-00_0001")


def test_a_killed_packing_continues_and_ends_with_the_same_digest(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        photo(number, 128).save(source / f"{number:02d}.png")
    words = ["pack", str(source), str(tmp_path / "out"), "--resolution", "96", "--shard-count", "20", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], cwd=REPO, stderr=subprocess.DEVNULL)
    markers = tmp_path / "out" / ".pack"
    deadline = time.monotonic() + 30
    while len(list(markers.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished_before = {path.name: path.stat().st_mtime_ns for path in markers.glob("shard-*.tar")}
    assert 2 <= len(finished_before) < 20 and not (tmp_path / "out" / "manifest.json").exists()
    damage_byte(markers / min(finished_before), 600)
    again = packed(source, tmp_path / "out", *words[3:7])
    assert again["hash"] == packed(source, tmp_path / "fresh", *words[3:7])["hash"]
    assert verified(tmp_path / "out", tmp_path) == (0, [])
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    kept = [name for name, changed in finished_before.items() if now[name] == changed]
    assert len(kept) >= len(finished_before) - 1
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_finished_shard_that_was_damaged_is_packed_again(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--keep", "--shard-count", "3")
    first = packed(photos, tmp_path / "out", *options)
    packed(photos, tmp_path / "out", *options)
    assert "complete already" in capsys.readouterr().out
    shard = tmp_path / "out" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    assert packed(photos, tmp_path / "out", *options)["hash"] == first["hash"]
    assert verified(tmp_path / "out", tmp_path) == (0, [])


def test_other_choices_do_not_silently_replace_shards(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(photos, out, "--resolution", "16")
    message = refusal(str(photos), str(out), "--resolution", "8")
    assert message == (
        f"{out} holds shards made from another source or with other choices; "
        "choose another folder, or replace it with --overwrite"
    )
    assert packed(photos, out, "--resolution", "8", "--overwrite")["resolution"] == 8


def test_index_and_manifest_can_be_rebuilt_from_the_tars_alone(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = packed(photos, out, "--resolution", "16", "--labels", "folder", "--shard-count", "2")
    before = open_dataset(out)
    (out / "manifest.json").unlink()
    (out / "index.npz").unlink()
    assert pack.run(parsed(pack, str(out), "--reindex")) == 0
    after = open_dataset(out)
    assert after.hash == first["hash"] and after.resolution == 16 and after.num_classes == 2
    assert all(np.array_equal(getattr(after.index, n), getattr(before.index, n)) for n in ("offset", "size", "label"))


def test_mistakes_are_refused_in_one_sentence(photos: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    size = "choose exactly one of --resolution N, --tile N and --keep, so that the size of the images is a decision"
    assert refusal(str(photos), out) == size
    assert refusal(str(photos), out, "--keep", "--tile", "8") == size
    absent = tmp_path / "absent"
    assert refusal(str(absent), out, "--keep") == f"{absent} does not exist; give a folder of images or a zip archive"
    (tmp_path / "empty").mkdir()
    assert refusal(str(tmp_path / "empty"), out, "--keep").endswith(
        "holds no image files; looked for png, jpg, webp, bmp, tif, gif and ppm in all sub-folders"
    )
    (tmp_path / "empty" / "data.mdb").touch()
    assert "is an LMDB; export it to a folder of .webp files first" in refusal(str(tmp_path / "empty"), out, "--keep")


def test_images_that_are_not_square_need_a_decision(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    photo(0, 16).crop((0, 0, 16, 12)).save(tmp_path / "s" / "wide.png")
    photo(1, 16).save(tmp_path / "s" / "x.png")
    manifest = packed(tmp_path / "s", tmp_path / "out", "--resolution", "8", "--max-rejected", "50%")
    assert manifest["rejected"] == [["wide.png", "not square: 16x12"]]
    assert packed(tmp_path / "s", tmp_path / "out2", "--resolution", "8", "--crop", "center")["count"] == 2


def test_an_unwritable_folder_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    message = refusal(str(photos), str(out), "--keep")
    assert message == f"packing into {out} failed: Not a directory; check rights and free space, then run again"


def test_a_full_disk_leaves_no_half_shard(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    out = tmp_path / "out"
    message = refusal(str(photos), str(out), "--keep", "--workers", "1")
    assert message == f"packing into {out} failed: No space left on device; check rights and free space, then run again"
    assert not out.exists()


def test_help_does_not_import_torch_or_pillow() -> None:
    code = (
        "import sys; import sdtrain.data.pack.pack, sdtrain.data.pack.verify; "
        "print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    )
    assert run_python("-c", code).stdout.strip() == "set()"


def test_verify_passes_a_clean_folder_through_the_command_line(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "out", "--keep", "--shard-count", "2")
    result = run_python("-c", COMMAND, "verify", str(tmp_path / "out"), "--workers", "2")
    assert result.returncode == 0 and result.stdout.splitlines() == [
        f"{tmp_path / 'out'}: 12 samples in 2 shards checked",
        "no damage found",
    ]


def test_verify_finds_every_kind_of_damage_in_a_packed_folder(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed(photos, out, "--keep", "--shard-count", "6")
    shards = sorted(out.glob("*.tar"))
    damage_byte(shards[0], 600)
    shards[1].write_bytes(shards[1].read_bytes()[:1000])
    shards[2].write_bytes(b"")
    shards[3].write_bytes(b"not a tar at all" * 100)
    shards[4].unlink()
    loose_tar(out / "stranger.tar", [("x.png", png())])
    code, found = verified(out, tmp_path)
    by_shard = {shard: [r for s, _, r in found if s == shard] for shard, _, _ in found}
    assert code == 2
    digest, pixels = by_shard["shard-000000.tar"]
    assert digest == "sha256 differs from the manifest" and pixels.startswith(("corrupt: ", "truncated: "))
    assert any(reason.startswith("truncated tar: ") for reason in by_shard["shard-000001.tar"])
    assert "empty file (0 bytes)" in by_shard["shard-000002.tar"]
    assert "not a tar file" in by_shard["shard-000003.tar"]
    assert by_shard["shard-000004.tar"] == ["missing shard"]
    assert by_shard["stranger.tar"] == ["not in the manifest"]
    assert "shard-000005.tar" not in by_shard and "index.npz" not in by_shard


def test_verify_says_when_the_index_points_elsewhere(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "out", "--keep")
    packed(photos, tmp_path / "other", "--resolution", "8")
    (tmp_path / "other" / "index.npz").replace(tmp_path / "out" / "index.npz")
    code, [(file, shard, reason)] = verified(tmp_path / "out", tmp_path)
    assert (code, file, shard) == (2, "index.npz", "shard-000000.tar")
    assert reason.startswith("it says that the shard has ") and reason.endswith("; run: sdtrain pack --reindex")


def damage_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def test_verify_finds_bad_members_in_foreign_tars_and_opens_no_pickle(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = b"cposix\nsystem\n(S'touch %s'\ntR." % str(canary).encode()
    members = [("a.png", png(0)), ("a.png", png(1)), ("b.cls", b"1"), ("c.png", png(2)), ("c.cls", b"two")]
    members += [("d.pyd", evil), ("../e.png", png(3)), ("/f.png", png(4)), ("g.png", png(5, 8)), ("h.png", b"junk")]
    path = loose_tar(tmp_path / "foreign.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    code, found = verified(str(path), tmp_path, "--resolution", "16")
    assert code == 2 and not canary.exists()
    assert {(member, reason) for _, member, reason in found} == {
        ("a.png", "duplicate key 'a'"),
        ("b", "missing member: no image"),
        ("c", "label is not a whole number"),
        ("d.pyd", "refused: pickle or weights member, could run code, not opened"),
        ("../e.png", "refused: path leaves the shard"),
        ("/f.png", "refused: path leaves the shard"),
        ("g.png", "wrong resolution: 8x8, not 16x16"),
        ("h.png", "not an image in a known format"),
        ("link.png", "refused: symbolic link member"),
    }
    assert open_dataset(str(path)).num_samples == 4


def test_verify_lists_the_worst_shard_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loose_tar(tmp_path / "a.tar", [("1.png", b"junk"), ("2.png", png())])
    loose_tar(tmp_path / "b.tar", [("3.png", b"junk"), ("4.png", b"junk")])
    assert verified(str(tmp_path / "*.tar"), tmp_path)[0] == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "3 damaged places"
    assert [line.split()[:2] for line in lines[3:]] == [["2", "b.tar"], ["1", "a.tar"]]


def test_a_tar_cut_between_members_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = loose_tar(tmp_path / "cut.tar", [("a.png", png(0)), ("b.png", png(1))])
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    path.write_bytes(path.read_bytes()[:second])
    assert verified(str(path), tmp_path)[1] == [("cut.tar", "", f"truncated tar: no end mark at byte {second}")]


def test_compressed_tars_are_named_as_such(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert "gzip-compressed tar: unpack it" in verified(str(tmp_path / "x.tar"), tmp_path)[1][0][2]


def test_long_and_non_ascii_names_of_other_tools_are_read(tmp_path: Path) -> None:
    name = "n" * 150 + "/" + "\u00e9" * 60 + ".png"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=kind) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
        dataset = open_dataset(str(tmp_path / f"{kind}.tar"))
        assert dataset.locate(0)[1] + ".png" == name and dataset.resolution == 16
