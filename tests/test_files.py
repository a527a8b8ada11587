"""Without these a full disk, a second node or a link could leave half a file, or delete what is somebody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import run_python

from sdtrain.engine import checkpoint
from sdtrain.files import AtomicFile, sweep, write_bytes, write_json


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), AtomicFile(tmp_path / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"no": object()})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_bytes(tmp_path / "folder", b"a file cannot take the name of a folder")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_a_full_disk_is_an_error_and_leaves_no_part(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from sdtrain.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path({str(tmp_path)!r}) / "a", bytes(3000))
except OSError as error:
    print("refused")
"""
    assert run_python("-c", code).stdout == "refused\n"
    assert list(tmp_path.iterdir()) == []


def test_writers_of_one_name_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    one, two = AtomicFile(tmp_path / "a"), AtomicFile(tmp_path / "a")
    one.write(b"one")
    two.write(b"two")
    assert len(list(tmp_path.iterdir())) == 2
    two.commit()
    one.commit()
    assert (tmp_path / "a").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_already_has_the_temporary_name_is_neither_overwritten_nor_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda count: "taken")
    (tmp_path / "precious").write_text("mine")
    os.symlink(tmp_path / "precious", tmp_path / ".taken.tmp")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "precious").read_text() == "mine"


def test_writing_to_a_link_replaces_the_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "far").write_text("theirs")
    os.symlink(tmp_path / "far", tmp_path / "near")
    write_bytes(tmp_path / "near", b"ours")
    assert (tmp_path / "far").read_text() == "theirs" and not (tmp_path / "near").is_symlink()


@pytest.mark.parametrize("where", ["mid-file", "before-rename-file"])
def test_a_writer_killed_at_any_moment_leaves_the_old_file_and_a_part_that_is_swept_up(
    tmp_path: Path, where: str
) -> None:
    write_bytes(tmp_path / "a", b"old")
    code = "import sys, pathlib, sdtrain.files; sdtrain.files.write_bytes(pathlib.Path(sys.argv[1]), b'new')"
    assert run_python("-c", code, str(tmp_path / "a"), env={"SDTRAIN_FAULT": where}).returncode == -9
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_retention_reads_a_linked_checkpoint_and_deletes_nothing_of_it(tmp_path: Path) -> None:
    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        write_json(folder / "state.json", {"seen_img": 1})
        write_json(folder / checkpoint.MARKER, {"files": {"state.json": checkpoint.digest(folder / "state.json")}})
        return folder

    theirs, root = make(tmp_path / "theirs" / "img_000000001"), tmp_path / "ours"
    old, new = make(root / "img_000000002"), make(root / "img_000000003")
    os.symlink(theirs, root / theirs.name)
    os.symlink(theirs, root / ".writing-old-img_000000000")
    found = checkpoint.newest(root)[0]
    assert found is not None and found.path == new
    checkpoint.retain(root, 1)
    assert checkpoint.verify(theirs) is None and checkpoint.verify(root / theirs.name) is None
    assert new.is_dir() and not old.exists() and not list(root.glob(".writing-*"))
    assert json.loads((root / theirs.name / "state.json").read_text()) == {"seen_img": 1}
