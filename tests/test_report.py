"""`sdtrain report`: tables and curves. Without these a teacher's number could pass for its student's, numbers that do
not compare could share a table, and a row cut short or a strange name could break a page or end in a traceback.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdtrain import cli
from sdtrain.commands import plots, results, tables

STRANGE = "a|b<b>$x_1$`c`\\d*e*[f](g)\n## h"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables alone, for tests that do not look at pictures."""
    monkeypatch.setattr(plots, "curves", lambda *_: False)


def command(*words: object) -> int:
    return cli.main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The sentence with which a command refuses; its exit code must be that of a user error."""
    capsys.readouterr()
    assert command(*words) == 2
    return capsys.readouterr().err.strip()


def page(tmp_path: Path, *words: object) -> str:
    assert command("report", *words, "--out", tmp_path / "page.md") == 0
    return (tmp_path / "page.md").read_text()


def protocol(**changes: Any) -> dict[str, Any]:
    return {"metrics": ["fid"], "num_fake": 100, "num_real": 50, "real_hash": "x", "latents_seed": 0, **changes}


def write(folder: Path, rows: list[Any], total: int | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if total is not None:
        (folder / "plan.json").write_text(json.dumps({"stages": [{"name": "main", "end_img": total}]}))
    return folder


def gan(folder: Path, values: list[float], total: int | None = None, **changes: Any) -> Path:
    """A run folder with evaluations every 100 images and one loss."""
    rows: list[Any] = []
    for number, value in enumerate(values, 1):
        rows.append({"kind": "train", "seen_img": 100 * number, "stage": "main", "G/adv": 1 / number, "G/loss": 5.0})
        more = {"fid": value, "rfid": 2 * value, "rfid_std": 0.5, "precision": 0.5}
        rows.append({"kind": "eval", "seen_img": 100 * number, "split": "val", **more, "protocol": protocol(**changes)})
    return write(folder, rows, total)


def of_split(split: str) -> dict[str, Any]:
    return {"split": split, "protocol": {"split": split, "num_images": 9, "real_hash": split, "lq": "down_up"}}


def sdakd(folder: Path, stages: dict[str, list[float]], test: float) -> Path:
    """A GCFSR run: validation in each stage, then bicubic, teacher and student on the test list."""
    rows: list[Any] = []
    fids = lambda fid: {"fid": fid, "fid_64": fid + 8, "fid_16": fid - 8}  # noqa: E731
    seen = 0
    for stage, values in stages.items():
        for value in values:
            seen += 10
            rows.append({"kind": "train", "seen_img": seen, "stage": stage, "G/sup": 1.0})
            rows.append({"kind": "eval", "seen_img": seen, "stage": stage, **fids(value), **of_split("val")})
    for method, value in (("bicubic", 150.0), ("teacher", 31.0)):
        rows.append({"kind": "baseline", "seen_img": seen, "stage": stage, "method": method} | fids(value))
        rows[-1] |= of_split("test")
    rows.append({"kind": "eval", "seen_img": seen, "stage": stage, **fids(test), **of_split("test")})
    return write(folder, rows)


# Tables


@pytest.mark.parametrize("where", ["features", "fid"])
def test_a_distance_in_features_of_a_random_network_is_not_called_that_of_papers(where, tmp_path, undrawn):
    random = {where: {"extractor": "random-inception", "tap": 64, "seed": 0}}
    said = page(tmp_path, gan(tmp_path / "small", [2.0, 1.0], **random))
    precision = "Precision in random features" if where == "features" else "Precision"
    assert f"| FID in random features down | rFID down | {precision} up |" in said and "| FID down" not in said
    assert "by FID in random features, " in said
    assert "| FID down | rFID down |" in page(tmp_path, gan(tmp_path / "usual", [2.0, 1.0]))


@pytest.mark.parametrize(
    "key, protocol, name",
    [
        ("recall", {"pr_features": {"extractor": "vgg16"}, "features": {"extractor": "random-inception"}}, "Recall"),
        ("recall", {"features": {"extractor": "random-inception"}}, "Recall in random features"),
        ("fid_16", {"fid": {"extractor": "random-inception"}}, "FID x16 in random features"),
        ("fd_lite0", {"features": {"extractor": "random-inception"}}, "FD-Lite0"),
        ("lpips", {"lpips": "alex, random"}, "LPIPS of random weights"),
        ("lpips", {"lpips": "alex, download"}, "LPIPS"),
        ("fid", {"features": "not a dict"}, "FID"),
    ],
)
def test_a_measurement_is_named_by_what_its_protocol_says_of_it(key, protocol, name):
    assert results.called(key, protocol) == name


def test_a_students_number_is_from_its_own_stage_and_the_teachers_has_a_line_of_its_own(tmp_path, undrawn):
    stages = {"teacher": [40.0, 30.0], "supervised": [90.0, 80.0], "adversarial": [60.0, 50.0, 55.0]}
    said = page(tmp_path, sdakd(tmp_path / "half", stages, 52.0), sdakd(tmp_path / "plain", {"naive": [70.0]}, 72.0))
    val, test = said.split("Split test:")
    assert "| Run | Network | Stage | images | FID down | FID x16 down | FID x64 down |" in val
    assert "| half | teacher | teacher | 20 | 30.000 | 22.000 | 38.000 |" in val
    assert "| half | student | supervised | 40 | 80.000 | 72.000 | 88.000 |" in val
    assert "| half | student | adversarial | 60 | 50.000 | 42.000 | 58.000 |" in val
    assert "| plain | student | naive | 10 | 70.000 | 62.000 | 78.000 |" in val
    assert "| half | bicubic | - | - | 150.000 | 142.000 | 158.000 |" in test
    assert "| half | teacher | - | - | 31.000 | 23.000 | 39.000 |" in test
    assert "| half | student | adversarial | 70 | 52.000 | 44.000 | 60.000 |" in test
    assert "| plain | student | naive | 10 | 72.000 | 64.000 | 80.000 |" in test
    assert "plain | bicubic" not in test, "the same images enlarged the same way are one line"
    assert "plain | teacher" not in test, "nor is one teacher of two students listed twice"
    assert "52.000" not in val and "50.000" not in test.replace("150.000", "")


def test_the_legend_names_those_who_have_a_line(tmp_path, monkeypatch):
    named: list[list[str]] = []
    monkeypatch.setattr(plots, "legend", lambda figure, colours, *rest: named.append(list(colours)))
    run, file = gan(tmp_path / "run", [5.0, 4.0]), tmp_path / "later.jsonl"
    file.write_text(json.dumps({"kind": "eval", "measured": "run", "fid": 3.0, "protocol": protocol(split="test")}))
    assert plots.curves(results.read_runs([run, file])[0], tmp_path / "curves.png", None, [])
    assert named == [["run"]]


def test_a_row_of_evaluate_belongs_to_the_split_its_protocol_names(tmp_path, undrawn):
    one = {"kind": "eval", "measured": "runs/a", "weights": "ema", "fid": 9.0, "bicubic": {"fid": 99.0}}
    two = {"kind": "eval", "measured": "runs/b", "weights": "raw", "fid": 8.0}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "protocol": protocol(split="test")}) + "\n" for row in (one, two)))
    said = page(tmp_path, file)
    assert "Split val" not in said and "Split test: last evaluation" in said
    assert "| rows: a | G_ema | - | - | 9.000 |" in said
    assert "| rows: a | bicubic | - | - | 99.000 |" in said
    assert "| rows: b | G | - | - | 8.000 |" in said


def test_subjects_of_a_file_are_called_by_as_many_last_parts_as_tell_them_apart(tmp_path):
    file, paths = tmp_path / "rows.jsonl", ("x/a/one", "x/a/one/", "y/a/one", "two")
    rows = ({"kind": "eval", "measured": path, "seen_img": 10, "fid": 9.0, "protocol": protocol()} for path in paths)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [run.name for run in results.read_runs([file])[0]] == ["rows: x/a/one", "rows: y/a/one", "rows: two"]


def test_a_run_and_files_that_are_called_like_it_stay_apart(tmp_path):
    run, files = gan(tmp_path / "x", [5.0]), [tmp_path / "x.jsonl", tmp_path / "x.json"]
    for file in files:
        file.write_text(json.dumps({"kind": "eval", "measured": "run", "fid": 3.0, "protocol": protocol()}))
    assert [found.name for found in results.read_runs([run, *files])[0]] == ["x", "x.jsonl", "x.json"]


def test_the_report_has_the_best_evaluation_of_each_run_and_a_picture(tmp_path):
    said = page(tmp_path, gan(tmp_path / "sd", [9.0, 3.25, 4.0]), gan(tmp_path / "baseline", [9.0, 8.0, 7.5]))
    assert "Split val: best evaluation of each run by FID, 100 generated against 50 real images." in said
    assert "| sd | 200 | 3.250 | 6.500 +- 0.500 | 0.500 |" in said
    assert "| baseline | 300 | 7.500 | 15.000 +- 0.500 | 0.500 |" in said
    assert "![page](page.png)" in said
    assert np.asarray(Image.open(tmp_path / "page.png")).shape[1] > 1000


def test_the_best_row_is_that_of_the_metric_that_chose_the_weights(tmp_path, undrawn):
    values = {1: (9.0, 20.0), 2: (5.0, 30.0), 3: (4.0, 25.0)}
    rows = [
        {"kind": "eval", "seen_img": i, "stage": "naive", "fid": fid, "psnr_y": psnr, **of_split("val")}
        for i, (fid, psnr) in values.items()
    ]
    by_psnr, by_fid = write(tmp_path / "by_psnr", rows), write(tmp_path / "by_fid", rows)
    stages = [{"name": "naive", "end_img": 3}]
    (by_psnr / "plan.json").write_text(json.dumps({"stages": stages, "select_by": "psnr_y"}))
    said = page(tmp_path, by_psnr)
    assert "each run by PSNR-Y" in said and "FID" not in said.split("| Run")[0]
    assert "| by_psnr | student | naive | 2 | 5.000 | 30.000 |" in said
    both = page(tmp_path, by_psnr, by_fid)
    assert "or FID, whichever chose the run's weights" in both
    assert "| by_psnr | student | naive | 2 |" in both and "| by_fid | student | naive | 3 |" in both


@pytest.mark.parametrize("out, written", [("tables", "tables.md"), (".", "report.md")])
def test_a_page_without_an_ending_is_markdown(out, written, tmp_path, undrawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(gan(tmp_path / "sd", [9.0])), "--out", out]) == 0
    assert "9.000" in (tmp_path / written).read_text()


def test_a_metric_that_should_be_high_is_best_where_it_is_highest(tmp_path, undrawn):
    rows = [{"kind": "eval", "seen_img": i, "stage": "naive", "psnr_y": 20 + i, **of_split("val")} for i in (1, 5, 2)]
    assert "| x | student | naive | 5 | 25.000 |" in page(tmp_path, write(tmp_path / "x", rows))


def test_what_is_not_finite_is_never_the_best(tmp_path, capsys, undrawn):
    said = page(tmp_path, gan(tmp_path / "a", [math.nan, -math.inf, 5.0, math.nan]))
    assert "| a | 300 | 5.000 |" in said
    assert "values that are not finite (6)" in capsys.readouterr().err
    said = page(tmp_path, gan(tmp_path / "b", [math.nan]))
    assert "| b | 100 | 0.500 |" in said and "nan" not in said.replace("values", "")


def test_an_unfinished_run_is_marked(tmp_path, undrawn):
    runs = [gan(tmp_path / "done", [5.0, 4.0], total=200), gan(tmp_path / "half", [6.0], total=200)]
    late = gan(tmp_path / "late", [6.0], total=150)  # its last tick was before its end, its last checkpoint was not
    (late / "checkpoints" / "img_000000150").mkdir(parents=True)
    (late / "checkpoints" / "img_000000150" / "complete.json").write_text("{}")
    said = page(tmp_path, *runs, late)
    assert "| done | 200" in said and "| half (unfinished: 100 of 200 images) | 100" in said and "| late | 100" in said


def test_numbers_of_unlike_protocols_have_tables_of_their_own(tmp_path, capsys):
    names = {"a": {}, "b": {"num_fake": 5000}, "c": {"latents_seed": 3}}
    said = page(tmp_path, *[gan(tmp_path / name, [1.0], **changes) for name, changes in names.items()])
    first, second = [part for part in said.split("\n\n") if part.startswith("| Run")]
    assert "| a |" in first and "| c |" in first and "| b |" not in first and "| b |" in second
    assert "- a and b: num_fake 100 and 5000" in said.splitlines()
    assert "sdtrain: note: a and b: num_fake 100 and 5000" in capsys.readouterr().err
    assert (tmp_path / "page.png").is_file()


def test_to_have_measured_a_metric_more_is_no_other_protocol(tmp_path, undrawn):
    nets = {"features": {"extractor": "inception", "tap": 2048}}
    more = {**nets, "metrics": ["fid", "rfid"], "rfid": {"seeds": [0]}}
    said = page(tmp_path, gan(tmp_path / "a", [1.0], **nets), gan(tmp_path / "b", [2.0], **more))
    assert said.count("| Run |") == 1
    other = {"features": {"extractor": "inception", "tap": 64}}
    said = page(tmp_path, gan(tmp_path / "c", [1.0], **nets), gan(tmp_path / "d", [2.0], **other))
    assert "c and d: features.tap 2048 and 64" in said


def test_a_run_without_evaluations_is_drawn_and_said(tmp_path):
    run = write(tmp_path / "young", [{"kind": "train", "seen_img": 4, "G/adv": 1.0}])
    assert "No run has been evaluated" in page(tmp_path, run)
    assert (tmp_path / "page.png").is_file()


# Curves


def test_the_best_of_a_curve_is_the_best_of_its_values_whatever_is_drawn(monkeypatch, tmp_path):
    values = [50.0 + 5 * (i % 2) for i in range(200)]
    values[120] = 7.0
    found = []
    monkeypatch.setattr(plots, "best_of", lambda *args, real=plots.best_of: found.append(real(*args)) or found[-1])
    for words in ([], ["--smooth", 31], ["--no-smooth"]):
        run = tmp_path / f"run{len(found)}"
        page(tmp_path, gan(run, values), *words)
    assert [item for item in found if item[1] == 7.0] == [(12100, 7.0)] * 3
    points = [(i, value, 0.0) for i, value in enumerate([0.5, 0.9, 0.7])]
    assert plots.best_of("precision", points) == (1, 0.9) and plots.best_of("fid", points) == (0, 0.5)


SMOOTHING = [([], 2), (["--smooth", "9"], 2), (["--smooth", "0"], 1), (["--no-smooth"], 1)]


@pytest.mark.parametrize(("words", "drawn"), SMOOTHING)
def test_smoothing_is_drawn_over_the_raw_values_and_can_be_turned_off(words, drawn, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    assert command("report", gan(tmp_path / "x", [9.0] * 150), "--out", tmp_path / "p.png", *words) == 0
    lines = next(ax for ax in figures[0].axes if ax.get_title() == "G/adv").lines
    raw = [1 / number for number in range(1, 151)]
    assert len(lines) == drawn and list(lines[0].get_ydata()) == raw
    if drawn == 2:
        assert list(lines[1].get_ydata()) != raw and lines[0].get_alpha() < 0.5


def test_long_curves_are_smoothed_without_a_shift():
    ramp, zigzag = [0.5 * i for i in range(600)], [float(i % 2) for i in range(600)]
    assert plots.smoothed(ramp, 20)[10:-10] == pytest.approx(ramp[10:-10])
    assert all(abs(value - 0.5) < 0.05 for value in plots.smoothed(zigzag, 20))
    assert plots.smoothed([1.0, 3.0, 5.0], 1) == [1.0, 3.0, 5.0]


def test_stages_are_lines_of_their_own(tmp_path):
    run = sdakd(tmp_path / "half", {"teacher": [40.0, 30.0], "adversarial": [60.0, 50.0]}, 52.0)
    panels = plots.panels_of(results.grouped(results.read_runs([run])[0]))
    lines = {stage: points for _, stage, points in panels["val", "fid"]}
    assert lines == {"teacher": [(10, 40.0, 0), (20, 30.0, 0)], "adversarial": [(30, 60.0, 0), (40, 50.0, 0)]}
    assert ("test", "fid") not in panels, "one value is no curve"


def test_runs_that_differ_only_by_seed_become_a_mean_and_a_deviation(tmp_path):
    folders = [gan(tmp_path / f"sd-seed{i}", [4.0 + i, 2.0 + 2 * i][: 2 - (i == 2)]) for i in range(3)]
    runs, _ = results.read_runs([*folders, gan(tmp_path / "sdx", [1.0])])
    groups = results.grouped(runs)
    assert {name: len(members) for name, members in groups.items()} == {"sd": 3, "sdx": 1}
    # the third run has not come to 200 images: a mean of two would look like progress
    assert results.series(groups["sd"], "val", "fid", "") == [(100, 5.0, 1.0)]
    assert results.series(groups["sd"][:2], "val", "fid", "") == [(100, 4.5, 0.5**0.5), (200, 3.0, 2**0.5)]


def test_seeds_that_were_measured_in_unlike_ways_are_not_averaged(tmp_path):
    folders = [gan(tmp_path / f"sd-seed{i}", [4.0], num_fake=100 + i) for i in range(2)]
    assert list(results.grouped(results.read_runs(folders)[0])) == ["sd-seed0", "sd-seed1"]


def test_runs_of_one_name_are_told_apart_by_their_folders_and_one_given_twice_is_one(tmp_path):
    one, two = gan(tmp_path / "x" / "run", [1.0]), gan(tmp_path / "y" / "run", [2.0])
    runs, _ = results.read_runs([one, two, one])
    assert list(results.grouped(runs)) == ["x/run", "y/run"]


# What files may hold


DAMAGE = {
    "a number": b"5\n",
    "null": b"null\n",
    "a list": b"[1]\n",
    "not UTF-8": b'{"kind": "eval", "split": "\xff"}\n',
    "cut short": b'{"kind": "eval", "fid": 0.1, "seen_img": 900, "split": "val", "prot',
    "a position that is text": b'{"kind": "eval", "seen_img": "many", "split": "val", "fid": 0.1}\n',
    "no position": b'{"kind": "train", "G/adv": 0.1}\n',
    "a stage that is a list": b'{"kind": "eval", "seen_img": 1, "stage": ["x"], "fid": 0.1}\n',
    "a protocol that is none": b'{"kind": "eval", "seen_img": 1, "fid": 0.1, "protocol": 3}\n',
    "too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_row_is_left_out_and_counted(what, tmp_path, capsys, undrawn):
    run = gan(tmp_path / "run", [5.0, 4.0])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(DAMAGE[what])
    assert "| run | 200 | 4.000 |" in page(tmp_path, run)
    said = capsys.readouterr().err
    assert said.startswith("sdtrain: note: run: left out rows ") and said.endswith(" (1)\n")


def test_text_where_a_number_belongs_is_left_out_and_counted(tmp_path, capsys, undrawn):
    rows = [{"kind": "eval", "seen_img": i, "fid": fid, "protocol": protocol()} for i, fid in ((1, "0.5"), (2, 7))]
    rows += [{"kind": "train", "seen_img": 1, "G/adv": bad} for bad in ("0.1", None, True, [1], 10**400, 1e308)]
    said = page(tmp_path, write(tmp_path / "run", rows))
    assert "| run | 2 | 7.000 |" in said
    assert "run: left out values that are no numbers (5), values that are not finite (2)" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n", b"\x00\xff\xfe", b'{"kind": "tr'])
def test_a_file_without_rows_is_a_sentence_alone_and_a_note_beside_others(content, tmp_path, capsys, undrawn):
    empty = write(tmp_path / "empty", [])
    (empty / "metrics.jsonl").write_bytes(content)
    (empty / "environment.json").write_bytes(b"")
    (empty / "plan.json").write_bytes(b"")
    sentence = f"{empty / 'metrics.jsonl'} has no losses and no evaluations yet; wait for the first tick (log_img)"
    said = refusal(capsys, "report", empty, "--out", tmp_path / "page.md")
    assert sentence in said and len(said.splitlines()) == 1
    assert not (tmp_path / "page.md").exists()
    assert "| run | 100 | 5.000 |" in page(tmp_path, gan(tmp_path / "run", [5.0]), empty)
    assert sentence in capsys.readouterr().err


def test_strange_names_are_escaped_in_every_kind_of_page(tmp_path):
    run = gan(tmp_path / STRANGE, [5.0])
    said = page(tmp_path, run)
    line = next(line for line in said.splitlines() if "5.000" in line)
    assert line.startswith(r"| a&#124;b&lt;b&gt;\$x_1\$&#96;c&#96;\\d\*e\*\[f\](g) \#\# h | 100 | 5.000 |")
    for suffix in (".html", ".tex"):
        assert command("report", run, "--out", tmp_path / f"page{suffix}") == 0
    cells: list[str] = []
    parser = HTMLParser()
    parser.handle_data = cells.append  # type: ignore[method-assign]
    parser.feed((tmp_path / "page.html").read_text())
    assert STRANGE.replace("\n", " ") in "".join(cells) and "<b>" not in (tmp_path / "page.html").read_text()
    line = next(line for line in (tmp_path / "page.tex").read_text().splitlines() if "5.000" in line)
    name = r"a\textbar{}b\textless{}b\textgreater{}\$x\_1\$\textasciigrave{}c\textasciigrave{}\textbackslash{}d*e*"
    assert line.startswith(name + r"{[}f{]}(g) \#\# h & 100 & 5.000 &") and line.endswith(r"\\")


def test_strange_words_in_rows_are_escaped(tmp_path):
    rows = [{"kind": "eval", "seen_img": 1, "stage": "<i>|", "fid": 1.0, "split": "`val|", "protocol": {"lq": "|\n|"}}]
    rows.append({"kind": "train", "seen_img": 1, "stage": "$\\bad\ud800", "G/$\\frac\ud800": 1.0})
    said = page(tmp_path, write(tmp_path / "run", rows))
    assert "| run | student | &lt;i&gt;&#124; | 1 | 1.000 |" in said and "Split &#96;val&#124;:" in said


def test_a_name_as_long_as_a_folder_may_have_is_shortened_in_pictures_alone(tmp_path):
    names = ["n" * 120 + str(i) + "m" * 130 for i in range(2)]
    said = page(tmp_path, *[gan(tmp_path / name, [5.0]) for name in names])
    assert all(f"| {name} |" in said for name in names)
    short = list(tables.shortened(names, 45).values())
    assert len(set(short)) == 2 and all(len(name) <= 45 for name in short)


def test_report_says_what_is_missing(tmp_path, capsys):
    to = ["--out", tmp_path / "page.md"]
    said = refusal(capsys, "report", tmp_path / "x", *to)
    assert said.endswith("x is no run: it has no metrics.jsonl; give run folders, or files of `evaluate --json`")
    assert "cannot be looked up (File name too long)" in refusal(capsys, "report", tmp_path / ("x" * 260), *to)
    run = gan(tmp_path / "plain", [1.0])
    assert "plain has weights at 0 of the shares" in refusal(capsys, "report", run, *to, "--variation")
    long = tmp_path / ("x" * 260 + ".md")
    assert "cannot be written (File name too long)" in refusal(capsys, "report", run, "--out", long)
    (tmp_path / "folder.md").mkdir()
    said = refusal(capsys, "report", run, "--out", tmp_path / "folder.md")
    assert said.endswith("folder.md cannot be written (Is a directory); name another file")


REFUSALS = [
    (
        ["--out", "page.pdf"],
        "--out page.pdf ends in neither .md, .html, .tex, .csv (a page) nor .png, .svg (pictures alone)",
    ),
    (["--out", "a.md", "--latents", "1"], "--latents must be at least 2, --batch at least 1"),
    (["--out", "a.md", "--smooth", "-2"], "--smooth -2: a running mean takes 2 points or more; 0 = none"),
    (
        ["--out", "a.md", "--shares", "20,nan"],
        "--shares 20,nan: give two or more rising shares of training in percent, such as 20,40,60,80,100",
    ),
    (
        ["--out", "a.md", "--interplay", "--interplay-latents", "300"],
        "--extremes 200: take at least 4, and at most half of the 300 latents",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSALS)
def test_report_refuses_arguments_that_cannot_work(words, sentence, tmp_path, capsys):
    assert refusal(capsys, "report", tmp_path, *words) == f"sdtrain: {sentence}"


# What it needs


def in_a_process(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=env)


def test_tables_need_no_matplotlib(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None\nfrom sdtrain import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = in_a_process(code, "report", gan(tmp_path / "run", [5.0]), "--out", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    assert "| run | 100 | 5.000 |" in (tmp_path / "page.md").read_text()
    assert "there are no pictures" in done.stderr and not (tmp_path / "page.png").exists()


def test_fifty_runs_of_a_thousand_rows_are_reported_without_torch(tmp_path):
    chance = random.Random(0)
    for i in range(50):
        losses = [{"kind": "train", "seen_img": 8 * n, "G/adv": chance.random(), "D/real": 1.0} for n in range(900)]
        evals = [
            {"kind": "eval", "seen_img": 80 * n, "split": "val", "fid": 9 + chance.random(), "protocol": protocol()}
            for n in range(100)
        ]
        write(tmp_path / f"run{i}", losses + evals)
    code = "import sys, time; from sdtrain import cli; code = cli.main(sys.argv[1:]); print('seconds of work:',"
    code += "round(time.process_time(), 1)); sys.exit(code or 'torch' in sys.modules)"
    done = in_a_process(code, "report", *sorted(tmp_path.glob("run*")), "--out", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.md").read_text().count("| run") == 50
    print(done.stdout.splitlines()[-1])
