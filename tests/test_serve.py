"""`sdtrain serve` takes files from anyone who reaches its page. Without these it could show other pictures than the
commands write, hand out files of the machine, answer other web pages, or be stopped for good by one upload.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import browser
import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from sdtrain import cli
from sdtrain.commands import source
from sdtrain.errors import ConfigError, WeightsError
from sdtrain.interop.network import Network, save_network
from sdtrain.serve import server
from sdtrain.serve.app import ALWAYS, QUEUE, Page
from sdtrain.serve.process import NetworkProcess, Refused
from sdtrain.serve.worker import maker_of

MAX_SECONDS = 3
STYLES = {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8, "mapping_layers": 1}
TOKEN = "a-token"


def saved(folder: Path, kind: str, options: dict[str, Any], player: Any = "Generator", **more: Any) -> Path:
    """The file of a network with random weights, whose layers have noise where they can."""
    blank = Network(kind=kind, player=player, role="G_ema", state={}, options=options, **more)
    torch.manual_seed(0)
    state = blank.fresh().state_dict()
    for name in (name for name in state if name.endswith("noise_strength")):
        state[name].fill_(0.3)
    save_network(dataclasses.replace(blank, state=state), folder / kind)
    return folder / f"{kind}.safetensors"


def png(*shape: int) -> bytes:
    """A picture of noise [H, W, C]."""
    return encoded(np.random.default_rng(0).integers(0, 256, shape, np.uint8), "PNG")


def encoded(values: np.ndarray, form: str, **more: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, form, **more)
    return out.getvalue()


class Served:
    """`sdtrain serve` as a process, with an empty folder to work in and another for temporary files."""

    def __init__(self, place: Path, *words: object) -> None:
        self.place = place
        for name in ("cwd", "tmp"):
            (place / name).mkdir(parents=True)
        env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "tmp")}
        opener = place / "browser"
        opener.write_text('#!/bin/sh\necho "$1" > "$0.opened"\n')
        opener.chmod(0o755)
        env["BROWSER"] = f"{opener} %s"
        command = [sys.executable, "-m", "sdtrain.cli", "serve", *map(str, words), "--device", "cpu", "--open"]
        self.log = (place / "log").open("w")
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = subprocess.Popen(command, cwd=place / "cwd", env=env, start_new_session=True, **pipes)

    @property
    def address(self) -> str:
        if not hasattr(self, "line"):
            self.line = self.process.stdout.readline()  # type: ignore[union-attr]
        found = re.search(r" is at (http://127\.0\.0\.1:\d+/[\w-]{32}/) until Ctrl-C\n$", self.line)
        assert found, (self.line, (self.place / "log").read_text())
        return found[1]

    @property
    def port(self) -> int:
        return int(self.address.split("/")[2].split(":")[1])

    @property
    def token(self) -> str:
        return self.address.split("/")[3]

    @property
    def children(self) -> list[int]:
        assert self.address
        done = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in done.stdout.split()]

    def make(self, body: bytes = b"", **settings: object) -> tuple[int, bytes, dict[str, str]]:
        return ask(self.port, "POST", f"/{self.token}/make?{urlencode(settings)}", body)

    def refusal(self, body: bytes = b"", **settings: object) -> tuple[int, str]:
        status, said, _ = self.make(body, **settings)
        return status, said.decode()

    def end(self, number: int = signal.SIGINT) -> int:
        """Its exit code after a signal to all of its group, as a terminal sends it to what runs in the foreground."""
        assert self.address
        os.killpg(self.process.pid, number)
        code = self.process.wait(timeout=20)
        self.process.stdout.close()  # type: ignore[union-attr]
        self.log.close()
        return code


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """(status, body, headers by lower-case name) of one request, whose path is sent as it is."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        line.request(method, path, body, headers)
        answer = line.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        line.close()


def gone(pid: int) -> bool:
    """Whether a process ends within five seconds, or waits only to be noted by its parent."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if state.strip()[:1] in ("", "Z"):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A network that takes long for large pictures, and a generator with styles and three classes."""
    folder = tmp_path_factory.mktemp("networks")
    slow = saved(folder, "srvgg", {"num_feat": 64, "num_conv": 16, "upscale": 2})
    return {"pictures": slow, "latents": saved(folder, "stylegan2", STYLES, resolution=16, num_classes=3)}


