"""Named tables and figures from what runs have written. Without these numbers of unlike machines could share a column,
runs of unlike protocols a curve, and what is missing could go unnoticed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_papers import configured, line
from test_report import STRANGE, command, gan, page, protocol, refusal, write

from sdtrain.commands import d_outputs, exhibits, figures
from sdtrain.commands.material import Material
from sdtrain.commands.report import add_arguments
from sdtrain.commands.results import read_runs
from sdtrain.errors import RunError

H100 = "NVIDIA H100 80GB HBM3"
ARMS = {"base": "sdgan_projected_baseline", "l1": "sdgan_projected_l1", "sd": "sdgan_projected"}


def started(run: Path, *starts: dict[str, Any]) -> Path:
    """Write environment.json: what each start ran on, by default one H100."""
    engine = {"name": "ddp", "precision": "fp32", "summation": "fast", "device": "cuda:0"}
    plain = {"devices": [H100], "world_size": 1, "threads": [8], "engine": engine, "float32": {"cudnn.conv": "ieee"}}
    entries = [{**plain, **one, "engine": {**engine, **one.get("engine", {})}} for one in starts or ({},)]
    (run / "environment.json").write_text(json.dumps({"starts": entries}))
    return run


def timed(folder: Path, cfg: str, seconds: list[float], *starts: dict[str, Any], gb: float = 4.0, **keys: Any) -> Path:
    """A finished run with one tick a value; from the third on memory is that of an evaluation."""
    rows = []
    for number, value in enumerate(seconds, 1):
        more = {"peak_mem_gb": gb, "data_wait_frac": 0.1} if number < 3 else {"peak_mem_gb": 99.0, "sec/evaluate": 5.0}
        rows.append({"kind": "perf", "seen_img": 100 * number, "stage": "main", "sec_per_kimg": value, **more})
    rows.append({"kind": "train", "seen_img": 100 * len(seconds), "stage": "main", "G/adv": 1.0})
    return started(configured(write(folder, rows, 100 * len(seconds)), cfg, **keys), *starts)


def columns(text: str) -> list[str]:
    return next(part for part in text.splitlines() if part.startswith("| Method")).strip("| ").split(" | ")


# Table 2


def test_seconds_are_the_median_after_the_first_tick_and_memory_is_that_before_an_evaluation(tmp_path):
    runs = [timed(tmp_path / "base", ARMS["base"], [900.0, 20.0, 22.0, 21.0])]
    runs += [timed(tmp_path / "l1", ARMS["l1"], [900.0, 42.0, 42.0], gb=5.0)]
    runs += [
        timed(tmp_path / f"sd{i}", ARMS["sd"], [900.0, 62.0 + 2 * i, 62.0 + 2 * i], gb=6.0, seed=i) for i in (0, 1)
    ]
    text = page(tmp_path, "sdgan-table2", "--runs", *runs)
    assert columns(text)[1:5] == [r"ProjectedGAN \[a\] s/kimg", "published", r"ProjectedGAN \[a\] GB", "published"]
    assert line(text, "baseline")[1:5] == ["21.00", "18.78 s", "4.00", "7.45 GB"]
    assert line(text, "SD-GAN_L1")[1:3] == ["42.00", "22.20 s"]
    assert line(text, "SD-GAN")[1:5] == ["63.00 +- 1.41 (2)", "28.33 s", "6.00 +- 0.00 (2)", "9.38 GB"]
    assert line(text, "SD-GAN overhead")[1:5] == ["+200.0%", "+50.9%", "+50.0%", "+25.9%"]
    assert line(text, "SD-GAN_L1 overhead")[1:5] == ["+100.0%", "+18.2%", "+25.0%", "+18.3%"]
    assert "a baseline: seed 1 is missing" in text and H100 in text


UNLIKE = {
    "device": {"devices": ["NVIDIA A100"]},
    "world size": {"world_size": 8},
    "precision": {"engine": {"precision": "bf16"}},
    "sums": {"engine": {"summation": "exact"}},
    "products": {"float32": {"cudnn.conv": "tf32"}},
}


@pytest.mark.parametrize("what", UNLIKE)
def test_numbers_of_unlike_machines_never_share_a_column(what, tmp_path):
    runs = [
        timed(tmp_path / "base", ARMS["base"], [1.0, 10.0]),
        timed(tmp_path / "sd", ARMS["sd"], [1.0, 20.0], UNLIKE[what]),
    ]
    text = page(tmp_path, "sdgan-table2", "--runs", *runs)
    assert {r"ProjectedGAN \[a\] s/kimg", r"ProjectedGAN \[b\] s/kimg"} <= set(columns(text))
    assert line(text, "baseline")[1:8:2] == ["10.00", "4.00", "-", "-"]
    assert line(text, "SD-GAN")[1:8:2] == ["-", "-", "20.00", "4.00"]
    assert line(text, "SD-GAN overhead")[1:8:2] == ["-"] * 4


def test_other_data_batches_and_sides_have_columns_of_their_own(tmp_path):
    runs = [timed(tmp_path / "base", ARMS["base"], [1.0, 10.0])]
    runs += [timed(tmp_path / "church", "sdgan_projected_church", [1.0, 11.0])]
    runs += [timed(tmp_path / "batch", ARMS["sd"], [1.0, 12.0], batch_size=32)]
    text = page(tmp_path, "sdgan-table2", "--runs", *runs)
    assert len([name for name in columns(text) if name.startswith("ProjectedGAN") and "s/kimg" in name]) == 3


def test_runs_that_moved_or_do_not_say_where_they_ran_are_named_and_left_out(tmp_path):
    good = timed(tmp_path / "good", ARMS["base"], [1.0, 10.0])
    moved = timed(tmp_path / "moved", ARMS["sd"], [1.0, 10.0], {}, {"devices": ["NVIDIA A100"]})
    silent = timed(tmp_path / "silent", ARMS["sd"], [1.0, 10.0], {"devices": None})
    bare = timed(tmp_path / "bare", ARMS["sd"], [1.0, 10.0])
    (bare / "environment.json").unlink()
    broken = timed(tmp_path / "broken", ARMS["sd"], [1.0, 10.0])
    (broken / "environment.json").write_text("{")
    mute = started(configured(gan(tmp_path / "mute", [3.0]), ARMS["sd"]))
    half = timed(tmp_path / "half", ARMS["sd"], [1.0, 10.0])
    (half / "plan.json").write_text('{"stages": [{"end_img": 900}]}')
    text = page(tmp_path, "sdgan-table2", "--runs", good, moved, silent, bare, broken, mute, half)
    assert line(text, "SD-GAN")[1] == "-" and line(text, "baseline")[1] == "10.00"
    assert "moved is left out of Table 2: it was trained in several ways (1 rank(s) on NVIDIA H100" in text
    assert "silent is left out of Table 2: it does not say which device it ran on" in text
    assert "bare is left out of Table 2: without its environment.json nobody knows what it ran on" in text
    assert "broken is left out of Table 2: its environment.json is damaged" in text
    assert "mute is left out of Table 2: it has no timing rows" in text
    assert "half is left out: it is unfinished (200 of 900 images)" in text


def test_the_device_of_an_earlier_version_is_read_from_its_checkpoint(tmp_path):
    run = timed(tmp_path / "old", ARMS["base"], [1.0, 10.0], {"devices": None})
    saved = run / "checkpoints" / "img_000000200"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"origin": {"devices": ["NVIDIA V100"]}}))
    (saved / "complete.json").write_text("{}")
    assert "NVIDIA V100" in page(tmp_path, "sdgan-table2", "--runs", run)


def test_a_baseline_that_logs_L_SD_is_no_measure_of_the_baseline(tmp_path):
    run = timed(tmp_path / "base", ARMS["base"], [1.0, 10.0], sd__log=True)
    assert "base computes L_SD to log it (sd.log): as a baseline it looks too slow" in page(
        tmp_path, "table2", "--runs", run
    )


# Figures 3 to 5


def curve(folder: Path, values: list[float], cfg: str, total: int | None = None, **keys: Any) -> Path:
    own = {key: keys.pop(key) for key in ("num_fake", "real_hash") if key in keys}
    return configured(gan(folder, values, total, **own), cfg, **keys)


def made(name: str, *runs: Path) -> tuple[list[Any], list[str]]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found, notes = read_runs(runs)
    parts = exhibits.fill([name], Material(found, parser.parse_args(["x"]), notes))
    return list(parts[0].blocks), notes


def test_figure_3_has_the_best_of_each_curve_and_when_it_reaches_the_baselines(tmp_path):
    base = curve(tmp_path / "base", [9.0, 8.0, 6.0, 5.0], ARMS["base"])
    sd = [curve(tmp_path / f"sd{i}", [7.0 + i, 4.0 + i, 3.0 + i, 3.5 + i], ARMS["sd"], seed=i) for i in (0, 1)]
    (table, figure), notes = made("fig3", base, *sd)
    assert [row[2:] for row in table.rows] == [
        ["baseline", "5.000", "400", "1", "-", "-"],
        ["SD", "3.500", "300", "2", "50%", "~32%"],
    ]
    assert any("baseline: seed 1 is missing" in note for note in notes)
    (ax,) = [ax for ax in figure.draw().axes if ax.get_visible()]
    assert ax.get_yscale() == "log"
    dashed = [shown for shown in ax.get_lines() if shown.get_linestyle() == "--"]
    assert [shown.get_ydata()[0] for shown in dashed] == [5.0, 3.5]
    assert figure.points.rows[1][2:5] == ["baseline", "200", "8"]
    assert [row[4] for row in figure.points.rows if row[2] == "SD"] == ["7.5", "4.5", "3.5", "4"]


def test_data_sets_models_and_sides_have_panels_of_their_own(tmp_path):
    runs = [
        curve(tmp_path / "a", [5.0], ARMS["sd"]),
        curve(tmp_path / "b", [4.0], "sdgan_projected_church", real_hash="y"),
    ]
    runs += [curve(tmp_path / "c", [3.0], "stylegan2/sd_paper256"), curve(tmp_path / "d", [2.0], "ablation/lpips")]
    (table, figure), _ = made("fig3", *runs)
    assert len({tuple(row[:2]) for row in table.rows}) == 4
    assert len([ax for ax in figure.draw().axes if ax.get_visible()]) == 4


def test_a_curve_of_another_protocol_or_of_several_is_left_out_with_the_reason(tmp_path):
    runs = [curve(tmp_path / name, [5.0], cfg) for name, cfg in ARMS.items()]
    odd = curve(tmp_path / "odd", [1.0], ARMS["sd"], seed=1, num_fake=7)
    mixed = curve(tmp_path / "mixed", [1.0], ARMS["sd"], seed=2)
    with (mixed / "metrics.jsonl").open("a") as file:
        row = {"kind": "eval", "seen_img": 200, "split": "val", "fid": 0.5, "protocol": protocol(num_fake=9)}
        file.write(json.dumps(row) + "\n")
    (table, _), notes = made("fig3", *runs, odd, mixed)
    assert [row[3] for row in table.rows] == ["5.000"] * 3
    assert "Figure 3, FID of odd is left out, measured otherwise: num_fake 100 and 7" in notes
    assert "Figure 3, FID of mixed is left out: its evaluations were measured in several ways" in notes


def test_runs_of_one_variant_and_seed_are_not_taken_for_repetitions(tmp_path):
    runs = [curve(tmp_path / name, [value], ARMS["sd"], sd__alpha=value) for name, value in (("a", 1.0), ("b", 2.0))]
    (table, _), notes = made("fig3", *runs)
    assert [row[2:4] for row in table.rows] == [["SD (a)", "1.000"], ["SD (b)", "2.000"]]
    assert "a, b are all SD and share seeds: each has a curve of its own" in notes


def test_unfinished_runs_are_in_no_curve_and_a_damaged_last_row_is_left_out(tmp_path):
    half = curve(tmp_path / "half", [1.0], ARMS["sd"], total=900)
    torn = curve(tmp_path / "torn", [5.0, 4.0], ARMS["sd"], seed=1)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "seen_img": 300, "split": "val", "fid": 0.1, "prot')
    (table, _), notes = made("fig3", half, torn)
    assert [row[2:4] for row in table.rows] == [["SD", "4.000"]]
    assert "torn: left out rows that are no JSON objects (1)" in notes
    assert "half is left out: it is unfinished (100 of 900 images)" in notes


def test_figure_4_has_fine_tuned_runs_alone_and_figure_5_places_with_ablations(tmp_path):
    tuned = curve(tmp_path / "tuned", [5.0], "finetune/sg2_ffhq256_to_celebahq_sd")
    plain = curve(tmp_path / "plain", [4.0], ARMS["sd"])
    small = [curve(tmp_path / name, [3.0], f"ablation/{name}") for name in ("lpips", "l2", "ms_ssim", "lpips_plain")]
    (table, _), _ = made("fig4", tuned, plain)
    assert [row[1:3] for row in table.rows] == [["StyleGAN2-ADA", "SD"]]
    (table, figure), _ = made("fig5", tuned, plain, *small)
    assert [row[2] for row in table.rows] == ["SD", "SD without T", "SD_L2", "SD_MS-SSIM"]
    assert {row[0] for row in table.rows} == {"FFHQ at 128 px"}
    said = refusal_of(tmp_path, "fig5", plain)
    assert "none of these runs belongs to sdgan-fig5" in said


def refusal_of(tmp_path: Path, name: str, *runs: Path) -> str:
    with pytest.raises(RunError) as caught:
        made(name, *runs)
    return str(caught.value)


# Figures 2 and 3 of SDAKD


def judged(folder: Path, cfg: str, said: Any, seen: int = 100, **keys: Any) -> Path:
    """A finished run with D's outputs at `seen` images."""
    run = write(folder, [{"kind": "train", "seen_img": 100, "stage": "adversarial", "G/adv": 1.0}], 100)
    (run / "samples").mkdir()
    (run / "samples" / f"d_outputs_{seen:09d}.json").write_text(json.dumps(said))
    return configured(run, cfg, **keys)


