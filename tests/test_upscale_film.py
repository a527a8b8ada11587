"""Films through `sdtrain upscale`. Without these a film could lose frames, drift from its sound or change colours,
a killed job would begin again, and a hostile file would make ffmpeg read others.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_jobs import kill
from PIL import Image
from test_upscale import network_of

from sdtrain import cli
from sdtrain.data.read import film
from sdtrain.interop.network import save_network
from sdtrain.models.srvgg import networks as srvgg

FRAMES, WIDTH, HEIGHT, PART = 14, 48, 32, 4
needs_ffmpeg = pytest.mark.skipif(
    not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="optional programs are absent: ffmpeg, ffprobe"
)
SUBTITLES = "1\n00:00:00,100 --> 00:00:00,300\nHello\n"
CHAPTERS = ";FFMETADATA1\ntitle=A title\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=300\ntitle=One\n"
CLOCK = ("-enc_time_base", "1/90000")
UNEVEN = "settb=1/90000,setpts='(N*0.04+mod(N,3)*0.007)/TB'"


def ffmpeg(*words: object) -> bytes:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, words)]
    return subprocess.run(command, capture_output=True, check=True).stdout


def probed(path: Path, *words: str) -> list[str]:
    command = ["ffprobe", "-v", "error", *words, "-of", "default=nk=1:nw=1", str(path)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()


def times(path: Path) -> list[float]:
    return [
        float(t) for t in probed(path, "-select_streams", "v:0", "-show_entries", "frame=best_effort_timestamp_time")
    ]


def pictures(path: Path, width: int, height: int) -> np.ndarray:
    """uint8 [N, H, W, 3]"""
    raw = ffmpeg("-i", path, "-map", "0:v:0", "-vf", "settb=1/25,setpts=N", "-r", 25, "-f", "rawvideo", *RGB, "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


RGB = ("-pix_fmt", "rgb24")


def sound(path: Path) -> bytes:
    return ffmpeg("-i", path, "-map", "0:a", "-c", "copy", "-f", "md5", "-")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small x2 network that enlarges recognisably."""
    torch.manual_seed(0)
    net = srvgg.Generator(srvgg.GeneratorOptions(num_feat=4, num_conv=2, upscale=2))
    net.body[-1].weight.data.mul_(0.1)
    return save_network(network_of(net), tmp_path_factory.mktemp("student") / "student.safetensors")


