"""A packing that goes wrong. Without these it could leave a folder that passes for a data set with a third of the
images in it, or delete the good one it was to replace.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO
from test_pack import COMMAND, packed, parsed, photo, photos, refusal, verified

from sdtrain.data.pack import pack, verify
from sdtrain.data.read.dataset import open_dataset
from sdtrain.errors import DataError

__all__ = ["photos"]


@pytest.fixture
def oblong(tmp_path: Path) -> Path:
    """20 images of which 3 are wide, 1 is broken and 1 is small."""
    folder = tmp_path / "oblong"
    folder.mkdir()
    for number in range(20):
        size = {3: (16, 12), 4: (16, 12), 5: (16, 12), 7: (4, 4)}.get(number, (16, 16))
        photo(number).crop((0, 0, *size)).save(folder / f"{number:02d}.png")
    (folder / "09.png").write_bytes(b"<html>")
    return folder


def test_too_many_rejected_images_end_the_packing_with_share_reasons_and_cures(oblong: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert refusal(str(oblong), str(out), "--resolution", "8", "--workers", "1") == (
        "5 of 20 images (25 %) were rejected, --max-rejected allows 10 %; nothing was packed: "
        "3 not square (--crop center takes the middle square); 1 not an image; "
        "1 too small (--enlarge accepts them for --resolution, a smaller --tile for tiles); for example 03.png: 16x12"
    )
    assert not (tmp_path / "new").exists()


def test_the_command_line_ends_with_code_2_and_says_so_on_the_screen(oblong: Path, tmp_path: Path) -> None:
    words = ["pack", str(oblong), str(tmp_path / "out"), "--resolution", "8", "--workers", "2", "--shard-count", "2"]
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "sdtrain: 5 of 20 images (25 %) were rejected" in done.stderr


def test_a_smaller_share_is_told_on_the_screen(
    oblong: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [
        "  rejected: 5 of 20 images (25 %)",
        "    3 not square (--crop center takes the middle square), for example 03.png: 16x12",
        "    1 not an image, for example 09.png: it looks like HTML or XML",
    ]
    for _ in range(2):  # the second time nothing is left to do
        packed(oblong, tmp_path / "out", "--resolution", "8", "--max-rejected", "0.25")
        said = capsys.readouterr().out.splitlines()
        assert said[-4:-1] == told and "too small" in said[-1]


def test_no_image_at_all_is_refused_whatever_share_is_allowed(photos: Path, tmp_path: Path) -> None:
    message = refusal(str(photos), str(tmp_path / "out"), "--resolution", "32", "--max-rejected", "100%")
    assert message.startswith("12 of 12 images (100 %) were rejected")


@pytest.mark.parametrize("text", ["110%", "-1", "few", "nan"])
def test_a_share_is_a_number_between_nothing_and_all(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(pack, "source", "out", f"--max-rejected={text}")
    assert f"{text} is no share; give 0% to 100%, or 0 to 1" in capsys.readouterr().err


def test_a_failed_replacement_leaves_the_old_shards(oblong: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = packed(photos, out, "--resolution", "16")
    refusal(str(oblong), str(out), "--resolution", "8", "--overwrite")
    assert open_dataset(out).hash == before["hash"] and verified(out, tmp_path) == (0, [])
    assert not (out / ".pack").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_packing_says_how_to_go_on_and_is_not_taken_for_data(number: int, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for n in range(60):
        photo(n, 160).save(source / f"{n:02d}.png")
    words = ["pack", str(source), str(out), "--resolution", "128", "--shard-count", "30", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob(".pack/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert "of 30 shards are finished; the same command continues\nsdtrain: interrupted\n" in said
    assert [path.name for path in out.iterdir()] == [".pack"] and not list(out.rglob("*.tmp"))
    assert ended(process.pid)
    with pytest.raises(DataError, match="^packing into .* has not finished; repeat the command that began it$"):
        open_dataset(out)
    again = packed(source, out, *words[3:7])
    assert again["count"] == 60 and verified(out, tmp_path) == (0, [])


def test_a_packing_that_is_interrupted_before_its_first_shard_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("sdtrain.data.pack.packing.pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed(photos, tmp_path / "new" / "out", "--keep")
    assert not (tmp_path / "new").exists() and "continues" not in capsys.readouterr().err


def test_processes_of_a_killed_packing_do_not_outlive_it(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for n in range(40):
        photo(n, 160).save(source / f"{n:02d}.png")
    words = ["pack", str(source), str(out), "--resolution", "128", "--shard-count", "20", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], cwd=REPO, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".pack/*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert ended(process.pid)


def ended(group: int) -> bool:
    """Whether the last process of a group leaves within half a minute."""
    for _ in range(600):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_source_file_that_cannot_be_read_is_named(photos: Path, tmp_path: Path, monkeypatch) -> None:
    def unreadable(self: object, name: str) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sdtrain.data.pack.sources.SourceReader.read", unreadable)
    assert refusal(str(photos), str(tmp_path / "out"), "--keep", "--workers", "1") == (
        f"{photos}/a/im 00.png cannot be read (Permission denied); "
        "check its rights, or leave it out with --exclude-list"
    )
    assert not (tmp_path / "out").exists()


def test_a_temporary_name_that_is_a_link_is_not_followed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("sdtrain.files.secrets.token_hex", lambda n: "guessed")
    (tmp_path / ".guessed.tmp").symlink_to(victim)
    from sdtrain.files import write_bytes

    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "x", b"new")
    assert victim.read_text() == "precious" and not (tmp_path / "x").exists()


@pytest.mark.parametrize("module", [pack, verify])
def test_every_option_with_a_default_says_it_in_the_help(module: object) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    options = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    silent = [action.dest for action in options if action.default and "default" not in str(action.help)]
    assert silent == []
    assert "(default: 10%)" in parser.format_help() or module is verify