def outputs(**judges: list[float]) -> dict[str, Any]:
    return {"seen_img": 100, **{name: {"probabilities": values} for name, values in judges.items()}}


def test_figure_3_of_sdakd_sets_the_students_judge_beside_the_teachers(tmp_path):
    ours = judged(tmp_path / "ours", "sdakd_gcfsr", outputs(D_T=[0.9] * 4, D_S=[0.4, 0.5, 0.6, 0.5]))
    (ours / "samples" / "d_outputs_000000050.json").write_text(json.dumps(outputs(D_S=[0.0] * 4)))
    wide = judged(tmp_path / "wide", "sdakd/gcfsr_ablation3", outputs(D_T=[0.9] * 4, D_T_judge=[0.1] * 4))
    photo = judged(tmp_path / "photo", "sdakd_realesrgan", outputs(D_S=[0.5] * 4))
    (table, figure), _ = made("sdakd-fig3", ours, wide, photo)
    found = {(row[0], row[1]): row[6] for row in table.rows}
    assert found == {
        ("GCFSR, C = 1/4", "SDAKD: student discriminator"): "0.500",
        ("GCFSR, C = 1/4", "Ablation 3: teacher discriminator"): "0.100",
        ("Real-ESRGAN, C = 1/4", "SDAKD: student discriminator"): "0.500",
    }
    axes = figure.draw().axes
    assert [ax.get_title() for ax in axes] == ["GCFSR, C = 1/4", "Real-ESRGAN, C = 1/4"]
    assert [row[3] for row in figure.points.rows if row[2] == "ours"] == ["0.4", "0.5", "0.6", "0.5"]


