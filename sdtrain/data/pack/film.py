"""Films, written through ffmpeg: parts of a film from frames and their times, and a film from parts and its source.

Frames go to the encoder as an uncompressed Matroska stream, which unlike bare frames can say when each is shown: a
variable frame rate stays what it was. Parts keep the time base of their source (NUT), and are joined without being
encoded again. On one machine, with one version of ffmpeg, the same frames become the same bytes.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from sdtrain.data.read.budget import LIMITS, PictureLimits
from sdtrain.data.read.film import MATRICES, QUIET, Film, Program, input_words, programs
from sdtrain.errors import ConfigError

ENCODERS = {
    "h264": ("-c:v", "libx264", "-preset", "medium", "-pix_fmt", "yuv420p"),
    "hevc": ("-c:v", "libx265", "-preset", "medium", "-pix_fmt", "yuv420p"),
    "ffv1": ("-c:v", "ffv1", "-level", "3", "-pix_fmt", "bgr0"),
}
LOSSLESS = ("ffv1",)
CONTAINERS = {".mkv": "matroska", ".mp4": "mp4"}
TEXTS = {".mkv": "srt", ".mp4": "mov_text"}  # what subtitles in letters become, where they cannot stay as they are
FOREIGN = {".mkv": ("mov_text",), ".mp4": ("subrip", "ass", "ssa", "webvtt", "text")}
MADE_WITH = ("encoding_tool", "made_with")  # mp4 keeps the one, Matroska the other
NS = 10**9
MAX_FRAME_BYTES = 1 << 28  # of one block, as ffmpeg reads it
SAME_BYTES = ("-fflags", "+bitexact", "-flags:v", "+bitexact")  # no versions, no times, no random numbers


@dataclass(frozen=True)
class Style:
    """Frames of `width` x `height`, by one of ENCODERS; `crf` is their quality unless it is lossless."""

    width: int
    height: int
    codec: str
    crf: int

    @property
    def even(self) -> bool:
        """Whether colour of half the resolution fits."""
        return self.codec in LOSSLESS or self.width % 2 == self.height % 2 == 0


@dataclass(frozen=True)
class Form:
    """Into what parts are joined: one of CONTAINERS, with a note of what made it; `more` words for ffmpeg."""

    codec: str
    container: str
    made_with: str
    limits: PictureLimits = LIMITS
    more: tuple[str, ...] = ()


class Encoder:
    """A part of a film at `path`, frame by frame; complete when the block ends. Raises OSError for a full disk,
    ConfigError for an encoder that fails."""

    def __init__(self, path: Path, film: Film, style: Style) -> None:
        stream = ["-f", "matroska", "-i", "pipe:0"]
        base = f"{film.time_base.numerator}/{film.time_base.denominator}"
        words = [*video_words(film, style), "-enc_time_base", base, *SAME_BYTES, "-f", "nut", f"file:{path}"]
        command = [programs()[0], *QUIET, "-xerror", *stream, *words]
        self._program = Program(command, stdin=subprocess.PIPE)
        self._write(head(style.width, style.height, film.rate))

    def add(self, seconds: Fraction, values: Any) -> None:
        """A frame, uint8 [H, W, 3], shown so long after the first one."""
        self._write(cluster(round(seconds * NS), values.tobytes()))

    def _write(self, data: bytes) -> None:
        try:
            self._program.input.write(data)
        except BrokenPipeError:
            self._ended()

    def _ended(self) -> None:
        code = self._program.end()
        if self._program.disk_is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if code:
            raise ConfigError(f"ffmpeg could not encode the film: {self._program.reason}; try another --codec")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._program as program:
            if kind is None:
                try:
                    program.input.close()
                except BrokenPipeError:
                    pass  # the end says why
                self._ended()


def video_words(film: Film, style: Style) -> list[str]:
    """Encoder, quality, and what the values mean: matrix, primaries, transfer, range and shape of a pixel."""
    shape = f"setsar={film.aspect.numerator}/{film.aspect.denominator}"
    if style.codec in LOSSLESS:
        return ["-vf", shape, *ENCODERS[style.codec]]
    named = {"colorspace": film.matrix, "color_range": "tv"}
    named |= {"color_trc" if key == "color_transfer" else key: value for key, value in film.colour.items()}
    flags = "flags=bicubic+accurate_rnd+full_chroma_int"
    chain = f"scale=out_color_matrix={MATRICES[film.matrix]}:out_range=tv:{flags},format=yuv420p,{shape}"
    tags = [word for key, value in named.items() for word in (f"-{key}", value)]
    quiet = ["-x265-params", "log-level=error"] if style.codec == "hevc" else []  # it has a voice of its own
    return ["-vf", chain, *ENCODERS[style.codec], *quiet, "-crf", str(style.crf), *tags]


def join(parts: Sequence[tuple[Path, Fraction]], first: Fraction, film: Film, to: Path, form: Form) -> None:
    """Write `parts` (files beside `to`, seconds) with sound, subtitles, chapters and titles of `film` to `to`.

    `first`: when the first frame is shown in the film [s]. Raises OSError for a full disk, ConfigError for what a
    container cannot hold.
    """
    listing = to.with_name(f"{to.name}.txt")
    lines = (f"file {path.name}\nduration {float(seconds):.9f}\n" for path, seconds in parts)
    listing.write_text("ffconcat version 1.0\n" + "".join(lines))
    joined = ["-itsoffset", f"{float(first):.9f}", "-f", "concat", "-protocol_whitelist", "file", "-i"]
    inputs = [*joined, f"file:{listing}", *input_words(film.path, form.limits)]
    made = [word for key in MADE_WITH for word in ("-metadata", f"{key}={form.made_with}")]
    tag = ["-tag:v", "hvc1"] if (form.codec, form.container) == ("hevc", ".mp4") else []  # players ask for it
    words = [*taken_words(film, form.container), *made, *tag, *SAME_BYTES[:2]]
    command = [programs()[0], *QUIET, "-copyts", *inputs, *words, "-output_ts_offset", f"{-film.start:.9f}"]
    command += [*form.more, "-f", CONTAINERS[form.container], f"file:{to}"]
    try:
        with Program(command) as program:
            code = program.end()
    finally:
        listing.unlink(missing_ok=True)
    if program.disk_is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if code:
        others = " or ".join(name for name in CONTAINERS if name != form.container)
        raise ConfigError(
            f"a {form.container} film cannot hold these pictures with the sound and subtitles of {film.path} "
            f"({program.reason}); name the result {others}, or choose another --codec"
        )


def taken_words(film: Film, container: str) -> list[str]:
    """The pictures of the first input; sound, subtitles, fonts, chapters and titles of the second."""
    texts = [TEXTS[container] if codec in FOREIGN[container] else "copy" for codec in film.subtitles]
    words = ["-map", "0:v:0", "-map", "1:a?", "-map", "1:s?", *(["-map", "1:t?"] if container == ".mkv" else [])]
    words += ["-c", "copy", *(word for n, codec in enumerate(texts) for word in (f"-c:s:{n}", codec))]
    words += ["-map_metadata", "1", "-map_metadata:s:v:0", "1:s:V:0", "-map_chapters", "1"]
    base = film.time_base.denominator if film.time_base.numerator == 1 else 0
    scale = ["-video_track_timescale", str(base)] if container == ".mp4" and base else []
    return [*words, "-metadata:s:v:0", "rotate=", *scale]


def num_frames(path: Path) -> int:
    """Of a film that was written here, without decoding it."""
    asked = ["-select_streams", "V:0", "-count_packets", "-show_entries", "stream=nb_read_packets"]
    command = [programs()[1], "-v", "error", *asked, "-of", "default=nk=1:nw=1", "-i", f"file:{path}"]
    with Program(command, stdout=subprocess.PIPE) as program:
        said = program.output.read().strip()
        program.end()
    return int(said) if said.isdigit() else 0


# A Matroska stream of uncompressed RGB. Times are whole nanoseconds; sizes are written in eight bytes.


def head(width: int, height: int, rate: Fraction) -> bytes:
    """What comes before the first frame. `rate`: frames a second on the average, which encoders plan with."""
    kind = element("4282", b"matroska") + element("4287", number(4)) + element("4285", number(2))
    size = element("B0", number(width)) + element("BA", number(height)) + element("2EB524", b"RGB\x18")
    track = element("D7", number(1)) + element("73C5", number(1)) + element("83", number(1))
    track += element("23E383", number(round(NS / rate))) + element("86", b"V_UNCOMPRESSED") + element("E0", size)
    endless = bytes.fromhex("1853806701FFFFFFFFFFFFFF")
    scale = element("1549A966", element("2AD7B1", number(1)))
    return element("1A45DFA3", kind) + endless + scale + element("1654AE6B", element("AE", track))


def cluster(time_ns: int, frame: bytes) -> bytes:
    return element("1F43B675", element("E7", number(time_ns)) + element("A3", b"\x81\0\0\x80" + frame))


def element(name: str, data: bytes) -> bytes:
    return bytes.fromhex(name) + (len(data) | 1 << 56).to_bytes(8, "big") + data


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")
