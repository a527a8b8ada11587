"""Films, read through the programs ffmpeg and ffprobe.

A film is not trusted: the programs get one local file by name, never through a shell; they take no format that names
other files (playlists, concat, HLS, DASH) and no protocol but `file`, and decode no frame of more pixels than a picture
may have. Frames come upright, as RGB of 8 bits, in the order they are shown.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import IO, Any

from sdtrain.data.read.budget import LIMITS, PictureLimits
from sdtrain.errors import ConfigError, DataError
from sdtrain.files import MAX_JSON, parse_json, require_regular
from sdtrain.terminal import clip, printable

FORMATS = (
    *("asf", "avi", "dv", "flv", "gxf", "ivf", "matroska", "mov", "mpeg", "mpegts", "mpegvideo", "mxf", "nsv", "nut"),
    *("ogg", "rm", "webm", "yuv4mpegpipe"),
)
QUIET = ("-v", "error", "-nostdin", "-y")
LINE = 4096
LONGEST_SEC = 86_400  # from a frame to the next
ASKED = (
    "stream=codec_type,codec_name,width,height,pix_fmt,bits_per_raw_sample,time_base,avg_frame_rate,"
    "sample_aspect_ratio,color_space,color_transfer,color_primaries,field_order:stream_disposition=attached_pic:"
    "stream_side_data=rotation:stream_tags=rotate:format=start_time:format_tags"
)
MATRICES = {
    "bt709": "bt709",
    "bt470bg": "bt470",
    "smpte170m": "smpte170m",
    "smpte240m": "smpte240m",
    "fcc": "fcc",
    "bt2020nc": "bt2020",
}  # as streams and as the filter `scale` call them


@dataclass(frozen=True)
class Film:
    """What the header says of the first picture stream. Sizes are of upright frames, `start` in seconds."""

    path: Path
    width: int
    height: int
    time_base: Fraction
    rate: Fraction
    """Frames a second on the average."""
    start: float
    aspect: Fraction
    """Of a pixel, width / height."""
    is_yuv: bool
    matrix: str
    """A key of MATRICES: the one that is named, or what players assume."""
    colour: dict[str, str]
    """Transfer and primaries, where they are named."""
    subtitles: tuple[str, ...]
    """Codec of each stream."""
    notes: tuple[str, ...]
    """What the result will not have, or be good with."""
    tags: dict[str, str]


@cache
def programs() -> tuple[str, str]:
    """Paths of ffmpeg and ffprobe. Raises ConfigError where one is not there."""
    found = [shutil.which(name) for name in ("ffmpeg", "ffprobe")]
    for name, path in zip(("ffmpeg", "ffprobe"), found):
        if path is None:
            raise ConfigError(
                f"films are read and written by the programs ffmpeg and ffprobe, and {name} is not on this machine; "
                "install it (apt install ffmpeg), or give a folder of frames"
            )
    return str(found[0]), str(found[1])


@cache
def version() -> str:
    """The first line that ffmpeg says of itself."""
    done = subprocess.run([programs()[0], "-version"], capture_output=True, stdin=subprocess.DEVNULL)
    return printable(done.stdout.decode(errors="replace").split("\n")[0])


def input_words(path: Path, limits: PictureLimits) -> list[str]:
    """What stands before and in the place of the name, so that it is neither an option nor an address."""
    safe = ["-protocol_whitelist", "file", "-format_whitelist", ",".join(FORMATS), "-max_pixels", str(limits.pixels)]
    return [*safe, "-i", f"file:{path}"]


def probe(path: Path, limits: PictureLimits = LIMITS) -> Film:
    """Read the header. Raises DataError for what is no film, or larger than `limits`; ConfigError without ffprobe."""
    try:
        require_regular(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); give a film") from None
    with Program(_probing(path, limits, ["-show_entries", ASKED, "-of", "json"]), stdout=subprocess.PIPE) as program:
        said = program.output.read(MAX_JSON + 1)
        if len(said) > MAX_JSON or program.end():
            raise DataError(f"{path} cannot be read as a film ({program.reason}); give one that ffmpeg plays")
    try:
        found = parse_json(said)
        film = _film(path, found["streams"], found["format"])
    except (ValueError, LookupError, StopIteration, TypeError, ZeroDivisionError, OverflowError, AttributeError):
        raise DataError(f"{path} has no moving picture that ffmpeg knows; give a film") from None
    pixels = film.width * film.height
    if pixels > limits.pixels or 3 * pixels > limits.num_bytes:
        raise DataError(
            f"{path} has frames of {film.width}x{film.height} pixels; a picture may have {limits.pixels:,} and "
            f"take {limits.megabytes} MB (--max-image-mb)"
        )
    return film


def _probing(path: Path, limits: PictureLimits, asked: Sequence[str]) -> list[str]:
    return [programs()[1], "-v", "error", *asked, *input_words(path, limits)]


def _film(path: Path, streams: list[dict[str, Any]], form: dict[str, Any]) -> Film:
    stream = next(s for s in streams if s["codec_type"] == "video" and not s["disposition"]["attached_pic"])
    turned = [side.get("rotation", 0) for side in stream.get("side_data_list", ())]
    turned.append(stream.get("tags", {}).get("rotate", 0))
    on_its_side = any(round(float(angle)) % 180 == 90 for angle in turned)
    width, height = int(stream["width"]), int(stream["height"])
    aspect = Fraction(stream.get("sample_aspect_ratio", "1:1").replace(":", "/").replace("0/1", "1/1"))
    if on_its_side:
        width, height, aspect = height, width, 1 / aspect
    matrix = stream.get("color_space", "")
    rate = stream["avg_frame_rate"]
    if min(width, height) < 1 or Fraction(stream["time_base"]) <= 0:
        raise ValueError("no picture has no pixels, and no clock stands still")
    return Film(
        path=path,
        width=width,
        height=height,
        time_base=Fraction(stream["time_base"]),
        rate=Fraction(25 if rate.startswith("0/") else rate),
        start=float(form.get("start_time", 0)),
        aspect=aspect,
        is_yuv=stream.get("pix_fmt", "").startswith(("yuv", "nv", "p0", "p2", "p4", "uyvy", "vyuy", "y2")),
        matrix=matrix if matrix in MATRICES else "bt709" if min(width, height) >= 720 else "smpte170m",
        colour={key: stream[key] for key in ("color_transfer", "color_primaries") if stream.get(key, "") in COLOURS},
        subtitles=tuple(str(s.get("codec_name")) for s in streams if s["codec_type"] == "subtitle"),
        notes=tuple(_notes(stream)),
        tags={str(key): str(value) for key, value in form.get("tags", {}).items()},
    )


COLOURS = (
    *("bt709", "bt470m", "bt470bg", "smpte170m", "smpte240m", "film", "bt2020", "smpte428", "smpte431", "smpte432"),
    *("gamma22", "gamma28", "linear", "iec61966-2-1", "bt2020-10", "bt2020-12", "smpte2084", "arib-std-b67"),
)


def _notes(stream: dict[str, Any]) -> Iterator[str]:
    bits = str(stream.get("bits_per_raw_sample", ""))
    if bits.isdigit() and int(bits) > 8:
        yield f"it has {bits} bits a channel, the result has 8"
    if stream.get("field_order", "progressive") not in ("progressive", "unknown"):
        yield "it is interlaced, which networks of whole frames enlarge badly; deinterlace it first (ffmpeg -vf bwdif)"


def frame_times(film: Film, limits: PictureLimits = LIMITS) -> tuple[list[int], int]:
    """When each frame is shown, in units of the time base, rising; and how many complaints the decoder had.

    All of the film is decoded for it. Raises DataError where none can be, or where frames change size.
    """
    key, times, missing, sizes = b"best_effort_timestamp=", list[int](), False, set[bytes]()
    asked = ["-select_streams", "V:0", "-show_entries", "frame=best_effort_timestamp,width,height"]
    asked += ["-of", "default=noprint_wrappers=1"]
    with Program(_probing(film.path, limits, asked), stdout=subprocess.PIPE) as program:
        for line in program.output:
            if line.startswith(key):
                value = line[len(key) :].strip()
                missing |= value == b"N/A"
                times.append(0 if missing else _after(times, int(value), film))
            elif line.startswith((b"width=", b"height=")):
                sizes.add(line)
            if len(sizes) > 2:
                raise DataError(f"{film.path}: its frames change their size at frame {len(times) - 1}; cut it there")
        program.end()
    if not times:
        raise DataError(f"{film.path} has no frame that can be decoded ({program.reason}); give another film")
    step = max(round(1 / (film.rate * film.time_base)), 1)
    return [n * step for n in range(len(times))] if missing else times, program.num_complaints


def _after(times: list[int], time: int, film: Film) -> int:
    """The time of the next frame, later than all before. Raises DataError where it cannot be meant as one film."""
    if times and not -1 < (time - times[-1]) * film.time_base < LONGEST_SEC:
        raise DataError(
            f"{film.path}: its times jump at frame {len(times)}, as where films were put together; mend them first "
            "(ffmpeg -i FILM -c copy OTHER.mkv), or cut it there"
        )
    return max(time, times[-1] + 1) if times else time


def frames(film: Film, first: int, last: int, limits: PictureLimits = LIMITS) -> Iterator[Any]:
    """Frames `first` to `last` - 1 as uint8 arrays [H, W, 3]. Raises DataError for one that is not there."""
    import numpy as np

    matrix = f":in_color_matrix={MATRICES[film.matrix]}" if film.is_yuv else ""
    scale = f"scale={film.width}:{film.height}:flags=bicubic+accurate_rnd+full_chroma_int{matrix}"
    # frame n at second n / 25, so that none is dropped or shown twice to keep the rate
    chain = f"trim=start_frame={first}:end_frame={last},settb=1/25,setpts=N,{scale},format=rgb24"
    words = ["-map", "0:V:0", "-vf", chain, "-r", "25", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    command = [programs()[0], *QUIET, *input_words(film.path, limits), *words]
    size = film.width * film.height * 3
    with Program(command, stdout=subprocess.PIPE) as program:
        for n in range(first, last):
            data = program.output.read(size)
            if len(data) < size:
                program.end()
                raise DataError(f"{film.path}: frame {n} cannot be decoded ({program.reason}); cut the film before it")
            yield np.frombuffer(data, np.uint8).reshape(film.height, film.width, 3)


class Program:
    """A running program whose complaints are listened to; one that has not ended when the block does is killed."""

    def __init__(
        self, command: Sequence[str], stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
    ) -> None:
        stderr = subprocess.PIPE
        # in a session of its own it does not see Ctrl-C, which this process answers
        self.process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        self.num_complaints, self._last = 0, deque[bytes](maxlen=8)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        complaints = self.process.stderr
        assert complaints is not None
        for line in iter(lambda: complaints.readline(LINE), b""):
            self.num_complaints += 1
            self._last.append(line)

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def input(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def reason(self) -> str:
        """The first of its last complaints."""
        said = [re.sub(r"^\[.*? @ 0x\w+\] ", "", line.decode(errors="replace")).strip() for line in self._last]
        if any("whitelist" in line for line in said):
            return "its format is none that ffmpeg may open here"
        last = next((line for line in said if line), f"ffmpeg ended with {self.process.returncode}")
        return clip(printable(last), 200)

    @property
    def disk_is_full(self) -> bool:
        return any(b"No space left" in line for line in self._last)

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.process.wait()
        self._listener.join()
        return code

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what is buffered for a program that has gone
                    pipe.close()
