"""Without these a plan hides what it knows: when a run ends, and that its numbers will be worth nothing."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tiny import make_shards, tiny_config, write_config

from sdtrain import plan as planning
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError
from sdtrain.main import main
from sdtrain.outlook import forecast, render_forecast
from sdtrain.plan import make_plan, render


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("plan") / "shards")


def planned(tmp_path: Path, config: dict[str, Any]) -> str:
    return render(make_plan(load_config(write_config(tmp_path / "plan.yaml", config))))


def warned(text: str) -> list[str]:
    return [line.removeprefix("  WARNING     ") for line in text.splitlines() if line.startswith("  WARNING ")]


SENSIBLE = {"sample_img": 32, "eval_img": 32, "total_img": 96}
SOUND = {"names": ["rfid"], "num_fake": 1000, "seeds": 3, "tap": 64, "select_by": "rfid"}


def test_a_run_that_shows_saves_and_measures_enough_is_warned_of_nothing(shards: Path, tmp_path: Path) -> None:
    text = planned(tmp_path, tiny_config(shards, **SENSIBLE, metrics=SOUND))
    assert warned(text) == []
    assert "  forecast    unknown until the first tick; `sdtrain bench --cfg plan` measures it" in text
    assert "conditional" not in text


def test_what_never_happens_before_the_end_is_said_with_its_key(shards: Path, tmp_path: Path) -> None:
    never = {"log_img": 96, "sample_img": 0, "eval_img": 0, "save_img": 200}
    assert warned(planned(tmp_path, tiny_config(shards, **never))) == [
        "no loss and no speed is logged before the end: log_img is 96, the run has 96 images",
        "no image is drawn before the end: sample_img is 0 (never), the run has 96 images",
        "nothing is evaluated, so no weights are chosen before the end: eval_img is 0 (never), the run has 96 images",
        "nothing is saved, so a crash loses everything before the end: save_img is 200, the run has 96 images",
    ]


def test_fid_of_fewer_images_than_features_and_rfid_of_few_are_said(shards: Path, tmp_path: Path) -> None:
    few = {"names": ["fid", "rfid", "fd_lite0"], "num_fake": 500, "seeds": 3, "tap": 64}
    fid, lite0, rfid = warned(planned(tmp_path, tiny_config(shards, **SENSIBLE, metrics=few)))
    assert fid.startswith("fid of 48 images in 64 features: the covariance of fewer images than features is singular")
    assert lite0.startswith("fd_lite0 of 48 images in 1280 features: the covariance of fewer images than features")
    assert rfid.startswith("rfid of 500 generated images in 3 random networks: its spread makes choosing weights a lot")
    [seeds] = warned(planned(tmp_path, tiny_config(shards, **SENSIBLE, metrics={**SOUND, "seeds": 2})))
    assert "in 2 random networks" in seeds


def test_float16_on_a_cpu_and_tf32_are_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTRAIN_CPU", "1")
    config = tiny_config(shards, **SENSIBLE, metrics=SOUND, tf32=True, adversarial="logistic", augment={"kind": "none"})
    small = {"kind": "stylegan2", "channel_base": 64, "channel_max": 8, "num_low_precision_res": 2}
    config["model"] = {"generator": {**small, "low_precision": "fp16"}, "discriminator": small}
    half, tf32 = warned(planned(tmp_path, config))
    assert half == "model.generator: 2 levels in float16 compute in float32 on this CPU, which emulates float16"
    assert tf32.startswith("tf32: true changes nothing on a CPU")


def test_a_plan_says_how_many_classes_condition_the_networks(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labelled"
    folder.mkdir()
    with tarfile.open(shards / "000.tar") as plain, tarfile.open(folder / "0.tar", "w") as tar:
        for i, member in enumerate(plain.getmembers()):
            image, label = plain.extractfile(member), str(i % 3).encode()
            assert image is not None
            tar.addfile(member, image)
            told = tarfile.TarInfo(member.name.replace(".png", ".cls"))
            told.size = len(label)
            tar.addfile(told, io.BytesIO(label))
    three = {"model__generator__num_embeddings": 3, "model__discriminator__num_embeddings": 3}
    text = planned(tmp_path, tiny_config(folder, **SENSIBLE, **three))
    assert "epochs, conditional, 3 classes\n" in text
    assert "conditional" not in planned(tmp_path, tiny_config(folder, **SENSIBLE, data__labels=False))


def test_batch_norms_of_each_ghost_are_as_many_as_there_are_ghosts(shards: Path, tmp_path: Path) -> None:
    message = "own_norms 3 is not the number of ghosts, batch_size / ghost_batch = 4; set it to that, or to 1"
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, tiny_config(shards, **SENSIBLE, model__generator__own_norms=3))


def test_the_forecast_is_that_of_the_newest_rows_of_the_run_folder(tmp_path: Path) -> None:
    ends = {"first": 24_000, "second": 96_000}
    assert forecast(tmp_path, ends) == forecast(None, ends) == {}
    rows = [{"kind": "perf", "seen_img": 1000 * i, "sec_per_kimg": 900.0 if i < 5 else 10.0} for i in range(1, 13)]
    rows[-1]["sec/evaluate"] = 16.0
    lines = [*map(json.dumps, rows), json.dumps({"kind": "train", "seen_img": 12_000}), '{"kind": "perf", "se']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = forecast(tmp_path, ends)
    told = {"left_img": 84_000, "sec_per_kimg": 10.0, "seconds": 84 * 12.0, "ticks": 8}
    assert found == told | {"stage": None, "then": []}
    text = render_forecast(found, "x")
    assert text.startswith("16m48s for 84000 images more, until 2")
    assert text.endswith("(10 s/kimg in the last 8 ticks of this run)")


def test_the_forecast_of_a_stage_ends_with_it_and_takes_no_speed_of_another(tmp_path: Path) -> None:
    stages = ["first"] * 12 + ["second"] * 3
    rows = [{"seen_img": 1000 * i, "sec_per_kimg": 5.0 + 35 * (s == "second")} for i, s in enumerate(stages, 1)]
    lines = [json.dumps({"kind": "perf", "stage": s, **row}) for s, row in zip(stages, rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    ends = {"first": 12_000, "second": 20_000, "third": 30_000, "fourth": 40_000}
    found = forecast(tmp_path, ends)
    assert found == {
        **{"left_img": 5_000, "sec_per_kimg": 40.0, "seconds": 200.0, "ticks": 3},
        **{"stage": "second", "then": ["third", "fourth"]},
    }
    text = render_forecast(found, "x")
    assert text.startswith("3m20s for 5000 images more of second, until 2")
    assert text.endswith(" ticks of this run); then third, fourth, each at a speed of its own")


def test_the_plan_of_a_run_folder_that_has_ticks_says_when_it_ends(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text(json.dumps({"kind": "perf", "seen_img": 32, "sec_per_kimg": 1000.0}))
    path = write_config(tmp_path / "plan.yaml", tiny_config(shards))
    assert main(["--cfg", str(path), "--out", str(out), "--plan"]) == 0
    assert "  forecast    1m04s for 64 images more, until 2" in capsys.readouterr().out


def test_missing_weights_are_said_before_networks_are_built_and_end_a_plan_with_2(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    build = planning._build

    def noted(*args: Any) -> Any:
        said.append(capsys.readouterr().err)
        return build(*args)

    monkeypatch.setattr(planning, "_build", noted)
    config = tiny_config(shards, sd__loss="lpips-vgg", weights__lpips=str(tmp_path / "vgg.pth"))
    path = write_config(tmp_path / "plan.yaml", config)
    assert main(["--cfg", str(path), "--out", str(tmp_path / "run"), "--plan"]) == 2
    assert "vgg.pth" in said[0]
    assert "  MISSING     " in capsys.readouterr().out and not (tmp_path / "run").exists()
