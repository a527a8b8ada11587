"""The papers' tables from runs. Without these a run could fill another's row, numbers that were measured otherwise
could be averaged, or a published value could be taken for one of ours.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import command, gan, of_split, page, protocol, refusal, undrawn, write  # noqa: F401

from sdtrain.commands.papers import PAPERS
from sdtrain.config.compare import dump
from sdtrain.config.load import load_config
from sdtrain.config.suite import read_suite

pytestmark = pytest.mark.usefixtures("undrawn")


def configured(run: Path, cfg: str, **keys: Any) -> Path:
    """A run folder with the configuration of a shipped YAML."""
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in keys.items()]
    (run / "config.yaml").write_text(dump(load_config(cfg, overrides)))
    return run


def faces(folder: Path, fid: float, cfg: str, stage: str = "adversarial", total: int = 100, **keys: Any) -> Path:
    """A run of GCFSR: one validation, the test, and a teacher that is measured beside it."""
    values = {"fid": fid, "fid_64": fid + 10, "fid_32": fid, "fid_16": fid - 10}
    taught = {name: value / 2 for name, value in values.items()}
    rows: list[Any] = [{"kind": "eval", "seen_img": 100, "stage": stage, **values, **of_split("val")}]
    baseline = {"kind": "baseline", "seen_img": 100, "stage": stage, "method": "teacher"}
    rows.append({**baseline, **taught, **of_split("test")})
    rows.append({"kind": "eval", "seen_img": 100, "stage": stage, **values, **of_split("test")})
    return configured(write(folder, rows, total), cfg, **keys)


def line(text: str, *words: str) -> list[str]:
    """The cells of the line of a Markdown table that begins with these words."""
    start = "| " + " | ".join(words) + " |"
    found = [part for part in text.splitlines() if part.startswith(start)]
    assert len(found) == 1, text
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_a_run_stands_in_the_row_of_its_configuration_beside_the_printed_values(tmp_path):
    run = configured(gan(tmp_path / "ours", [5.0, 3.0]), "sdgan_projected")
    text = page(tmp_path, "sdgan-table1", "--runs", run)
    found = line(text, "FFHQ", "ProjectedGAN+SD")
    assert found[2:6] == ["3.000", "3.15", "6.000 +- 0.500", "14.103 +- 2.091"]
    assert line(text, "FFHQ", "StyleNAT")[2:4] == ["-", "2.17"]


def test_seeds_are_averaged_and_those_that_a_row_lacks_are_named(tmp_path):
    runs = [configured(gan(tmp_path / f"sd{n}", [3.0 + n]), "sdgan_projected", seed=n) for n in range(3)]
    runs.append(configured(gan(tmp_path / "base", [9.0]), "sdgan_projected_baseline", seed=0))
    text = page(tmp_path, "table1", "--runs", *runs)
    assert line(text, "FFHQ", "ProjectedGAN+SD")[2] == "4.000 +- 1.000 (3)"
    assert "FFHQ ProjectedGAN: seeds 1, 2 are missing, which other rows have" in text


def test_a_mean_over_runs_that_share_a_seed_is_told(tmp_path):
    runs = [configured(gan(tmp_path / f"a{n}", [3.0 + n]), "sdgan_projected", sd__alpha=1.0 + n) for n in range(2)]
    text = page(tmp_path, "table1", "--runs", *runs)
    assert "FFHQ ProjectedGAN+SD is a mean over a0, a1, of which some share a seed" in text


def test_numbers_that_were_measured_otherwise_are_left_out_with_the_reason(tmp_path):
    two = [configured(gan(tmp_path / f"run{n}", [3.0 + n]), "sdgan_projected", seed=n) for n in range(2)]
    odd = configured(gan(tmp_path / "odd", [1.0], num_fake=7), "sdgan_projected_baseline")
    church = configured(gan(tmp_path / "church", [2.0], real_hash="other"), "sdgan_projected_church")
    text = page(tmp_path, "table1", "--runs", *two, odd, church)
    assert line(text, "FFHQ", "ProjectedGAN")[2] == "-"
    assert "val/fid of odd is left out, measured otherwise: num_fake 100 and 7" in text
    assert line(text, "LSUN Church", "ProjectedGAN+SD")[2] == "2.000"  # another data set is no other protocol


def test_unfinished_runs_and_runs_without_a_configuration_are_named_and_left_out(tmp_path):
    good = configured(gan(tmp_path / "good", [3.0]), "sdgan_projected")
    half = configured(gan(tmp_path / "half", [1.0], total=900), "sdgan_projected", seed=1)
    text = page(tmp_path, "table1", "--runs", good, half, gan(tmp_path / "bare", [1.0]))
    assert line(text, "FFHQ", "ProjectedGAN+SD")[2] == "3.000"
    assert "half is left out: it is unfinished (100 of 900 images)" in text and "bare is left out" in text


def test_tables_1_and_4_of_sdakd_take_the_last_stage_and_the_teacher_from_its_own_rows(tmp_path):
    runs = [
        faces(tmp_path / "sdakd", 50.0, "sdakd_gcfsr"),
        faces(tmp_path / "cc", 60.0, "sdakd/gcfsr_naive_CC", "naive"),
        faces(tmp_path / "omgd", 70.0, "sdakd/gcfsr_omgd", "online"),
        faces(tmp_path / "mod", 80.0, "sdakd/gcfsr_dcd_modified", "online"),
        faces(tmp_path / "a2", 90.0, "sdakd/gcfsr_ablation2"),
    ]
    text = page(tmp_path, "sdakd-table1", "sdakd-table4", "--runs", *runs)
    assert line(text, "SDAKD", "1/4", "1/4")[3:5] == ["60.000", "60.22"]
    assert line(text, "naive", "1/4", "1/4")[3] == "70.000" and line(text, "OMGD", "1/2", "1")[3] == "80.000"
    assert line(text, "DCD with modified adversarial training", "1/2", "1")[3] == "90.000"
    assert line(text, "teacher", "1", "1")[9] == "37.500 +- 6.455 (4)"  # test x64 of four unlike teachers
    assert line(text, "yes", "no", "no")[3] == "100.000" and line(text, "yes", "yes", "yes")[3] == "60.000"


def test_a_teacher_that_all_arms_share_counts_once(tmp_path):
    runs = [faces(tmp_path / f"s{n}", 50.0, "sdakd_gcfsr", seed=n) for n in range(2)]
    assert line(page(tmp_path, "sdakd-table1", "--runs", *runs), "teacher", "1", "1")[9] == "30.000"


def test_every_arm_of_a_shipped_suite_has_a_row_and_every_printed_row_an_arm():
    for suite, key in (("sdakd_gcfsr", "sdakd-table1"), ("sdakd_realesrgan", "sdakd-table2")):
        found = {PAPERS[key].row_of(arm.config) for arm in read_suite(suite).arms} - {None}
        assert found == set(PAPERS[key].published) - {PAPERS[key].teacher}
    ablations = {PAPERS["sdakd-table4"].row_of(arm.config) for arm in read_suite("sdakd_gcfsr").arms} - {None}
    assert ablations == set(PAPERS["sdakd-table4"].published)
    suites = ("sdgan_projected_ffhq", "sdgan_projected_church", "sdgan_stylegan2_ffhq", "sdgan_stylegan2_church")
    arms = [arm for suite in (*suites, "sdgan_stylenat_ffhq") for arm in read_suite(suite).arms]
    assert {PAPERS["sdgan-table1"].row_of(arm.config) for arm in arms} >= set(PAPERS["sdgan-table1"].published)


def test_how_each_number_was_made_stands_below(tmp_path):
    run = configured(gan(tmp_path / "ours", [5.0, 3.0]), "sdgan_projected", seed=4)
    text = page(tmp_path, "table1", "--runs", run)
    about = line(text, "FFHQ ProjectedGAN+SD", "ours")
    assert about[2] == "val" and re.fullmatch("[0-9a-f]{16}", about[3]) and about[4:] == ["4", "200", "100"]


def test_a_page_of_csv_is_read_by_others_and_holds_no_formula(tmp_path):
    run = configured(gan(tmp_path / "=cmd()", [5.0]), "sdgan_projected")
    assert command("report", "table1", "--runs", run, "--out", tmp_path / "t.csv") == 0
    lines = list(csv.reader((tmp_path / "t.csv").open()))
    assert ["FFHQ", "ProjectedGAN+SD", "5.000", "3.15"] == lines[6][:4]
    assert any(cells[1:2] == ["'=cmd()"] for cells in lines)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["table1"], "say which runs fill it with --runs"),
        (["table9", "--runs", "RUN"], "there is no table or figure 'table9'"),
        (["sdakd-table2", "--runs", "RUN"], "none of these runs belongs to sdakd-table2"),
    ],
)
def test_what_cannot_be_filled_is_one_sentence(words, sentence, tmp_path, capsys):
    run = configured(gan(tmp_path / "ours", [5.0]), "sdgan_projected")
    said = refusal(capsys, "report", *[run if word == "RUN" else word for word in words], "--out", tmp_path / "p.md")
    assert sentence in said and "\n" not in said and not (tmp_path / "p.md").exists()


def test_fifty_runs_fill_a_table_without_torch(tmp_path):
    import subprocess
    import sys

    runs = []
    for n in range(50):
        about = {"kind": "eval", "split": "val", "fid": 9.0, "protocol": protocol()}
        rows = [{**about, "seen_img": i} for i in range(1000)]
        runs.append(configured(write(tmp_path / f"r{n}", rows), "sdgan_projected", seed=n))
    code = "import sys; from sdtrain import cli; assert cli.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    words = ["report", "table1", "--runs", *map(str, runs), "--out", str(tmp_path / "p.csv")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "9.000" in done.stdout