@pytest.fixture(scope="module")
def both(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    place = tmp_path_factory.mktemp("served")
    limits = ["--max-seconds", MAX_SECONDS, "--max-upload-mb", 1, "--max-image-mb", 64]
    found = {name: Served(place / name, file, *limits) for name, file in files.items()}
    yield found
    assert [one.end() for one in found.values()] == [130, 130]
    said = [(place / name / "log").read_text() for name in found]
    assert said == ["sdtrain: the page is closed\n"] * 2, "nothing else is told, and no fault of ours was"


@pytest.fixture
def one(files: dict[str, Path], tmp_path: Path) -> Iterator[Served]:
    """A server of its own for a test that ends it."""
    served = Served(tmp_path / "served", files["pictures"])
    yield served
    served.process.kill()
    served.process.wait()


@pytest.fixture
def pictures(both: dict[str, Served]) -> Served:
    return both["pictures"]


@pytest.fixture
def latents(both: dict[str, Served]) -> Served:
    return both["latents"]


# The same pictures as the commands'

EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned
UPLOADS = {
    "rgb": png(20, 30, 3),
    "alpha": png(12, 9, 4),
    "turned.jpg": encoded(np.arange(768, dtype=np.uint8).reshape(16, 16, 3), "JPEG", exif=EXIF),
    "16 bits": encoded(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257, "PNG"),
}


SLOW = {"16 bits"}  # torchvision is loaded for it


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in UPLOADS])
def test_the_page_shows_the_very_file_that_upscale_writes(
    pictures: Served, files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "in.png").write_bytes(UPLOADS[name])
    words = ["upscale", tmp_path / "in.png", "--model", files["pictures"], "--out", tmp_path / "out", "--device", "cpu"]
    torch.set_num_threads(1)
    assert cli.main([str(word) for word in words]) == 0
    status, made, headers = pictures.make(UPLOADS[name])
    assert status == 200 and made == (tmp_path / "out" / "in.png").read_bytes()
    told = json.loads(headers["made"])
    assert told["size"] == [2 * side for side in told["before"]] == [*Image.open(io.BytesIO(made)).size]
    assert headers["content-type"] == "image/png" and told["ms"] >= 0


def test_a_browser_that_cannot_show_an_upload_is_given_it_as_png(pictures: Served) -> None:
    values = np.random.default_rng(1).integers(0, 256, (6, 5, 3), np.uint8)
    status, made, _ = pictures.make(encoded(values, "TIFF"), before=1)
    assert status == 200 and (np.asarray(Image.open(io.BytesIO(made))) == values).all()


def sampled(out: Path, *words: object) -> Path:
    torch.set_num_threads(1)
    assert cli.main(["sample", *map(str, words), "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"latent": 3}, []),
        ({"latent": 3, "seed": 5, "class": 2}, ["--seed", 5, "--class", 2]),
        ({"latent": 3, "truncation": 0.5, "class": 1}, ["--truncation", 0.5, "--class", 1]),
    ],
)
def test_latents_are_the_very_files_that_sample_writes(
    latents: Served, files: dict[str, Path], tmp_path: Path, settings: dict[str, Any], words: list[object]
) -> None:
    label = [] if "class" in settings else ["--class", 0]
    out = sampled(tmp_path / "out", files["latents"], "--indices", 3, *words, *label)
    status, made, headers = latents.make(**settings)
    assert status == 200 and made == (out / "000003.png").read_bytes()
    assert json.loads(headers["made"])["size"] == [16, 16]


