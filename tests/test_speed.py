"""`sdtrain speed`. Without these a student could look fast because its teacher was timed on a busy machine, a FLOP
could be counted as two or none, and a form that computes something else could win.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import config, run_folder, shards  # noqa: F401
from test_report import STRANGE, command, refusal
from test_sdakd import finished, lists  # noqa: F401
from torch import nn

from sdtrain import cli
from sdtrain.commands import speed, speed_cases
from sdtrain.commands.speed_rows import Asked, base_of, speed_up
from sdtrain.engine.timing import Clock
from sdtrain.interop.network import Network, save_network
from sdtrain.models.gcfsr import networks as gcfsr
from sdtrain.models.gcfsr import options as gcfsr_options
from sdtrain.models.rrdbnet import networks as rrdbnet
from sdtrain.models.rrdbnet import options as rrdbnet_options
from sdtrain.release import backends

QUICK = ["--size", "16x12", "--warmup", 1, "--passes", 3, "--threads", 1, "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def saved(path: Path, net: Any, kind: str, **more: Any) -> Path:
    options = dataclasses.asdict(net.options)
    found = Network(kind=kind, player="Generator", role="G_ema", state=net.state_dict(), options=options, **more)
    return save_network(found, path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An RRDBNet and its half."""
    root = tmp_path_factory.mktemp("speed")
    full = rrdbnet_options.GeneratorOptions(num_feat=16, num_grow_ch=8, num_block=1)
    made = [rrdbnet.Generator(rrdbnet_options.scaled(full, C)) for C in ("1", "1/2")]
    return [saved(root / name, net, "rrdbnet") for name, net in zip(("full", "half"), made)]


def measured(tmp_path: Path, *words: object) -> dict[str, Any]:
    file = tmp_path / "s.jsonl"
    assert command("speed", *words, *QUICK, "--json", file) == 0
    return json.loads(file.read_text().splitlines()[-1])


def flops_by_hand(net: nn.Module, x: torch.Tensor) -> int:
    """2 multiplications and additions for each weight of a convolution at each place of its result."""
    total = [0]

    def count(layer: Any, inputs: Any, result: torch.Tensor) -> None:
        total[0] += 2 * layer.weight.numel() * result.shape[0] * result.shape[2] * result.shape[3]

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        net(x)
    return total[0]


def test_parameters_and_flops_are_those_counted_by_hand(photos, tmp_path):
    row = measured(tmp_path, *photos)
    for case, file in zip(row["cases"], photos):
        net = speed_cases.load_network(file).build()
        assert case["parameters"] == sum(p.numel() for p in net.parameters())
        assert case["flops"] == flops_by_hand(net, torch.zeros(1, 3, 16, 12))
        assert case["size"] == "16x12" and case["difference"] == 0.0 and len(case["seconds"]) == 3
        assert case["memory"] > 4 * case["parameters"]
    full, half = row["cases"]
    assert speed_up(half, full) == pytest.approx(
        sorted(a / b for a, b in zip(full["seconds"], half["seconds"]))[1], rel=1e-9
    )
    assert row["setup"]["device"].startswith("CPU") and full["clock"] == "processor time of one thread"


def test_cases_take_turns_and_the_first_rounds_are_not_counted(photos, monkeypatch):
    order: list[str] = []
    real = Clock.time

    def noted(self: Clock, work: Any) -> Any:
        order.append(next(case for case in cases if case.run is work).subject.name)
        return real(self, work)

    cases: list[Any] = []
    make = speed_cases.cases_of
    monkeypatch.setattr(speed_cases, "cases_of", lambda *args: cases.extend(found := make(*args)) or found)
    monkeypatch.setattr(Clock, "time", noted)
    asked = Asked(sizes=((8, 8),), threads=(1,), warmup=2, passes=3, device="cpu")
    row = speed_cases.measure(speed_cases.subjects_of(photos), asked, [])
    assert order == list(map(str, photos)) * 5
    assert [len(case["seconds"]) for case in row["cases"]] == [3, 3]


def test_forms_of_a_network_agree_with_eager_fp32_within_their_arithmetic(photos, tmp_path, capsys):
    words = ["--precision", "fp32,bf16", "--backend", "eager,channels-last"]
    row = measured(tmp_path, photos[0], *words)
    worst = {(case["precision"], case["backend"]): case["difference"] for case in row["cases"]}
    assert set(worst) == {(p, b) for p in ("fp32", "bf16") for b in ("eager", "channels-last")}
    for (precision, _), value in worst.items():
        assert value < 1e-5 if precision == "fp32" else 1e-5 < value < 0.1
    said = capsys.readouterr().out
    assert said.count("| 16x12 |") == 4


def test_sizes_batches_and_threads_are_cases_and_compare_with_their_own_kind(photos, tmp_path):
    file = tmp_path / "s.jsonl"
    words = ["--size", "8x8,16x8", "--threads", "1,2", "--batch", 2, "--passes", 2, "--warmup", 0, "--device", "cpu"]
    assert command("speed", *photos, *words, "--json", file) == 0
    cases = json.loads(file.read_text())["cases"]
    found = [(case["size"], case["threads"]) for case in cases]
    assert found == [("8x8", 1), ("8x8", 2), ("16x8", 1), ("16x8", 2)] * 2
    assert {case["clock"] for case in cases if case["threads"] == 2} == {"wall time"}
    bases = [base_of(case, cases) for case in cases]
    assert all(base["name"] == str(photos[0]) and base["size"] == case["size"] for base, case in zip(bases, cases))
    assert cases[2]["flops"] == 2 * cases[0]["flops"]
    assert torch.get_num_threads() == 1