def test_figure_2_of_sdakd_compares_dcd_with_its_modification(tmp_path):
    runs = [judged(tmp_path / "dcd", "sdakd/gcfsr_dcd", outputs(D_T=[1.0, 0.5]))]
    runs += [judged(tmp_path / "mod", "sdakd/gcfsr_dcd_modified", outputs(D_T=[0.25, 0.75]))]
    (table, _), _ = made("sdakd-fig2", *runs)
    assert {row[1]: row[6] for row in table.rows} == {
        "DCD": "0.750",
        "DCD with modified adversarial training": "0.500",
    }


DAMAGED = [
    [],
    {},
    outputs(D_S=[]),
    outputs(D_S=[2.0]),
    outputs(D_S=["a"]),
    outputs(D_S=[None]),
    {"D_S": {"probabilities": "0"}},
]


@pytest.mark.parametrize("said", [*DAMAGED, outputs(D_T=[0.5])])
def test_outputs_that_are_damaged_or_of_another_judge_are_named(said, tmp_path):
    runs = [judged(tmp_path / "good", "sdakd_gcfsr", outputs(D_S=[0.5])), judged(tmp_path / "bad", "sdakd_gcfsr", said)]
    (table, _), notes = made("sdakd-fig3", *runs)
    assert [row[2] for row in table.rows] == ["good"]
    assert "Figure 3: bad is left out: d_outputs_000000100.json does not say what D_S thinks" in notes


