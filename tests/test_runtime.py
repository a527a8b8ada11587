"""`--runtime`, and reading, computing and writing at once. Without these a backend that is fast and wrong would be
taken, one would be compiled for a single picture, a damaged file would choose, or a stopped job would hang.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image
from test_commands import config, run_folder, shards  # noqa: F401
from test_upscale import model, network_of, photo, save  # noqa: F401
from torch import Tensor

from sdtrain import cli
from sdtrain.commands import upscale
from sdtrain.commands.overlap import overlapped
from sdtrain.commands.running import form_of, photo_parts, photo_run
from sdtrain.commands.upscaler import Upscaler
from sdtrain.data.read.budget import TooSlow, within
from sdtrain.data.read.picture import png_of, read_picture
from sdtrain.errors import ConfigError
from sdtrain.models.rrdbnet import networks as rrdbnet
from sdtrain.models.srvgg import networks as srvgg
from sdtrain.release import runtime
from sdtrain.release.runtime import Piece, Runtime


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One thread, a cache of its own, and nothing that is too little to be calibrated."""
    torch.set_num_threads(1)
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime, "WORTH_SEC", 0.0)
    return tmp_path / "cache" / "runtime"


def spinning(seconds: float, off: float = 0.0) -> Callable[[Tensor], Tensor]:
    """A network that works for so long and gives its input, or something else."""

    def net(x: Tensor) -> Tensor:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return x + off

    return net


X = torch.linspace(0, 1, 12)
PIECES = [Piece(1, lambda run: run(X)), Piece(4, lambda run: run(X))]
FORMS: dict[str, tuple[float, float]] = {"eager": (0.004, 0.0), "channels-last": (0.002, 1e-5), "onnx": (0.0003, 0.01)}


def fake(made: list[str] | None = None, **more: Any) -> Runtime:
    """A runtime whose fastest form is wrong; `made` hears of what is built."""

    def build(name: str) -> Callable[[Tensor], Tensor]:
        if made is not None:
            made.append(name)
        return spinning(*FORMS[name])

    forms = {name: partial(build, name) for name in FORMS}
    return Runtime(forms, {"kind": "fake", "unit": "pixel"}, torch.device("cpu"), **more)


LARGE = 1_000_000  # units