def made(path: Path, *words: object, seconds: float = FRAMES / 25, size: str = f"{WIDTH}x{HEIGHT}") -> Path:
    """A film of a test picture with a tone."""
    inputs = ["-f", "lavfi", "-i", f"testsrc2=s={size}:r=25:d={seconds}", "-f", "lavfi", "-i", f"sine=d={seconds}"]
    ffmpeg(*inputs, "-map", "0:v", "-map", "1:a", *words, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film without loss whose frames come at uneven times, with sound, a subtitle, a chapter and a title."""
    folder = tmp_path_factory.mktemp("source")
    plain = made(folder / "plain.mkv", "-vf", UNEVEN, *CLOCK, "-c:v", "ffv1", "-pix_fmt", "bgr0", "-c:a", "flac")
    (folder / "words.srt").write_text(SUBTITLES)
    (folder / "about.txt").write_text(CHAPTERS)
    inputs = ["-i", plain, "-i", folder / "words.srt", "-i", folder / "about.txt"]
    taken = ["-map", "0", "-map", "1", "-map_metadata", "2", "-map_chapters", "2", "-c", "copy"]
    ffmpeg(*inputs, *taken, folder / "film.mkv")
    return folder / "film.mkv"


def words(source: Path, student: Path, out: Path, *more: str, codec: str = "ffv1") -> list[str]:
    chosen = ["--codec", codec, "--part", str(PART), "--device", "cpu"]
    return ["upscale", str(source), "--model", str(student), "--out", str(out), *chosen, *more]


@pytest.fixture(scope="module")
def whole(source: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "large.mkv"
    assert cli.main(words(source, student, out)) == 0
    return out


@needs_ffmpeg
def test_frames_are_those_of_pictures_and_everything_else_is_kept(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
) -> None:
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]
    small = tmp_path / "small"
    small.mkdir()
    for n, frame in enumerate(pictures(source, WIDTH, HEIGHT)):
        Image.fromarray(frame).save(small / f"{n:03}.png")
    assert cli.main(["upscale", str(small), *words(small, student, tmp_path / "large")[2:]]) == 0
    large = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "large").iterdir())]
    assert len(large) == FRAMES and np.array_equal(pictures(whole, 2 * WIDTH, 2 * HEIGHT), np.stack(large))
    assert times(whole) == times(source) and len(set(np.diff(times(source)).round(3))) > 1
    assert sound(whole) == sound(source)
    said = ffmpeg("-i", whole, "-map", "0:s", "-f", "srt", "-").decode()
    assert said == ffmpeg("-i", source, "-map", "0:s", "-f", "srt", "-").decode() and "Hello" in said
    asked = ["-show_entries", "format_tags=title:chapter=start_time,end_time:chapter_tags=title"]
    assert probed(whole, *asked) == probed(source, *asked)


@needs_ffmpeg
def test_two_ranks_write_what_one_does(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "large.mkv"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(words(source, student, out)) == 0
    assert "rank 1 of 2 had 2 of 4 parts" in capsys.readouterr().out and not out.exists()
    monkeypatch.setenv("RANK", "0")
    assert cli.main(words(source, student, out)) == 0
    assert out.read_bytes() == whole.read_bytes() and [path.name for path in tmp_path.iterdir()] == [out.name]


@needs_ffmpeg
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_job_killed_at_random_moments_writes_the_same_bytes(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
    kills: int,
) -> None:
    out = tmp_path / "large.mkv"

    def ended() -> bool:
        if not out.exists():
            return False
        assert out.read_bytes() == whole.read_bytes()
        out.unlink()
        return True

    kill(words(source, student, out), Path(f"{out}.parts") / ".pack", kills, ended, within_sec=0.3)
    assert cli.main(words(source, student, out)) == 0
    assert out.read_bytes() == whole.read_bytes() and not Path(f"{out}.parts").exists()


@needs_ffmpeg
@pytest.mark.parametrize("codec", ["h264", pytest.param("hevc", marks=pytest.mark.slow)])
def test_an_mp4_keeps_times_sound_and_colours_and_becomes_one(student: Path, codec: str, tmp_path: Path) -> None:
    colours = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    convert = f"drawbox=c=0x20C040:t=fill,{UNEVEN},scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,setsar=4/3"
    how = ["-vf", convert, *CLOCK, "-c:v", "libx264", "-crf", 1, *colours, "-c:a", "aac"]
    uneven = made(tmp_path / "uneven.nut", *how)  # ffmpeg evens the times of an .mp4 out
    ffmpeg("-i", uneven, "-c", "copy", "-video_track_timescale", 90000, source := tmp_path / "a.mp4")
    assert cli.main(words(source, student, out := tmp_path / "b.mp4", "--crf", "1", codec=codec)) == 0
    assert times(out) == times(source) and len(times(out)) == FRAMES and sound(out) == sound(source)
    asked = ["-select_streams", "v", "-show_entries"]
    for entry in ("color_space", "color_primaries", "color_transfer", "color_range", "sample_aspect_ratio"):
        assert probed(out, *asked, f"stream={entry}") == probed(source, *asked, f"stream={entry}")
    assert cli.main(words(source, student, exact := tmp_path / "exact.mkv")) == 0
    means = [pictures(path, 2 * WIDTH, 2 * HEIGHT).mean((1, 2)) for path in (out, exact)]
    assert np.abs(means[0] - means[1]).max() < 6  # colours are not those of another matrix or range
    assert cli.main(words(source, student, out, "--crf", "1", codec=codec)) == 0  # it is there, and ours


@needs_ffmpeg
def test_a_film_that_does_not_begin_at_zero_is_as_far_from_its_sound_as_in_a_copy(
    student: Path,
    tmp_path: Path,
) -> None:
    first = made(tmp_path / "a.ts", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", seconds=0.3)
    ffmpeg("-i", first, "-c", "copy", copy := tmp_path / "copy.mkv")
    assert cli.main(words(first, student, out := tmp_path / "out.mkv", codec="h264")) == 0
    assert times(out) == times(copy) and times(out)[0] != times(first)[0] and sound(out) == sound(copy)
    starts = ["-select_streams", "a", "-show_entries", "packet=pts_time"]
    ours, theirs = (np.array(probed(path, *starts), float) for path in (out, copy))
    assert np.abs(ours - theirs).max() < 0.0015  # Matroska counts in milliseconds


@needs_ffmpeg
def test_films_that_were_put_together_badly_are_refused_with_the_frame(
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    how = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac"]
    first = made(tmp_path / "a.ts", *how, "-output_ts_offset", 5).read_bytes()
    other = made(tmp_path / "b.ts", *how, "-output_ts_offset", 6, size="64x48").read_bytes()
    early = made(tmp_path / "c.ts", *how).read_bytes()
    (both := tmp_path / "both.ts").write_bytes(first + other)
    said = refusal(capsys, words(both, student, tmp_path / "both.mkv"))
    assert said.startswith(f"{both}: its frames change their size at frame ") and said.endswith("; cut it there")
    both.write_bytes(first + early)
    said = refusal(capsys, words(both, student, tmp_path / "both.mkv"))
    assert said.startswith(f"{both}: its times jump at frame ") and said.endswith(" OTHER.mkv), or cut it there")
    assert not (tmp_path / "both.mkv.parts").exists()


@needs_ffmpeg
def test_a_turned_film_comes_out_upright(student: Path, tmp_path: Path) -> None:
    plain = made(tmp_path / "plain.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-an", seconds=0.08)
    try:
        ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    except subprocess.CalledProcessError:  # older than 6.0
        ffmpeg("-i", plain, "-metadata:s:v", "rotate=90", "-c", "copy", tmp_path / "turned.mp4")
    assert cli.main(words(tmp_path / "turned.mp4", student, out := tmp_path / "large.mkv")) == 0
    size = "stream=width,height:stream_side_data=rotation"
    assert probed(out, "-select_streams", "v", "-show_entries", size) == [str(2 * HEIGHT), str(2 * WIDTH)]


@needs_ffmpeg
def test_films_go_into_a_folder_under_names_that_mean_nothing_to_ffmpeg(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["concat:a|b.mkv", "it's %d.mkv"]
    for name in names:
        shutil.copyfile(source, name)
    chosen = words(source, student, Path("out"))[2:]
    assert cli.main(["upscale", *names, *chosen]) == 0
    same = pictures(whole, 2 * WIDTH, 2 * HEIGHT)
    assert all(np.array_equal(pictures(Path(f"file:out/{name}"), 2 * WIDTH, 2 * HEIGHT), same) for name in names)


def refusal(capsys: pytest.CaptureFixture[str], given: list[str]) -> str:
    capsys.readouterr()
    assert cli.main(given) == 2
    return capsys.readouterr().err.removeprefix("sdtrain: ").removesuffix("\n")


@needs_ffmpeg
def test_what_ffmpeg_cannot_read_is_refused_before_anything_is_written(
    source: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, bad = tmp_path / "out.mkv", tmp_path / "bad.mp4"
    assert refusal(capsys, words(bad, student, out)) == f"{bad} cannot be read (No such file or directory); give a film"
    bad.write_bytes(b"no film" * 1000)
    said = refusal(capsys, words(bad, student, out))
    assert said.startswith(f"{bad} cannot be read as a film (") and said.endswith("); give one that ffmpeg plays")
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.1", "-c:a", "aac", bad)
    said = refusal(capsys, words(bad, student, out))
    assert said == f"{bad} has no moving picture that ffmpeg knows; give a film"
    made(bad, "-c:v", "libx264", size="800x600", seconds=0.04)
    said = refusal(capsys, words(bad, student, out, "--max-image-mb", "1"))
    assert said == (f"{bad} has frames of 800x600 pixels; a picture may have 67,108,864 and take 1 MB (--max-image-mb)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.mp4"]


@needs_ffmpeg
@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile film.mkv\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfilm.mkv\n#EXT-X-ENDLIST\n",
    ],
    ids=["concat", "hls"],
)
def test_a_list_of_other_files_is_no_film(
    source: Path,
    student: Path,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copyfile(source, tmp_path / "film.mkv")
    (bad := tmp_path / "bad.mp4").write_text(text)
    said = refusal(capsys, words(bad, student, tmp_path / "out.mkv"))
    assert said == (
        f"{bad} cannot be read as a film (its format is none that ffmpeg may open here); give one that ffmpeg plays"
    )


@needs_ffmpeg
def test_a_film_that_ends_too_early_is_enlarged_as_far_as_it_goes_and_that_is_said(
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = made(tmp_path / "cut.mkv", "-c:v", "libx264", "-g", 4, "-c:a", "flac")
    data = cut.read_bytes()
    cut.write_bytes(data[: len(data) * 2 // 3])
    assert cli.main(words(cut, student, out := tmp_path / "out.mkv")) == 0
    assert "its decoder complained" in capsys.readouterr().err
    assert 0 < len(times(out)) < FRAMES and len(times(out)) == len(times(cut))


@needs_ffmpeg
def test_what_a_result_cannot_be_is_said_before_the_work_begins(
    source: Path,
    student: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sdtrain.commands import upscale_film

    monkeypatch.setattr(upscale_film, "encode", lambda *_: pytest.fail("the work was begun"))
    out, folder = tmp_path / "out.mkv", tmp_path / "folder"
    folder.mkdir()
    strange = made(tmp_path_factory.mktemp("strange") / "strange.mkv", "-c:v", "ffv1", "-c:a", "wmav2")
    said = refusal(capsys, words(strange, student, out.with_suffix(".mp4"), codec="h264"))
    assert said.startswith("a .mp4 film cannot hold these pictures with the sound and subtitles of ")
    assert said.endswith("; name the result .mkv, or choose another --codec")
    said = refusal(capsys, words(source, student, out, "--scale", "1.04", codec="h264"))
    assert said.endswith("50x33 pixels, and h264 takes even numbers alone; choose another --scale, or --codec ffv1")
    with monkeypatch.context() as patched:
        patched.setattr(upscale_film, "MAX_FRAME_BYTES", 3 * 96 * 64)
        said = refusal(capsys, words(source, student, out))
    assert said.endswith("96x64 pixels, more than ffmpeg takes in one frame; choose a smaller --scale")
    said = refusal(capsys, words(source, student, out.with_suffix(".avi")))
    assert said.endswith("out.avi: name one result .mkv or .mp4, or give a folder for all of them")
    said = refusal(capsys, ["upscale", str(source), str(student), *words(source, student, folder)[2:]])
    assert said == f"{student} is no film, but {source} is one; give films and pictures in two commands"
    said = refusal(capsys, ["upscale", str(source), str(source), *words(source, student, folder)[2:]])
    assert said == "two of the films have one name; give them in two commands with other folders"
    said = refusal(capsys, words(source, student, out, "--crf", "52"))
    assert said == "--crf 52 --part 4: a quality from 0 to 51, and parts of at least 1 frame"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not list(folder.iterdir())
    out.write_text("mine")
    said = refusal(capsys, words(source, student, out))
    assert said == f"{out} is there already, and not what this command makes; delete it, or choose another --out"
    assert out.read_text() == "mine"


@needs_ffmpeg
def test_parts_of_another_command_are_left_as_they_are(
    source: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out.mkv"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words(source, student, out)) == 0
    said = refusal(capsys, words(source, student, out, codec="h264"))
    assert said == f"{out}.parts was begun with other choices; delete it, or choose another --out"


@needs_ffmpeg
def test_a_frame_that_cannot_be_enlarged_is_named(
    source: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sdtrain.commands import upscaler

    monkeypatch.setattr(upscaler, "available_bytes", lambda: 1)
    said = refusal(capsys, words(source, student, out := tmp_path / "out.mkv"))
    assert said.startswith(f"{source}, frame 0: its result of 96x64 pixels needs 0 MB of memory, 0 MB are free")
    assert not out.exists() and not list(Path(f"{out}.parts", ".pack").glob("*.nut"))


def test_programs_that_are_missing_are_named(
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    film.programs.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refusal(capsys, words(tmp_path / "film.mp4", student, tmp_path / "out.mkv"))
    assert said == (
        "films are read and written by the programs ffmpeg and ffprobe, and ffmpeg is not on this machine; "
        "install it (apt install ffmpeg), or give a folder of frames"
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function from a size to a folder that holds no more."""
    places: list[Path] = []

    def mounted(size: str) -> Path:
        (place := tmp_path / f"disk{len(places)}").mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("this machine does not allow mounting")
        places.append(place)
        return place

    yield mounted
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


@needs_ffmpeg
@pytest.mark.parametrize("share", [0.6, 1.5], ids=["for a part", "for the whole"])
def test_a_disk_that_is_full_ends_in_one_sentence_and_the_same_command_goes_on(
    student: Path,
    share: float,
    tmp_path: Path,
    disk: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    noise = ["-vf", "noise=alls=100:allf=t", "-c:v", "ffv1", "-pix_fmt", "bgr0", "-an"]
    source = made(tmp_path / "noise.mkv", *noise, seconds=0.4, size="200x100")
    assert cli.main(words(source, student, plain := tmp_path / "plain.mkv")) == 0
    place = disk(str(int(plain.stat().st_size * share)))
    out = place / "plain.mkv"
    said = refusal(capsys, words(source, student, out))
    assert said == (
        f"--out {out}: cannot be written (No space left on device); mend that, and the same command goes on there"
    )
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
    assert cli.main(words(source, student, out)) == 0
    assert out.read_bytes() == plain.read_bytes()