def test_outputs_on_another_number_of_images_are_left_out(tmp_path):
    sizes = {"a": 4, "b": 4, "c": 7}
    runs = [
        judged(tmp_path / n, "sdakd_gcfsr", outputs(D_S=[0.5] * k), seed=i) for i, (n, k) in enumerate(sizes.items())
    ]
    (table, _), notes = made("sdakd-fig3", *runs)
    assert [row[2] for row in table.rows] == ["a", "b"]
    assert any(note.startswith("Figure 3: c is left out: its outputs are of 7 images, of most 4") for note in notes)
    assert d_outputs.newest(tmp_path / "nowhere") is None


# Table 3 of SDAKD


def case(name: str, feat: Any, seconds: list[float], **more: Any) -> dict[str, Any]:
    plain = {"kind": "rrdbnet", "options": {"num_feat": feat, "num_grow_ch": feat // 2 if isinstance(feat, int) else 1}}
    plain |= {"size": "64x64", "precision": "fp32", "backend": "eager", "threads": 1, "clock": "wall time"}
    width = feat if isinstance(feat, int) else 1
    return {"name": name, **plain, "parameters": width, "flops": width**2, "seconds": seconds, **more}


def speeds(file: Path, *calls: list[Any], device: str = H100) -> Path:
    setup = {"device": device, "torch": "2.15", "batch": 1}
    rows = [{"kind": "speed", "setup": setup, "cases": cases} for cases in calls]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_speed_up_is_the_median_of_the_ratios_of_a_round_beside_flops_and_what_is_printed(tmp_path):
    full, half = case("full", 64, [10.0, 20.0, 40.0]), case("half", 32, [5.0, 4.0, 40.0])
    text = page(tmp_path, "sdakd-table3", "--runs", speeds(tmp_path / "s.jsonl", [half, full]))
    assert line(text, "1/2")[5:] == ["4.00x", "2.00x", "1.77x"]
    assert line(text, "1")[5:] == ["1.00x", "1.00x", "1.00x"]
    assert line(text, "1/8")[1:] == ["-"] * 6 + ["2.08x"]
    assert H100 in text


def test_conditions_have_tables_of_their_own_and_of_several_calls_the_last_counts(tmp_path):
    both = lambda t, **more: [case("full", 64, [t, t], **more), case("half", 32, [1.0, 1.0], **more)]  # noqa: E731
    file = speeds(tmp_path / "a.jsonl", both(2.0), both(3.0), both(4.0, precision="bf16"), both(5.0, threads=2))
    other = speeds(tmp_path / "b.jsonl", both(6.0), device="NVIDIA A100")
    text = page(tmp_path, "sdakd-table3", "--runs", file, other)
    found = [part.split(" | ")[6] for part in text.splitlines() if part.startswith("| 1/2 |")]
    assert found == ["3.00x", "4.00x", "5.00x", "6.00x"]
    assert text.count("was measured more than once: the last call counts") == 1


def test_widths_without_a_teacher_fixed_growth_and_narrow_teachers_are_told(tmp_path):
    slim = case("slim", 16, [1.0, 1.0], options={"num_feat": 16, "num_grow_ch": 16})
    file = speeds(tmp_path / "s.jsonl", [case("half", 32, [2.0, 2.0]), slim])
    text = page(tmp_path, "sdakd-table3", "--runs", file)
    assert line(text, "1/2, growth fixed")[1] == "slim"
    assert "the widest Real-ESRGAN is half with num_feat 32, the paper's has 64" in text
    alone = speeds(tmp_path / "alone.jsonl", [case("one", 64, [1.0, 1.0])])
    assert "has one width, one: measure its teacher with it" in refusal_of(tmp_path, "sdakd-table3", alone)


BAD_CASES = [
    5,
    {},
    case("x", "64", [1.0, 1.0]),
    case("x", 32, [1.0]),
    case("x", 32, [0.0, 1.0]),
    case("x", 32, ["1", 1.0]),
    case("x", 32, [float("nan"), 1.0]),
    case("x", 32, [10**400, 1.0]),
    case("x", 32, [1.0, 1.0], flops=None),
    case("x", 32, [1.0, 1.0], kind="dragon"),
    case("x", 32, [1.0, 1.0], threads=[1]),
    {**case("x", 32, [1.0, 1.0]), "name": None},
]


@pytest.mark.parametrize("bad", BAD_CASES)
def test_a_damaged_case_is_left_out_and_counted(bad, tmp_path):
    file = speeds(tmp_path / "s.jsonl", [case("full", 64, [2.0, 2.0]), bad, case("half", 32, [1.0, 1.0])])
    text = page(tmp_path, "sdakd-table3", "--runs", file)
    assert "1 damaged cases" in text and line(text, "1/2")[6] == "2.00x"


def test_a_row_without_setup_or_cases_is_one_sentence(tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text('{"kind": "speed", "cases": 3}\n')
    assert "a row of `sdtrain speed` is damaged, and left out" in refusal_of(tmp_path, "sdakd-table3", file)


# Files


def everything(tmp_path: Path, name: str = "sd") -> list[Path]:
    runs = [timed(tmp_path / "r" / f"{name} {arm}", cfg, [1.0, 10.0, 10.0]) for arm, cfg in ARMS.items()]
    for run, best in zip(runs, (5.0, 4.0, 3.0)):
        with (run / "metrics.jsonl").open("a") as file:
            for at in (100, 200, 300):
                row = {"kind": "eval", "seen_img": at, "split": "val", "fid": best + 300 - at, "protocol": protocol()}
                file.write(json.dumps(row) + "\n")
    runs.append(judged(tmp_path / "r" / f"{name} faces", "sdakd_gcfsr", outputs(D_S=[0.5] * 9)))
    runs.append(
        speeds(tmp_path / "r" / "s.jsonl", [case(f"{name} full", 64, [2.0, 2.0]), case("half", 32, [1.0, 1.0])])
    )
    return runs


NAMED = ("sdgan-table1", "sdgan-table2", "sdgan-fig3", "sdakd-fig3", "sdakd-table3")


@pytest.mark.parametrize("suffix", [".md", ".html", ".tex", ".csv", ".png", ".svg"])
def test_every_named_thing_ends_in_every_form(suffix, tmp_path):
    runs = everything(tmp_path)
    for name in NAMED:
        out = tmp_path / f"{name}{suffix}"
        assert command("report", name, "--runs", *runs, "--out", out) == 0
        assert out.stat().st_size > 100, name
        if suffix == ".png":
            assert Image.open(out).size[0] > 300
        if "fig" in name and suffix in (".md", ".tex", ".html"):
            picture = tmp_path / f"{name}_{name}.png"
            assert picture.is_file() and (picture.name in out.read_text() or "base64" in out.read_text())
    if suffix == ".csv":
        assert "FFHQ at 256 px,ProjectedGAN,SD,200,103,0,1" in (tmp_path / "sdgan-fig3.csv").read_text()
    command("report", *NAMED, "--runs", *runs, "--out", tmp_path / f"all{suffix}")
    if suffix in (".png", ".svg"):
        assert {file.name for file in tmp_path.glob(f"all*{suffix}")} == {f"all_{name}{suffix}" for name in NAMED}


@pytest.mark.parametrize("suffix", [".md", ".html", ".tex", ".csv", ".svg"])
def test_strange_names_are_escaped_in_every_form_of_named_things(suffix, tmp_path):
    runs = everything(tmp_path, STRANGE)
    assert command("report", "all", "--runs", *runs, "--out", tmp_path / f"p{suffix}") == 0
    for file in tmp_path.glob(f"p*{suffix}"):
        text = file.read_text()
        assert "\n## h" not in text and "<script" not in text, file
        assert suffix == ".csv" or "b<b>$" not in text, file
    if suffix == ".html":
        assert not re.search(r'(?:src|href)="(?!data:)', (tmp_path / "p.html").read_text()), "the page is one file"


def test_all_is_one_page_with_a_sentence_for_each_thing_that_cannot_be_filled(tmp_path, monkeypatch, capsys):
    runs = everything(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command("report", "all", "--runs", *runs) == 0
    text = (tmp_path / "report.html").read_text()
    heads = re.findall("<h2>(.*?)</h2>", text)
    assert heads == [exhibits.EXHIBITS[name].title for name in exhibits.EXHIBITS if name in NAMED]
    said = re.findall("<li>(.*?)</li>", text)
    for name in set(exhibits.EXHIBITS) - set(NAMED):
        assert sum(re.search(rf"\b{name}\b", one) is not None for one in said) == 1, (name, said)
    assert text.count("<img") == 2


def test_names_are_of_one_paper_or_of_both_and_unknown_ones_are_listed(tmp_path, capsys):
    assert exhibits.wanted("fig3") == ["sdgan-fig3", "sdakd-fig3"] and exhibits.wanted("all") == list(exhibits.EXHIBITS)
    said = refusal(capsys, "report", "fig99", "--runs", tmp_path)
    assert said.startswith("sdtrain: there is no table or figure 'fig99': use sdgan-table1") and "\n" not in said
    assert "all is of a paper: say which runs fill it with --runs RUN ..." in refusal(capsys, "report", "all")


def test_pages_do_without_matplotlib_and_pictures_say_what_they_need(tmp_path, monkeypatch, capsys):
    runs = everything(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page(tmp_path, "fig3", "--runs", *runs)
    assert text.count("there are no pictures") == 1 and "best FID" in text
    said = refusal(capsys, "report", "fig3", "--runs", *runs, "--out", tmp_path / "p.png")
    assert "a picture needs matplotlib" in said and "\n" not in said.rsplit("sdtrain: ", 1)[1]


def test_fifty_runs_fill_everything_that_needs_no_networks_without_torch(tmp_path):
    for n in range(50):
        rows: list[Any] = [{"kind": "perf", "seen_img": i, "sec_per_kimg": 9.0, "peak_mem_gb": 1.0} for i in range(500)]
        about = {"kind": "eval", "split": "val", "fid": 9.0, "protocol": protocol()}
        rows += [{**about, "seen_img": i} for i in range(500)]
        started(configured(write(tmp_path / f"r{n}", rows), ARMS["sd"], seed=n))
    code = "import sys, time; from sdtrain import cli; assert cli.main(sys.argv[1:]) == 0;"
    code += "assert 'torch' not in sys.modules; print('seconds of work:', time.process_time())"
    words = ["report", "all", "--runs", *map(str, tmp_path.glob("r*")), "--out", str(tmp_path / "p.html")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rsplit(" ", 1)[1]) < 10, done.stdout.splitlines()[-1]


def test_every_variant_has_one_colour_in_all_figures(tmp_path):
    curves = [figures.Curve("FFHQ", "M", v, v.removeprefix("+") or "baseline", (), []) for v in ("+SD", "")]
    assert figures.colours_of(curves) == {"SD": "C2", "baseline": "C0"}