def words_of(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    upscale.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run(*words: object) -> int:
    return upscale.run(words_of(*words))


def test_the_fastest_form_within_the_tolerance_is_taken_and_a_wrong_one_never(capsys):
    chosen = fake().chosen(PIECES, LARGE)
    assert torch.equal(chosen(X), X + 1e-5)
    said = capsys.readouterr().out
    assert said.startswith("runtime: channels-last, ") and ", off by 1e-05, calibrated in " in said
    ratio = float(said.split(", ")[1].split("x")[0])
    assert 1.2 < ratio < 4
    with pytest.raises(ConfigError, match=r"--runtime onnx differs from the reference by 1.0e-02 of the range, more"):
        fake(asked="onnx").chosen(PIECES, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_form_whose_result_is_not_finite_is_refused(bad, monkeypatch):
    monkeypatch.setitem(FORMS, "channels-last", (0.0, bad))
    assert torch.equal(fake().chosen(PIECES, LARGE)(X), X)


def test_a_form_that_was_right_for_other_weights_is_compared_again(own_cache, monkeypatch, capsys):
    fake().chosen(PIECES, LARGE)
    (file,) = own_cache.iterdir()
    assert set(json.loads(file.read_text())["seconds"]) == {"eager", "channels-last"}, "a wrong one has no figure"
    monkeypatch.setitem(FORMS, "channels-last", (0.0, 0.01))
    assert torch.equal(fake().chosen(PIECES, LARGE)(X), X)
    assert "channels-last is off by 1.0e-02" in capsys.readouterr().out


def test_a_choice_is_kept_and_read_again_until_machine_version_or_work_is_another(own_cache, capsys, monkeypatch):
    calibrated: list[list[str]] = []
    real = Runtime._calibrate
    monkeypatch.setattr(Runtime, "_calibrate", lambda *args: calibrated.append(list(args[1])) or real(*args))
    monkeypatch.delitem(FORMS, "onnx")
    for _ in range(2):
        assert torch.equal(fake().chosen(PIECES, LARGE)(X), X + 1e-5)
    assert calibrated == [["channels-last"]] and capsys.readouterr().out.count("as kept") == 1
    assert [set(json.loads(file.read_text())["seconds"]) for file in own_cache.iterdir()] == [set(FORMS)]
    here = runtime.machine
    for change in ({"torch": "9.9"}, {"processor": "another"}, {"threads": 7}, {"onnxruntime": None}):
        monkeypatch.setattr(runtime, "machine", lambda device, change=change: {**here(device), **change})
        fake().chosen(PIECES, LARGE)
    assert len(calibrated) == 5 and len(list(own_cache.iterdir())) == 5


@pytest.mark.parametrize("content", ["{", "[]", '{"seconds": {"eager": [0, 0]}, "unable": {}}', '{"seconds": 1}', "\0"])
def test_a_damaged_cache_is_a_sentence_and_calibrated_again(content, own_cache, capsys):
    fake().chosen(PIECES, LARGE)
    (file,) = own_cache.iterdir()
    whole = json.loads(file.read_text())["seconds"]
    file.write_text(content)
    capsys.readouterr()
    assert torch.equal(fake().chosen(PIECES, LARGE)(X), X + 1e-5)
    said = capsys.readouterr()
    assert said.err.startswith(f"sdtrain: the calibration kept in {file} is damaged (") and said.err.count("\n") == 1
    assert set(json.loads(file.read_text())["seconds"]) == set(whole)


def test_a_cache_that_cannot_be_written_costs_a_sentence_only(own_cache, capsys):
    own_cache.parent.write_text("a file where a folder should be")
    assert torch.equal(fake().chosen(PIECES, LARGE)(X), X + 1e-5)
    assert "the calibration cannot be kept in" in capsys.readouterr().err


def test_what_costs_more_to_build_than_there_is_to_do_is_not_even_tried(monkeypatch):
    monkeypatch.setitem(FORMS, "compiled", (0.0, 0.0))
    made: list[str] = []
    fake(made).chosen(PIECES, 200)  # a second in all
    assert "compiled" not in made and "onnx" not in made
    monkeypatch.setattr(runtime, "WORTH_SEC", 5.0)
    made.clear()
    fake(made).chosen(PIECES, LARGE)
    assert "compiled" in made
    os.environ["SDTRAIN_CACHE"] += "2"
    made.clear()
    fake(made).chosen(PIECES, 200)
    assert made == ["eager"], "a calibration would take as long as the work"


def test_the_time_it_takes_to_build_a_form_counts_where_it_is_known(own_cache, monkeypatch):
    monkeypatch.delitem(FORMS, "onnx")
    fake().chosen(PIECES, LARGE)
    (file,) = own_cache.iterdir()
    said = json.loads(file.read_text())
    said["seconds"]["channels-last"][1] = 60.0
    file.write_text(json.dumps(said))
    made: list[str] = []
    assert torch.equal(fake(made).chosen(PIECES, 1000)(X), X) and made == ["eager"]
    assert torch.equal(fake().chosen(PIECES, LARGE)(X), X + 1e-5)


NETS: dict[str, Any] = {
    "srvgg": lambda: srvgg.Generator(srvgg.GeneratorOptions(num_feat=4, num_conv=2, upscale=2)),
    "rrdbnet x2": lambda: rrdbnet.Generator(rrdbnet.GeneratorOptions(num_feat=4, num_grow_ch=2, num_block=2, scale=2)),
}
TILES = {"tile": 128, "overlap": 8}


def run_as(name: str, backend: str, precision: str = "fp32") -> tuple[float, float]:
    """(largest difference from the network itself on another picture, on overshooting values too; largest number)."""
    torch.manual_seed(1)
    network = network_of(NETS[name]())
    net: Any = network.build().requires_grad_(False)
    net.get_parameter("body.6.bias" if name == "srvgg" else "conv_last.bias").data.add_(0.9)
    network.state.update(net.state_dict())
    fold = 4 // net.scale if network.kind == "rrdbnet" else 1
    image = torch.rand(3, 80, 96)
    asked = {"asked": backend, "precision": precision}
    run = photo_run(network, net, torch.device("cpu"), image, 1, {**TILES, "fold": fold}, **asked)
    x = torch.rand(1, 3, 36, 44)
    with torch.inference_mode():
        found, expected = run(x).float(), net(x)
    return (found - expected).abs().max().item(), expected.max().item()


@pytest.mark.parametrize("name", NETS)
def test_channels_last_gives_what_the_network_gives(name):
    off, largest = run_as(name, "channels-last")
    assert off < 1e-5 and largest > 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["compiled", "onnx"])
@pytest.mark.parametrize("name", NETS)
def test_compiled_and_exported_networks_give_what_the_network_gives_also_outside_of_its_range(name, backend):
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    off, largest = run_as(name, backend)
    assert off < 1e-5 and largest > 1, "clamped before tiles are blended and resized it would be another picture"


def test_bfloat16_is_taken_where_it_is_asked_for_and_within_its_tolerance_alone(monkeypatch):
    with pytest.raises(ConfigError, match="--runtime channels-last bf16 differs from the reference by .* than 3.9e-03"):
        run_as("srvgg", "channels-last", "bf16")
    monkeypatch.setitem(runtime.TOLERANCE, "bf16", 0.1)
    off, _ = run_as("srvgg", "channels-last", "bf16")
    assert 1e-4 < off < 0.1
    assert form_of("auto", "bf16") == "auto" and form_of("eager", "bf16") == "eager bf16"


def test_pieces_begin_with_a_small_one_and_end_with_the_first_tile():
    sides = [tuple(p.shape[-2:]) for p in photo_parts(torch.rand(3, 301, 500), "cpu", tile=256, overlap=16, fold=4)]
    assert sides == [(84, 132), (168, 264)]
    assert [tuple(p.shape[-2:]) for p in photo_parts(torch.rand(3, 1, 2), "cpu", tile=64, overlap=8, fold=2)] == [
        (2, 2)
    ]


def test_auto_works_where_onnxruntime_is_absent(model, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(runtime, "BUILD_SEC", dict.fromkeys(runtime.BUILD_SEC, 0.0))
    monkeypatch.setitem(runtime.BUILD_SEC, "compiled", 1e9)
    assert run(save(tmp_path / "a.png", photo(200, 200)), "--model", model, "--out", tmp_path / "out") == 0
    (file,) = (tmp_path / "cache" / "runtime").iterdir()
    said = json.loads(file.read_text())
    assert set(said["seconds"]) == {"eager", "channels-last"} and set(said["unable"]) == {"onnx", "cuda-graphs"}
    assert capsys.readouterr().out.startswith("runtime: ")


def test_words_that_cannot_be_are_refused_in_a_sentence(model, shards, run_folder, tmp_path, capsys):  # noqa: F811
    picture = save(tmp_path / "a.png", photo(8, 8))
    with pytest.raises(ConfigError, match="--runtime cuda-graphs cannot be used here .CUDA graphs need a GPU."):
        run(picture, "--model", model, "--out", tmp_path / "o", "--runtime", "cuda-graphs")
    with pytest.raises(
        ConfigError, match="--runtime auto: the bytes of a data set or film must not depend on a timing"
    ):
        run(shards, "--model", model, "--out", tmp_path / "o", "--runtime", "auto")
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit):
        cli.main(["sample", str(run_folder), "--out", str(tmp_path / "o"), "--runtime", "onnx"])


def test_a_form_that_was_named_is_part_of_what_the_bytes_of_a_data_set_depend_on(
    model,  # noqa: F811
    shards,  # noqa: F811
    tmp_path,
    capsys,
):
    words = ["upscale", str(shards), "--model", str(model), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--runtime", "channels-last"]) == 0
    assert cli.main([*words, "--runtime", "channels-last"]) == 0
    assert cli.main(words) == 2 and "choose another folder" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists(), "nothing was timed"


def test_images_of_a_seed_are_the_same_whatever_runs_them(run_folder, tmp_path):  # noqa: F811
    drawn = {}
    for words in ([], ["--runtime", "channels-last"], ["--runtime", "auto"]):
        out = tmp_path / "-".join(["o", *words])
        assert cli.main(["sample", str(run_folder), "--out", str(out), "--num", "3", "--batch", "2", *words]) == 0
        drawn[" ".join(words)] = np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(out.iterdir())])
    assert drawn[""].shape[0] == 3
    for images in drawn.values():
        assert np.abs(images - drawn[""]).max() <= 1


