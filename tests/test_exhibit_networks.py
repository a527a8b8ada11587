"""Figures that draw from saved weights. Without these a row could show another latent than it says, two runs unlike
latents, and students other images than their teacher.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_commands import config, run_folder, shards  # noqa: F401
from test_report import command
from test_sdakd import finished, lists  # noqa: F401

from sdtrain.commands import evolution, exhibits, strip_sheet
from sdtrain.commands.material import Material
from sdtrain.commands.report import add_arguments
from sdtrain.commands.results import read_runs
from sdtrain.errors import RunError

SETTINGS = ["--latents", "6", "--interplay-latents", "12", "--extremes", "4", "--lpips", "random", "--device", "cpu"]


def altered(run: Path, to: Path, **keys: Any) -> Path:
    """A copy of a run whose configuration says something else."""
    shutil.copytree(run, to)
    tree = yaml.safe_load((to / "config.yaml").read_text())
    for key, value in keys.items():
        *outer, last = key.split("__")
        inner = tree
        for part in outer:
            inner = inner[part]
        inner[last] = value
    (to / "config.yaml").write_text(yaml.safe_dump(tree))
    return to


@pytest.fixture(scope="module")
def pair(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:  # noqa: F811
    """The distilled run, and the same weights under the name of a baseline."""
    root = tmp_path_factory.mktemp("pair")
    return [altered(run_folder, root / "sd"), altered(run_folder, root / "base", sd__alpha=0.0)]


def material(*runs: Path, more: tuple[str, ...] = ()) -> Material:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found, notes = read_runs(runs)
    return Material(found, parser.parse_args(["x", *SETTINGS, *more]), notes)


def test_table_3_is_the_measured_variation_in_the_row_of_its_configuration(pair):
    asked = material(*pair)
    table, origins = evolution.table3(asked)
    rows = {row[1]: row[2:] for row in table.rows if row[0] == "other images"}
    assert set(rows) == {"StyleGAN2-ADA", "StyleGAN2-ADA+SD_L1"} and rows["StyleGAN2-ADA"][1] == "-"
    expected = evolution.variations(asked)[0][2]
    (row,) = evolution.measured(asked.runs[0], expected).rows
    assert row.values == {"variation": expected.mean, "variation_std": expected.deviation}
    assert rows["StyleGAN2-ADA"][0] == f"{expected.mean:.3f} +- {expected.deviation:.3f}"
    assert ["FFHQ", "ProjectedGAN", "-", "0.470 +- 0.028"] in table.rows
    how = "LPIPS of random weights between consecutive weights at 20,40,60,80,100 % of training, 6 latents"
    assert how in table.caption
    assert {row[1] for row in origins.rows} == {"sd", "base"}


def test_an_evolution_shows_the_latents_nearest_to_the_mean_baseline_above(pair):
    asked = material(*pair)
    (figure,) = evolution.figure10(asked)
    by_run = {run.name: v.per_latent for run, _, v in evolution.variations(asked)}
    rows = figure.points.rows
    assert [row[0] for row in rows] == ["base"] * 3 + ["sd"] * 3
    for run, values in by_run.items():
        chosen = [int(row[2]) for row in rows if row[0] == run]
        away = (values - values.mean()).abs()
        assert sorted(away[chosen].tolist()) == sorted(away.tolist())[:3]
    assert evolution.figure11(asked) == [], "no other model"
    (single,) = evolution.figure7(asked)
    assert [row[2] for row in single.points.rows] == [rows[0][2], rows[3][2]]
    drawn = figure.draw()
    assert [ax.get_title() for ax in drawn.axes[:2]] == ["40%", "100%"] and len(drawn.axes) == 12


def test_the_images_of_an_evolution_are_those_of_the_weights_of_each_share(pair):
    asked = material(pair[0])
    ((run, _, v),) = evolution.variations(asked)
    images = evolution.evolving(asked, run, v, [4, 1])
    for column, folder in enumerate(v.folders.values()):
        direct = evolution.Source(folder, torch.device("cpu"))([4, 1]).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.stack([images[0][column], images[1][column]]), direct)
    assert not np.array_equal(images[0][0], images[0][1])


def test_what_takes_long_is_done_once_for_all_figures(pair, monkeypatch):
    calls = []
    real = evolution.snapshots.variation
    monkeypatch.setattr(evolution.snapshots, "variation", lambda run, *more: calls.append(run.name) or real(run, *more))
    asked = material(*pair)
    exhibits.fill(["sdgan-table3", "sdgan-fig7", "sdgan-fig10"], asked)
    assert sorted(calls) == ["base", "sd"]


def test_figure_9_has_the_values_that_figure_6_leaves_out_and_baselines_are_in_neither(pair):
    asked = material(*pair)
    (plain,), (full,) = evolution.figure6(asked), evolution.figure9(asked)
    texts = [{ax.get_xlabel() for ax in figure.draw().axes} - {""} for figure in (plain, full)]
    assert texts[0] == set() and len(texts[1]) == 8 and all("L_SD" in text for text in texts[1])
    assert len(full.points.rows) == 16 and "sd" in full.caption and "(LPIPS of random weights)" in full.caption


def test_two_runs_side_by_side_have_the_same_latents_whatever_their_seeds(pair, tmp_path, monkeypatch):
    other = altered(pair[0], tmp_path / "other", seed=99)
    shown = []
    monkeypatch.setattr(evolution.image_sheets, "side_by_side", lambda sheets, columns: shown.append(sheets))
    (figure,) = evolution.figure12(material(pair[1], other))
    figure.draw()
    (sheets,) = shown
    assert [sheet.name for sheet in sheets] == ["StyleGAN2-ADA (base)", "StyleGAN2-ADA+SD_L1 (other)"]
    assert torch.equal(sheets[0].images, sheets[1].images), "one set of weights, one set of latents"
    assert len(sheets[0].images) == 12 and "trained from scratch" in figure.caption


def test_two_distilled_runs_are_set_side_by_side_where_there_is_no_baseline(pair, tmp_path):
    other = altered(pair[0], tmp_path / "l2", sd__loss="l2")
    (figure,) = evolution.figure12(material(pair[0], other, altered(pair[0], tmp_path / "again", seed=8)))
    heads = {ax.get_title() for ax in figure.draw().axes}
    assert heads == {"StyleGAN2-ADA+SD_L1 (sd)", "StyleGAN2-ADA+SD_L2 (l2)"}


def test_runs_that_draw_from_unlike_latents_are_not_shown_beside_each_other(pair, tmp_path, monkeypatch):
    other = altered(pair[0], tmp_path / "other")
    real = evolution.Source.latents
    wider = lambda self, k: (real(self, k)[0].repeat(1, 1 + (other in self.file.parents)), None)  # noqa: E731
    monkeypatch.setattr(evolution.Source, "latents", wider)
    monkeypatch.setattr(evolution.Source, "__call__", lambda self, k: torch.zeros(len(k), 3, 8, 8))
    asked = material(pair[1], other)
    assert evolution.figure12(asked) == []
    assert (
        "Figure 12 of SD-GAN: base and other draw from unlike latents, and are not shown beside each other"
        in asked.notes
    )


def test_a_run_without_weights_is_a_sentence_and_the_others_are_shown(pair, tmp_path):
    empty = altered(pair[0], tmp_path / "empty", seed=3)
    for name in ("checkpoints", "snapshots", "best"):
        shutil.rmtree(empty / name, ignore_errors=True)
    asked = material(*pair, empty)
    evolution.table3(asked)
    assert any("empty has weights at 0 of the shares" in note for note in asked.notes)
    with pytest.raises(RunError, match="none of these runs has saved weights"):
        exhibits.fill(["sdgan-fig7"], material(empty))


def test_all_of_a_trained_pair_is_one_page(pair, tmp_path):
    out = tmp_path / "all.html"
    assert command("report", "all", *SETTINGS, "--runs", *pair, "--out", out) == 0
    text = out.read_text()
    for number in (6, 7, 9, 10, 12):
        assert f"<h2>Figure {number} of SD-GAN" in text
    assert text.count("data:image/png;base64,") == len(list(tmp_path.glob("all_*.png"))) == 5


# Super-resolution


@pytest.fixture(scope="module")
def students(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:  # noqa: F811
    """The run of a student of half the width, and the same weights under the name of a quarter."""
    root = tmp_path_factory.mktemp("students")
    return [altered(finished, root / "half"), altered(finished, root / "quarter", student__C="1/4")]


def test_figure_4_of_sdakd_has_inputs_teacher_students_by_width_and_the_truth(students, monkeypatch):
    shown = []
    monkeypatch.setattr(strip_sheet, "rows_of_images", lambda rows, heads: shown.append((rows, heads)))
    before = sorted(path for run in students for path in run.rglob("*"))
    (figure,) = strip_sheet.figure4(material(*reversed(students)))
    figure.draw()
    ((rows, heads),) = shown
    assert heads == ["LQ 1/4", "teacher", "1/2", "1/4", "ground truth"]
    assert len(rows) == 6, "three images with details"
    whole, detail = rows[0].images, rows[1].images
    assert [len(image) for image in whole] == [8, 32, 32, 32, 32] and [len(image) for image in detail] == [2, *[10] * 4]
    assert np.array_equal(whole[2], whole[3]) and not np.array_equal(whole[1], whole[2])
    places = [(y, x) for y in range(23) for x in range(23) if equal(whole[4], detail[4], y, x)]
    assert any(equal(whole[2], detail[2], *place) for place in places), "details are of one place in all columns"
    assert "of the test list of half" in figure.caption
    assert sorted(path for run in students for path in run.rglob("*")) == before, "nothing is written into a run"


def equal(whole: Any, part: Any, y: int, x: int) -> bool:
    return np.array_equal(whole[y : y + len(part), x : x + len(part)], part)


def test_inputs_that_a_run_has_not_stored_are_made_elsewhere(students, tmp_path):
    run = altered(students[0], tmp_path / "bare")
    shutil.rmtree(run / "inputs")
    (figure,) = strip_sheet.figure4(material(run))
    (stored,) = strip_sheet.figure4(material(students[0]))
    images = [[ax.get_images()[0].get_array() for ax in one.draw().axes] for one in (figure, stored)]
    assert all(np.array_equal(a, b) for a, b in zip(*images, strict=True)) and not (run / "inputs").exists()


def test_figure_4_goes_without_a_teacher_that_is_gone_and_says_so(students, tmp_path):
    run = altered(students[0], tmp_path / "taught", teacher={"generator": str(tmp_path / "gone.safetensors")})
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["stages"] = ["supervised", "adversarial"]
    tree["teacher"]["discriminator"] = str(tmp_path / "gone.safetensors")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    asked = material(run)
    (figure,) = strip_sheet.figure4(asked)
    assert "Figure 4 of SDAKD has no teacher: its weights are not where the configurations say" in asked.notes
    assert [ax.get_title() for ax in figure.draw().axes[:3]] == ["LQ 1/4", "1/2", "ground truth"]


def test_images_that_a_run_folder_names_by_address_are_not_fetched_for_figure_4(students, tmp_path):
    run = altered(students[0], tmp_path / "far", data__test="http://127.0.0.1:9/all.tar")
    asked = material(run)
    assert strip_sheet.figure4(asked) == []
    assert any("a run folder may come from anyone" in note.replace("\n", " ") for note in asked.notes)


def test_table_3_of_sdakd_measures_runs_with_the_teacher_of_their_configuration(students, finished, tmp_path):  # noqa: F811
    asked = material(finished, students[0], more=("--passes", "2", "--size", "16x16"))
    (part,) = exhibits.fill(["sdakd-table3"], asked)
    rows = {row[0]: row for row in part.blocks[0].rows}
    assert rows["1"][1].startswith("teacher of ") and rows["1"][6] == "1.00x"
    assert float(rows["1/2"][5].rstrip("x")) > 2 and rows["1/2"][7] == "1.77x"
    assert "input 16x16" in part.blocks[0].caption
