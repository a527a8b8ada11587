"""Damaged films, where ffmpeg is installed."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from random import Random

from fuzz.harness import Inputs
from fuzz.mutate import damaged
from sdtrain.data.read.film import frame_times, frames, probe

LISTS = (
    b"ffconcat version 1.0\nfile ../../canary\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://10.255.255.1/x.ts\n#EXT-X-ENDLIST\n",
    b'<?xml version="1.0"?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>',
)


@cache
def film(container: str) -> bytes:
    inputs = ["-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=0.4", "-f", "lavfi", "-i", "sine=d=0.4"]
    same = ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact"]
    how = ["-c:v", "mpeg4", "-c:a", "aac", *same, "-f", container]
    if container == "mp4":
        how += ["-movflags", "frag_keyframe+empty_moov"]  # a plain one cannot be written to a pipe
    return subprocess.run(["ffmpeg", "-v", "error", *inputs, *how, "-"], capture_output=True, check=True).stdout


def make_film(random: Random, folder: Path) -> Path:
    path = folder / random.choice(("film.mp4", "film.mkv", "-y.mp4", "concat:a|b.mp4", "%d.mp4"))
    whole = film(random.choice(("mp4", "matroska", "mpegts", "avi"))) if random.random() < 0.9 else random.choice(LISTS)
    path.write_bytes(damaged(random, whole))
    return path


def use_film(path: Path) -> int:
    """As many frames as it has times."""
    found = probe(path)
    times, _ = frame_times(found)
    assert sum(1 for _ in frames(found, 0, len(times))) == len(times) and times == sorted(set(times))
    return len(times)


CLASSES = (
    {"films": Inputs(make_film, use_film, seconds=30.0)} if shutil.which("ffmpeg") and shutil.which("ffprobe") else {}
)