# Reading, computing and writing at once


def test_pictures_are_those_of_one_after_the_other_also_around_refused_ones(
    model,  # noqa: F811
    tmp_path,
    capsys,
):
    names = ["a.png", "broken.png", "b.png", "c.png", "absent.png", "d.png"]
    for number, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
        save(tmp_path / name, photo(30 + number, 40, 3 + number % 2))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:90])
    words = [*(tmp_path / name for name in names), "--model", model, "--out", tmp_path / "out", "--runtime", "eager"]
    assert run(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [Path(line.split(": ")[0]).name for line in lines[1:]] == ["broken.png", "absent.png"]
    upscaler = Upscaler.of(words_of(*words))
    for name in ("a.png", "b.png", "c.png", "d.png"):
        expected = png_of(upscaler(read_picture(tmp_path / name)))
        assert (tmp_path / "out" / name).read_bytes() == expected


def test_results_come_in_order_with_what_each_raised_and_the_three_overlap():
    begun: list[str] = []

    def step(name: str, x: int) -> int:
        begun.append(f"{name} {x}")
        time.sleep(0.02)
        if (name, x) in {("read", 2), ("compute", 3), ("write", 4)}:
            raise ValueError(f"{name} {x}")
        return x

    found = list(overlapped(range(6), *(partial(step, name) for name in ("read", "compute", "write"))))
    assert [x for x, _ in found] == list(range(6))
    assert [str(outcome.error) for _, outcome in found if outcome.error] == ["read 2", "compute 3", "write 4"]
    assert [outcome.get() for _, outcome in found if not outcome.error] == [0, 1, 5]
    assert begun.index("read 1") < begun.index("compute 0") + 2 and begun.index("compute 5") < len(begun) - 1
    assert "compute 2" not in begun and "write 3" not in begun


def test_a_result_that_does_not_fit_beside_the_last_waits_for_it():
    held: set[int] = set()
    most = []

    def compute(x: int) -> int:
        held.add(x)
        most.append(len(held))
        return x

    def write(x: int) -> int:
        time.sleep(0.05)
        held.discard(x)
        return x

    for fits, expected in ((True, 2), (False, 1)):
        most.clear()
        list(overlapped(range(4), lambda x: x, compute, write, lambda last, this, fits=fits: fits))
        assert max(most) == expected


@pytest.mark.parametrize("where", ["compute", "consumer"])
def test_an_interruption_ends_at_once_and_leaves_no_thread(where):
    began = time.monotonic()

    def write(x: int) -> int:
        while True:  # as an encoder works: in Python now and then
            time.sleep(0.005)

    def compute(x: int) -> int:
        if x == 1 and where == "compute":
            time.sleep(0.05)
            raise KeyboardInterrupt
        return x

    work = overlapped(range(3), lambda x: x, compute, write if where == "compute" else lambda x: x)
    with pytest.raises(KeyboardInterrupt):
        for _ in work:
            raise KeyboardInterrupt
    work.close()
    assert time.monotonic() - began < 4
    assert not {"reading", "writing"} & {thread.name for thread in threading.enumerate()}


def test_the_time_of_a_picture_is_limited_in_a_thread_too():
    outcome: list[str] = []

    def spin(seconds: float) -> None:
        try:
            with within(0.05):
                end = time.thread_time() + seconds
                while time.thread_time() < end:
                    pass
            outcome.append("in time")
        except TooSlow:
            outcome.append("too slow")

    for seconds in (3.0, 0.0):
        thread = threading.Thread(target=spin, args=(seconds,))
        thread.start()
        thread.join()
    assert outcome == ["too slow", "in time"]


def test_ctrl_c_leaves_whole_files_only_and_130(model, tmp_path):  # noqa: F811
    for number in range(60):
        save(tmp_path / f"{number:02}.png", photo(200, 200))
    words = [sys.executable, "-m", "sdtrain.cli", "upscale", *map(str, sorted(tmp_path.glob("*.png"))), "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*words, str(tmp_path / "out"), "--model", str(model)], cwd=REPO, env=env)
    end = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.png")) and time.monotonic() < end:
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    assert job.wait(20) == 130
    left = sorted((tmp_path / "out").iterdir())
    note = left.pop(0)  # from which the same command goes on
    assert note.name == ".upscale.json" and 0 < len(left) < 60 and all(path.suffix == ".png" for path in left)
    assert all(Image.open(path).copy().size == (400, 400) for path in left)
