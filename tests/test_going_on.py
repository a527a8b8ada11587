"""Folders of pictures through `sdtrain upscale`, interrupted. Without these the frames of a film would all be made
again, or some would stay as another network or another source had made them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killed_jobs import digests
from test_upscale_shards import student as student  # noqa: PLC0414
from tiny import picture

from sdtrain import cli
from sdtrain.commands import upscale
from sdtrain.commands.upscale_jobs import Job

NUM = 5


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    from PIL import Image

    (tmp_path / "frames").mkdir()
    for number in range(NUM):
        Image.fromarray(picture(number)).save(tmp_path / "frames" / f"{number:03}.png")
    return tmp_path / "frames"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that were really written; after `stop` of them comes Ctrl-C."""
    names: list[str] = []
    real = upscale._write

    def write(job: Job, data: bytes) -> None:
        if len(names) == write.stop:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        names.append(job.source.name)
        real(job, data)

    write.stop = 3  # type: ignore[attr-defined]
    monkeypatch.setattr(upscale, "_write", write)
    return names


def words(frames: Path, student: Path, out: Path, *more: str) -> list[str]:
    return ["upscale", str(frames), "--model", str(student), "--out", str(out), "--device", "cpu", *more]


def interrupted(frames: Path, student: Path, out: Path, made: list[str]) -> None:
    assert cli.main(words(frames, student, out)) == 130
    assert made == ["000.png", "001.png", "002.png"]
    upscale._write.stop = -1  # type: ignore[attr-defined]
    made.clear()


def test_the_same_command_goes_on_and_leaves_nothing_but_pictures(
    frames: Path,
    student: Path,
    tmp_path: Path,
    made: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted(frames, student, out := tmp_path / "out", made)
    assert cli.main(words(frames, student, out)) == 0 and made == ["003.png", "004.png"]
    assert "3 of 5 pictures are done already" in capsys.readouterr().err
    assert cli.main(words(frames, student, tmp_path / "whole")) == 0
    assert digests(out) == digests(tmp_path / "whole") and len(digests(out)) == NUM
    made.clear()
    assert cli.main(words(frames, student, out)) == 0 and len(made) == NUM  # it was no interruption


def test_a_source_that_was_changed_is_made_again(
    frames: Path,
    student: Path,
    tmp_path: Path,
    made: list[str],
) -> None:
    interrupted(frames, student, tmp_path / "out", made)
    old = (frames / "004.png").stat()
    os.utime(frames / "004.png", ns=(old.st_atime_ns, old.st_mtime_ns - 10**12))
    os.replace(frames / "004.png", frames / "001.png")  # older than what is there, but put there later
    (frames / "004.png").write_bytes((frames / "000.png").read_bytes())
    assert cli.main(words(frames, student, tmp_path / "out")) == 0 and made == ["001.png", "003.png", "004.png"]


@pytest.mark.parametrize("more", [["--scale", "1"], ["--tile", "64"]])
def test_other_settings_make_all_of_them_again(
    frames: Path,
    student: Path,
    tmp_path: Path,
    made: list[str],
    more: list[str],
) -> None:
    interrupted(frames, student, tmp_path / "out", made)
    upscale._write.stop = 1  # type: ignore[attr-defined]
    assert cli.main(words(frames, student, tmp_path / "out", *more)) == 130
    upscale._write.stop = -1  # type: ignore[attr-defined]
    made.clear()
    assert cli.main(words(frames, student, tmp_path / "out", *more)) == 0
    assert made == ["001.png", "002.png", "003.png", "004.png"]  # 1 and 2 were those of the first command