def test_a_walk_is_the_interpolation_that_sample_writes(
    latents: Served, files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--indices", "3,8", "--interpolate", 4, "--batch", 1, "--class", 1, "--seed", 2]
    frames = sampled(tmp_path / "out", files["latents"], *words) / "interpolation"
    walk = {"seed": 2, "class": 1, "latent": 3, "to": 8}
    made = [latents.make(**walk, share=share)[1] for share in (0, 0.25, 0.5, 0.75, 1)]
    assert made == [(frames / f"{number:04d}.png").read_bytes() for number in range(5)] and len(set(made)) == 5


OTHERS = {
    "rrdbnet": ({"num_feat": 4, "num_grow_ch": 2, "num_block": 1}, {}),
    "gcfsr": ({"narrow": 1 / 64, "num_style_feat": 8}, {"resolution": 32}),
    "fastgan": ({"z_dim": 8, "ngf": 2, "lite": True}, {"resolution": 256}),
    "r3gan": ({"z_dim": 4, "widths": [8, 8], "blocks": [1, 1], "groups": [2, 2]}, {"resolution": 8}),
    "stylenat": ({"style_dim": 8, "channel_max": 32, "mlp_layers": 1}, {"resolution": 16}),
}


def made_by(file: Path, data: bytes = b"", **settings: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """What is told of a network and of what it makes, and what it makes, in this process."""
    setup = {"path": str(file), "weights": "ema", "device": "cpu", "max_image_mb": 64}
    maker = maker_of(setup)
    return maker.about(), *maker(settings, data)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_generator_gets_the_page_that_fits_it(tmp_path: Path, kind: str) -> None:
    options, more = OTHERS[kind]
    file = saved(tmp_path, kind, options, **more)
    about, told, made = made_by(file, png(8, 8, 3))
    if kind in ("rrdbnet", "gcfsr"):
        (tmp_path / "in.png").write_bytes(png(8, 8, 3))
        words = ["upscale", tmp_path / "in.png", "--model", file, "--out", tmp_path / "out", "--device", "cpu"]
        assert cli.main([str(word) for word in words]) == 0
        assert (about["does"], told["size"]) == ("pictures", [32, 32]) and ("factors" in about) == (kind == "gcfsr")
        assert made == (tmp_path / "out" / "in.png").read_bytes()
    else:
        out = sampled(tmp_path / "out", file, "--indices", 0)
        assert (about["does"], about["truncation"], about["classes"]) == ("latents", False, [])
        assert made == (out / "000000.png").read_bytes()
        assert made_by(file, share="0.5", to="1")[2] != made


def test_the_factor_of_a_face_can_be_chosen(tmp_path: Path) -> None:
    file = saved(tmp_path, "gcfsr", OTHERS["gcfsr"][0], resolution=32)
    assert made_by(file, png(32, 32, 3), factor="8")[2] != made_by(file, png(32, 32, 3), factor="16")[2]
    with pytest.raises(ConfigError, match="^this picture cannot be used: a 32 px face is no reduction by 4 to 64"):
        made_by(file, png(32, 32, 3))


def test_classes_have_the_names_that_the_training_set_gives_them_and_numbers_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tmp_path, "stylegan2", STYLES, resolution=16, num_classes=2)
    assert made_by(file)[0]["classes"] == ["0", "1"]
    monkeypatch.setattr(source, "config_of", lambda path: argparse.Namespace(seed=7))
    names = {"label_names": ("cat", "<b>dog\x1b[2J")}
    monkeypatch.setattr(source.Source, "training_set", property(lambda self: type("Set", (), names)))
    assert made_by(file)[0]["classes"] == ["cat", "<b>dog\\x1b[2J"]
    assert made_by(file)[2] == made_by(file, seed="7")[2] != made_by(file, seed="0")[2], "the seed of the run"

    def absent(self: object) -> None:
        raise ConfigError("the shards are not here")

    monkeypatch.setattr(source.Source, "training_set", property(absent))
    assert made_by(file)[0]["classes"] == ["0", "1"]


# Hostile uploads


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../picture.png", png(8, 8, 3))
    return out.getvalue()


FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HOSTILE = {
    "HTML": (b"<!DOCTYPE html><script>alert(1)</script>", "not an image: it looks like HTML or XML"),
    "SVG": (SVG, "not an image: it looks like HTML or XML"),
    "zip": (zipped(), "not an image in a known format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    "nothing": (b"", "empty file"),
    "truncated": (png(64, 64, 3)[:5000], "truncated: "),
    "huge by its header": (png_of(100_000, 100_000, b""), "decompression bomb: "),
    "bomb": (png_of(8000, 8000, zlib.compress(bytes(8000 * 24001), 9)), "too large: 8000x8000 in mode RGB needs "),
    "too small": (png(2, 2, 3), "too small: 2x2 has a side under 4 pixels"),
    "animated": (encoded(np.zeros((8, 8), np.uint8), "GIF", save_all=True, append_images=FRAMES), "animated: 3 frames"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_in_one_sentence(pictures: Served, name: str) -> None:
    data, reason = HOSTILE[name]
    before = pictures.children
    status, said = pictures.refusal(data)
    assert status == 422 and said.startswith(f"this picture cannot be used: {reason}") and "\n" not in said
    assert pictures.children == before, "the process of the network has survived it"


@pytest.mark.parametrize("announced", [True, False])
def test_a_huge_upload_is_refused_before_it_is_read(pictures: Served, announced: bool) -> None:
    sentence = b"an upload may have 1 MB (--max-upload-mb); make it smaller"
    with socket.create_connection(("127.0.0.1", pictures.port), timeout=20) as line:
        how = f"Content-Length: {10**12}" if announced else "Transfer-Encoding: chunked"
        line.sendall(f"POST /{pictures.token}/make HTTP/1.1\r\nHost: localhost\r\n{how}\r\n\r\n".encode())
        if not announced:
            line.sendall(b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n5\r\n12345\r\n")
        answer = http.client.HTTPResponse(line)
        answer.begin()
        assert (answer.status, answer.read(), answer.getheader("connection")) == (413, sentence, "close")


SETTINGS = [
    (
        {"latent": "../../etc/passwd"},
        "latent is '../../etc/passwd', where a whole number from 0 to 2147483647 is meant",
    ),
    ({"latent": -1}, "latent is '-1', where a whole number from 0 to 2147483647 is meant"),
    ({"share": "nan"}, "share is 'nan', where a number from 0 to 1 is meant"),
    ({"class": 3}, "class is '3', where a whole number from 0 to 2 is meant"),
    ({"truncation": "1e400"}, "truncation is '1e400', where a number from -1 to 2 is meant"),
    ({"path": "/etc/passwd"}, "'path' is no setting of this page"),
    ({"seed\x1b[2J": 1}, "'seed\\\\x1b[2J' is no setting of this page"),
]


@pytest.mark.parametrize("settings, sentence", SETTINGS, ids=str)
def test_a_setting_that_cannot_be_is_refused_with_its_name(
    latents: Served, settings: dict[str, Any], sentence: str
) -> None:
    assert latents.refusal(**settings) == (422, sentence)


def test_too_many_settings_are_refused(latents: Served) -> None:
    status, said, _ = ask(latents.port, "POST", f"/{latents.token}/make?" + "a=1&" * 40)
    assert (status, said) == (400, b"the settings cannot be read; a page asks for at most 16")


# Who may ask, and for what

PASSWD = ("/../../etc/passwd", "//etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd")
MORE_PATHS = ("/page.css/../../../etc/passwd", "/page.css%00", "/file=/etc/passwd", "/C:/Windows/win.ini", "/page.py")


@pytest.mark.parametrize("path", [*PASSWD, *MORE_PATHS])
def test_no_path_leads_to_a_file(pictures: Served, path: str) -> None:
    status, said, _ = ask(pictures.port, "GET", f"/{pictures.token}{path}")
    assert status == 404 and said.startswith(b"there is no '") and said.endswith(b"' here")
    status, said, _ = ask(pictures.port, "GET", path)
    assert status == 403 and said.startswith(b"this address lacks its token; open the whole one that `sdtrain serve`")


@pytest.mark.parametrize("path", ["/", "", "/wrong/", "/wrong/about", "/?token={token}", "/{token}x/", "/{short}/"])
def test_without_the_token_there_is_nothing(pictures: Served, path: str) -> None:
    asked = path.format(token=pictures.token, short=pictures.token[:-1])
    sentence = b"this address lacks its token; open the whole one that `sdtrain serve` printed"
    assert ask(pictures.port, "GET", asked)[:2] == (403, sentence)


FOREIGN = [
    ({"Host": "evil.example"}, "this page is under 127.0.0.1 or localhost, not under 'evil.example'"),
    ({"Host": "evil.example:7860"}, "this page is under 127.0.0.1 or localhost, not under 'evil.example:7860'"),
    (
        {"Host": "127.0.0.1.evil.example"},
        "this page is under 127.0.0.1 or localhost, not under '127.0.0.1.evil.example'",
    ),
    (
        {"Host": "localhost:1", "Origin": "http://localhost:2"},
        "another page (http://localhost:2) asked for this; only ",
    ),
    (
        {"Origin": "https://evil.example"},
        "another page (https://evil.example) asked for this; only the one of `sdtrain",
    ),
    ({"Origin": "null"}, "another page (null) asked for this; only the one of `sdtrain serve` may"),
]


@pytest.mark.parametrize("headers, sentence", FOREIGN, ids=str)
def test_other_names_and_other_pages_get_nothing(pictures: Served, headers: dict[str, str], sentence: str) -> None:
    for method, name in (("GET", ""), ("POST", "make")):
        status, said, answered = ask(pictures.port, method, f"/{pictures.token}/{name}", png(8, 8, 3), **headers)
        assert status == 403 and said.decode().startswith(sentence)
        assert not any(header.startswith("access-control") for header in answered)


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:80", "[::1]:9000"])
def test_the_page_opens_through_a_tunnel(pictures: Served, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert ask(pictures.port, "GET", f"/{pictures.token}/", **headers)[0] == 200


def test_every_answer_carries_the_strict_policy_and_no_method_is_taken_for_another(pictures: Served) -> None:
    paths = {"": 200, "page.css": 200, "page.js": 200, "about": 200, "make": 405, "absent": 404}
    for name, expected in paths.items():
        status, said, headers = ask(pictures.port, "GET", f"/{pictures.token}/{name}")
        assert status == expected and {key.decode(): value.decode() for key, value in ALWAYS.items()}.items() <= {
            *headers.items()
        }
        assert "server" not in headers and pictures.token not in said.decode()
    assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in str(headers)
    assert ask(pictures.port, "POST", f"/{pictures.token}/about")[:2] == (405, b"ask for this with GET")
    assert ask(pictures.port, "DELETE", f"/{pictures.token}/make")[:2] == (405, b"ask for this with POST")


def test_a_browser_is_opened_at_the_address_where_it_is_wanted(pictures: Served) -> None:
    until, opened = time.monotonic() + 20, pictures.place / "browser.opened"
    while not (opened.exists() and opened.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert opened.read_text() == pictures.address + "\n"


def test_it_listens_on_this_machine_alone(pictures: Served) -> None:
    listening = subprocess.run(["ss", "-ltnH", f"sport = :{pictures.port}"], capture_output=True, text=True)
    if listening.returncode:
        pytest.skip("there is no ss")
    assert [line.split()[3] for line in listening.stdout.splitlines()] == [f"127.0.0.1:{pictures.port}"]


# Time, and many at once


def test_what_takes_too_long_is_stopped_and_the_next_is_served(pictures: Served) -> None:
    large = encoded(np.zeros((1024, 2048, 3), np.uint8), "PNG")
    [first] = pictures.children
    began = time.monotonic()
    sentence = f"it took longer than {MAX_SECONDS} s and was stopped; ask for less, or raise --max-seconds"
    assert pictures.refusal(large) == (504, sentence)
    assert MAX_SECONDS <= time.monotonic() - began < MAX_SECONDS + 3
    assert gone(first)
    assert pictures.make(png(8, 8, 3))[0] == 200 and pictures.children != [first]


class Slow:
    """A network that makes nothing until it is told to."""

    def __init__(self) -> None:
        self.go, self.made = threading.Event(), 0

    def make(self, settings: dict[str, str], data: bytes) -> tuple[dict[str, Any], bytes]:
        assert self.go.wait(20)
        self.made += 1
        return {"size": [1, 1]}, data


@contextlib.contextmanager
def page_over(network: Any, **limits: Any) -> Iterator[tuple[int, Page]]:
    """(port, page) over a stand-in for a network, in a thread."""
    listening = server.listen(None)
    page = Page(network, {}, token=TOKEN, **{"max_bytes": 100, "max_seconds": 20, **limits})
    running = server.Server(page, network)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1], page
    finally:
        running.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def test_a_full_queue_says_busy_and_the_queue_is_served() -> None:
    network, answers = Slow(), []
    with page_over(network) as (port, page):

        def one() -> None:
            answers.append(ask(port, "POST", f"/{TOKEN}/make", b"x")[0])

        threads = [threading.Thread(target=one) for _ in range(QUEUE + 1)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 20
        while page.num_asked <= QUEUE and time.monotonic() < until:
            time.sleep(0.01)
        sentence = f"busy: one request is worked on and {QUEUE} wait; try again in a moment".encode()
        assert ask(port, "POST", f"/{TOKEN}/make", b"x")[:2] == (503, sentence)
        assert ask(port, "GET", f"/{TOKEN}/about")[0] == 200, "the page itself is not held up"
        network.go.set()
        for thread in threads:
            thread.join()
        assert answers == [200] * (QUEUE + 1)
        assert ask(port, "POST", f"/{TOKEN}/make", b"x")[0] == 200


def test_an_upload_that_comes_too_slowly_or_is_cut_short_is_given_up() -> None:
    network = Slow()
    network.go.set()
    with page_over(network, max_seconds=0.3) as (port, _):
        head = f"POST /{TOKEN}/make HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            line.sendall(head + b"half")
            answer = http.client.HTTPResponse(line)
            answer.begin()
            sentence = b"the upload took longer than 0.3 s and was given up"
            assert (answer.status, answer.read()) == (408, sentence)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            line.sendall(head + b"half")
        assert ask(port, "POST", f"/{TOKEN}/make", b"whole")[0] == 200 and network.made == 1


def test_nothing_of_an_upload_is_written(both: dict[str, Served]) -> None:
    assert both["pictures"].make(UPLOADS["rgb"])[0] == both["latents"].make()[0] == 200
    found = [file for one in both.values() for name in ("cwd", "tmp") for file in (one.place / name).rglob("*")]
    assert [file for file in found if file.is_file()] == []


@pytest.mark.slow
def test_a_network_that_dies_is_started_anew_and_one_that_cannot_be_loaded_is_told(
    files: dict[str, Path], tmp_path: Path
) -> None:
    file = Path(shutil.copytree(files["latents"].parent, tmp_path / "copy")) / files["latents"].name
    setup = {"path": str(file), "weights": "ema", "device": "cpu", "max_image_mb": 64, "max_seconds": 60}
    with contextlib.closing(NetworkProcess(setup)) as network:
        network.about()
        for number, hint in (
            (signal.SIGKILL, "there may be too little memory"),
            (signal.SIGSEGV, "the terminal of the"),
        ):
            os.kill(network._process.pid, number)
            with pytest.raises(Refused, match=f"^the process of the network was killed by {number.name}; {hint}") as no:
                network.make({}, b"")
            assert no.value.status == 500 and network.make({"latent": "1"}, b"")[0]["size"] == [16, 16]
        whole = file.read_bytes()
        file.write_bytes(b"no tensors")
        for killed in (True, False):
            if killed:
                os.kill(network._process.pid, signal.SIGKILL)
            with pytest.raises(Refused, match="killed by SIGKILL" if killed else "no complete safetensors"):
                network.make({}, b"")
        file.write_bytes(whole)
        with contextlib.suppress(Refused):  # the process that is there may have begun to read before
            network.make({}, b"")
        assert network.make({}, b"")[0]["size"] == [16, 16]
        os.kill(network._process.pid, signal.SIGKILL)
    with contextlib.closing(NetworkProcess(setup)) as network:
        os.kill(network._process.pid, signal.SIGKILL)
        with pytest.raises(ConfigError, match="^the process of the network was killed by SIGKILL; there may be"):
            network.about()


# The command


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_in_the_middle_of_its_work_and_leaves_no_process(one: Served, number: int, code: int) -> None:
    [child] = one.children
    assert os.getsid(child) == child, "Ctrl-C in the terminal is not for it"
    large = encoded(np.zeros((1024, 2048, 3), np.uint8), "PNG")

    def one_job() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            one.make(large)

    asking = threading.Thread(target=one_job)
    asking.start()
    time.sleep(1)
    began = time.monotonic()
    assert one.end(number) == code and time.monotonic() - began < 5
    asking.join()
    said = (one.place / "log").read_text()
    assert said == ("sdtrain: the page is closed\n" if number == signal.SIGINT else "")
    assert gone(child)


@pytest.mark.slow
def test_it_can_be_interrupted_while_the_network_is_loaded(one: Served) -> None:
    for _ in range(400):
        if subprocess.run(["pgrep", "-P", str(one.process.pid)], capture_output=True).stdout:
            break
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(one.process.pid, signal.SIGINT)
    assert one.process.communicate(timeout=20)[0] == "" and one.process.returncode == 130
    one.log.close()
    assert (one.place / "log").read_text() == "sdtrain: interrupted\n"


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["serve", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    assert "there is nothing at " in refusal(capsys, file)
    file.write_bytes(b"no tensors")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = f"sdtrain: port {port} cannot be used (Address already in use); name a free one with --port N\n"
        assert refusal(capsys, file, "--port", port) == sentence
    assert "--port 65536 is no port; take one from 1 to 65535" in refusal(capsys, file, "--port", 65536)
    for option in ("--max-seconds", "--max-upload-mb", "--max-image-mb"):
        assert f"sdtrain: {option} 0 cannot be; give a number above 0" in refusal(capsys, file, option, 0)
    assert "a.safetensors" in refusal(capsys, file), "what the process of the network refuses is told by the command"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(capsys, file) == "sdtrain: sdtrain serve needs uvicorn; pip install 'sdtrain[serve]'\n"


def test_a_discriminator_is_refused(tmp_path: Path) -> None:
    options = {"channel_base": 64, "channel_max": 8}
    file = saved(tmp_path, "stylegan2", options, player="Discriminator", resolution=16)
    with pytest.raises((ConfigError, WeightsError), match="but a generator is needed here; give the generator's file"):
        made_by(file)


# As a person sees it


@pytest.mark.skipif(browser.chromium() is None, reason="there is no Chromium: apt-get install chromium")
def test_a_picture_is_dropped_and_compared_and_latents_are_moved(both: dict[str, Served], tmp_path: Path) -> None:
    (tmp_path / "a<b>.png").write_bytes(UPLOADS["rgb"])
    (tmp_path / "b.tif").write_bytes(encoded(np.full((10, 10, 3), 99, np.uint8), "TIFF"))
    (tmp_path / "c.svg").write_bytes(SVG)
    with browser.tab() as tab:
        pictures_in(tab, both["pictures"], tmp_path)
        latents_in(tab, both["latents"])
        places = {address.removeprefix("blob:")[: len("http://127.0.0.1:7860")] for address in tab.asked}
    assert places == {one.address[: len("http://127.0.0.1:7860")] for one in both.values()}
    assert [text for text in tab.said if "422" not in text] == [], "nothing was blocked, and no script failed"


def pictures_in(tab: browser.Tab, one: Served, folder: Path) -> None:
    told, wrong = "document.querySelector('#told').textContent", "document.querySelector('#wrong').textContent"
    split = "getComputedStyle(document.querySelector('#stage')).getPropertyValue('--split')"
    tab.open(one.address, *browser.SIZES["wide"])
    tab.wait("!document.querySelector('#pictures').hidden")
    tab.drop(folder / "a<b>.png", "#drop")
    assert re.fullmatch(r"a<b>\.png: 30 x 20 px to 60 x 40 px in \d+ ms", tab.wait(told))
    assert tab.run("document.querySelector('#after').naturalWidth") == 60
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    tab.run("document.querySelector('#download').click()")
    tab.press("ArrowRight", "#split")
    assert tab.run(split) == "51%"
    tab.press("Home", "#split")
    assert tab.run(split) == "0%"
    x, y = tab.middle("#stage")
    tab.click(x, y)
    assert tab.run(split) == "50%"
    assert tab.run("getComputedStyle(document.querySelector('#before')).clipPath").startswith("inset(0px")
    tab.drop(folder / "c.svg", "#drop")
    assert tab.wait(wrong) == "c.svg: this picture cannot be used: not an image: it looks like HTML or XML"
    tab.drop(folder / "b.tif", "#drop")
    tab.wait(f"{told}.startsWith('b.tif: 10 x 10 px to 20 x 20 px')")
    assert tab.run("document.querySelector('#before').naturalWidth") == 10 and tab.run(wrong) == ""
    [downloaded] = folder.glob("*_enlarged.png")
    assert downloaded.read_bytes() == one.make(UPLOADS["rgb"])[1]


def latents_in(tab: browser.Tab, one: Served) -> None:
    code, image = "document.querySelector('code').textContent", "document.querySelector('#after').src"
    tab.open(one.address, *browser.SIZES["small"], dark=True)
    tab.wait("document.querySelector('#told').textContent.startsWith('16 x 16 px in')")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    first = tab.run(image)
    tab.press("ArrowRight", "#share")
    tab.wait(f"{code}.includes('--indices 0,1 --interpolate 100 --class 0 --out images   (interpolation/0001.png)')")
    assert tab.run(image) != first
    tab.run("document.querySelector('#new').click()")
    tab.wait(f"{code}.match(/--indices [0-9]+ --class 0/)")