def test_a_run_is_measured_with_its_teacher_and_a_face_network_at_its_own_side(finished, tmp_path):  # noqa: F811
    row = measured(tmp_path, finished)
    assert [case["name"] for case in row["cases"]] == [f"teacher of {finished.name}", str(finished)]
    assert [case["options"]["num_feat"] for case in row["cases"]] == [8, 4]
    net = gcfsr.Generator(gcfsr_options.GeneratorOptions(narrow=1 / 64, num_style_feat=8), resolution=32)
    face = saved(tmp_path / "face", net, "gcfsr", resolution=32)
    assert [case["size"] for case in measured(tmp_path, face)["cases"]] == ["32x32"]


def test_a_generator_that_draws_from_noise_is_measured_too(run_folder, tmp_path):  # noqa: F811
    (case,) = measured(tmp_path, run_folder)["cases"]
    assert case["kind"] == "stylegan2" and case["size"] == "16x16" and case["flops"] > 0


def test_what_a_form_cannot_take_is_one_note_and_the_others_are_measured(photos, tmp_path, monkeypatch, capsys):
    def unable(*_: Any) -> Any:
        raise RuntimeError("no compiler here\nsecond line")

    monkeypatch.setitem(backends.ALL, "compiled", unable)
    row = measured(tmp_path, photos[0], "--backend", "eager,compiled", "--precision", "fp32")
    assert [case["backend"] for case in row["cases"]] == ["eager"]
    assert "compiled in fp32 is left out: no compiler here\n" in capsys.readouterr().err
    said = refusal(capsys, "speed", photos[0], *QUICK, "--backend", "compiled")
    assert said.startswith("sdtrain: nothing can be measured; ") and "\n" not in said


@pytest.mark.slow
def test_compiled_and_exported_networks_compute_the_same(photos, tmp_path):
    pytest.importorskip("onnxruntime")
    row = measured(tmp_path, photos[1], "--backend", "eager,compiled,onnx")
    assert [case["backend"] for case in row["cases"]] == ["eager", "compiled", "onnx"]
    assert all(case["difference"] < 1e-4 for case in row["cases"])


@pytest.mark.parametrize("suffix", [".md", ".html", ".tex", ".csv", ".png", ".svg"])
def test_table_and_chart_are_written_in_every_form_and_names_are_escaped(suffix, photos, tmp_path):
    source = tmp_path / f"{STRANGE}.safetensors".replace("/", "_")
    for end in (".safetensors", ".json"):
        source.with_suffix(end).write_bytes(photos[1].with_suffix(end).read_bytes())
    out = tmp_path / f"page{suffix}"
    assert command("speed", photos[0], source, *QUICK, "--out", out) == 0
    assert out.stat().st_size > 100
    if suffix not in (".png", ".csv"):
        assert "b<b>$" not in out.read_text() and "\n## h" not in out.read_text()


REFUSALS = [
    (["--size", "256"], "--size 256: give height x width in pixels"),
    (["--size", "0x4"], "--size 0x4: give height x width in pixels"),
    (["--size", "99999x4"], "--size 99999x4: give height x width in pixels, at most 16384"),
    (["--threads", "0"], "--threads 0: give whole numbers from 1 on"),
    (["--threads", "two"], "--threads two: give whole numbers from 1 on"),
    (["--precision", "fp16"], "--precision has fp16; choose from fp32, bf16"),
    (["--backend", "eager,warp"], "--backend has warp; choose from eager"),
    (["--passes", "1"], "--batch must be at least 1, --passes 2, --warmup 0"),
    (["--out", "page.pdf"], "--out page.pdf ends in neither .md"),
    (["--json", "."], "--json .: it is a folder; name another file"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSALS)
def test_arguments_that_cannot_work_are_refused_before_torch_is_loaded(words, sentence, photos, capsys, monkeypatch):
    monkeypatch.setattr(speed_cases, "measure", lambda *_: pytest.fail("it was measured"))
    said = refusal(capsys, "speed", photos[0], *words)
    assert said.startswith(f"sdtrain: {sentence}") and "\n" not in said


def test_files_that_cannot_be_measured_are_refused_by_name(tmp_path, capsys):
    assert "there is no file" in refusal(capsys, "speed", tmp_path / "gone.safetensors", *QUICK)
    options = rrdbnet_options.GeneratorOptions(num_feat=8, num_grow_ch=4, num_block=1, scale=2)
    odd = saved(tmp_path / "two", rrdbnet.Generator(options), "rrdbnet")
    said = refusal(capsys, "speed", odd, *QUICK[2:], "--size", "15x16")
    assert said == "sdtrain: --size 15x16: a network of scale 2 takes multiples of 2"


def test_help_and_refusals_need_no_torch():
    from conftest import run_python

    script = "import sys; from sdtrain import cli; assert cli.main(['speed', 'x', '--size', '1']) == 2; "
    assert run_python("-c", script + "assert 'torch' not in sys.modules").returncode == 0
    assert "speed" in cli.COMMANDS and speed.BACKENDS == tuple(backends.ALL)
