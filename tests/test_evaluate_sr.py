"""`sdtrain evaluate` of a super-resolution run: else the table of a paper could not be filled after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from PIL import Image
from test_sdakd import finished, lists, load, settings  # noqa: F401
from tiny import picture

from sdtrain import cli
from sdtrain.commands.evaluate_sr import made_by
from sdtrain.commands.source import config_of
from sdtrain.metrics.features import lite0
from sdtrain.metrics.fid import fid_of_features
from sdtrain.metrics.protocol import conflicts
from sdtrain.plan import weights_needed
from sdtrain.restoration.inputs import make_inputs
from sdtrain.tasks.validation import ValidationList

NAMES = ("fid", "psnr_y", "ssim_y")


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["evaluate", *map(str, words)]) == 2
    return capsys.readouterr().err.strip()


def test_a_run_is_measured_as_it_measured_itself_on_1_and_2_ranks(finished, tmp_path, capsys):  # noqa: F811
    own = [row for row in rows(finished / "metrics.jsonl") if row["kind"] in ("eval", "baseline")]
    student = [row for row in own if row["kind"] == "eval" and row["split"] == "test"][-1]
    plain = [row for row in own if row.get("method") == "bicubic"][-1]
    words = ["evaluate", str(finished), "--json", str(tmp_path / "rows.jsonl")]
    assert cli.main([*words, "--against", str(finished / "metrics.jsonl")]) == 0
    said = capsys.readouterr().out
    done = run_ranks(2, "-m", "sdtrain.cli", *words)
    assert done.returncode == 0 and said.startswith(done.stdout) and "bicubic" in done.stdout, done
    line = next(line for line in done.stdout.splitlines() if line.startswith("  psnr_y"))
    assert "8 bits, border " in line and line.endswith(" images")
    one, two = rows(tmp_path / "rows.jsonl")
    measured = [name for name in NAMES if name in student]
    assert measured and one["protocol"] == two["protocol"] == student["protocol"]
    assert all(one[name] == two[name] == student[name] for name in measured)
    assert all(one["bicubic"][name] == plain[name] for name in measured)


def test_every_value_names_what_made_it():
    protocol = {"fid": {"extractor": "inception", "tap": 2048}, "lpips": "alex, download", "psnr_y, ssim_y": "8 bits"}
    said = [made_by(name, protocol) for name in ("fid", "fid_16", "lpips_4", "psnr_y", "ssim_y_64")]
    assert said == ["inception 2048", "inception 2048", "alex, download", "8 bits", "8 bits"]


def test_other_photographs_and_metrics_can_be_asked_for(finished, lists, tmp_path):  # noqa: F811
    file, kept = tmp_path / "rows.jsonl", sorted((finished / "inputs").iterdir())
    words = ["evaluate", str(finished), "--metrics", "psnr_y", "--json", str(file), "--cache", str(tmp_path)]
    assert cli.main([*words, "--split", "val"]) == cli.main([*words, "--real", lists["val"]]) == 0
    as_val, as_test = rows(file)
    assert as_val["psnr_y"] == as_test["psnr_y"] and set(as_val["bicubic"]) == {"psnr_y"}
    assert sorted((finished / "inputs").iterdir()) == kept and list(tmp_path.glob("lq-*/inputs/test.safetensors"))


def test_distances_in_the_features_of_other_networks_are_those_of_their_rows_on_1_and_2_ranks(finished, tmp_path):  # noqa: F811
    words = ["evaluate", str(finished), "--metrics", "psnr_y,fd_lite0", "--json", str(tmp_path / "rows.jsonl")]
    assert cli.main(words) == 0
    done = run_ranks(2, "-m", "sdtrain.cli", *words)
    assert done.returncode == 0 and "  lite0 1280, 3 images" in done.stdout, done
    one, two = rows(tmp_path / "rows.jsonl")
    own = [row for row in rows(finished / "metrics.jsonl") if row["kind"] == "eval" and row["split"] == "test"][-1]
    assert one["psnr_y"] == own["psnr_y"] and one["fd_lite0"] == two["fd_lite0"]
    assert one["protocol"] == two["protocol"] and one["protocol"]["fd_lite0"]["extractor"] == "lite0"
    assert conflicts(own["protocol"], one["protocol"]) == []

    config, net = config_of(finished), lite0("package")
    photos = ValidationList(config, "test", make_inputs(config), finished, torch.device("cpu"))
    (setting,) = photos.settings
    real = torch.cat([net(photos.hq(i)[None]) for i in range(3)])
    fake = torch.cat([net(photos.bicubic(i, setting)) for i in range(3)])
    assert one["bicubic"]["fd_lite0"] == pytest.approx(fid_of_features(real, fake))


def test_the_files_of_the_networks_that_validation_compares_by_are_asked_for_before_training(lists, tmp_path):  # noqa: F811
    more = {"names": ["psnr_y", "fd_lite0", "fd_clip"], "select_by": "fd_lite0"}
    tree = settings(lists)
    config = load(tmp_path, tree | {"validation": tree["validation"] | more})
    assert {"lite0", "clip"} <= set(weights_needed(config)) and "dinov2" not in weights_needed(config)


def test_a_folder_of_pictures_inside_a_run_is_measured_as_pictures(finished, tmp_path):  # noqa: F811
    folder = finished / "upscaled"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    words = ["--metrics", "rfid", "--tap", "64", "--seeds", "1", "--workers", "0", "--cache", str(tmp_path)]
    assert cli.main(["evaluate", str(folder), "--real", str(folder), *words, "--json", str(tmp_path / "row")]) == 0
    assert rows(tmp_path / "row")[0]["rfid"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_measured_is_one_sentence(finished, capsys):  # noqa: F811
    said = refusal(capsys, finished, "--metrics", "rfid")
    own = "fid, psnr_y, ssim_y, lpips, fd_lite0, fd_dinov2, fd_clip"
    assert said == f"sdtrain: --metrics has rfid; choose from {own} for super-resolution"
    said = refusal(capsys, finished, "--metrics", "fd_lite0", "--lite0", "nowhere.pth")
    assert said.startswith("sdtrain: The lite0 weights (") and "are not at nowhere.pth" in said
    said = refusal(capsys, finished, "--num", 5)
    assert said == f"sdtrain: --num: {finished} enlarges every image of a list; leave it out"
    said = refusal(capsys, finished, "--split", "train")
    assert said == "sdtrain: --split train: a run of super-resolution has test and val"
    critic = next((finished / "best").glob("adversarial_last_D.safetensors"))
    assert "holds a discriminator, which enlarges nothing" in refusal(capsys, critic)
