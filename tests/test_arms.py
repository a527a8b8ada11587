"""Arms over seeds in `sdtrain report`. Without these a difference of three seeds could pass for one of thirty, seeds of
one arm could be paired with others, and numbers of two protocols could be subtracted.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy import stats
from test_report import gan, page, protocol, sdakd, undrawn

from sdtrain.commands import arms
from sdtrain.commands.report import arms_of_variation
from sdtrain.commands.results import Written, read_runs
from sdtrain.commands.roughness import roughness

__all__ = ["undrawn"]
BASE, BETTER = [5.0, 5.5, 4.8, 5.2], [4.1, 4.7, 4.0, 4.2]


def suite(folder: Path, **of_arms: list[float]) -> list[Path]:
    """Runs as a suite orders them: the arms of the first seed, of the second, ..."""
    longest = max(map(len, of_arms.values()))
    made = [(name, seed) for seed in range(longest) for name in of_arms if seed < len(of_arms[name])]
    return [gan(folder / f"{name}-seed{seed}", [9.0, of_arms[name][seed]]) for name, seed in made]


def cells(text: str, arm: str, metric: str) -> list[str]:
    """Seeds, mean, deviation, difference, told apart, seeds for 80 %."""
    [found] = [row for row in text.splitlines() if row.startswith(f"| {arm} | {metric}")]
    return [cell.strip() for cell in found.strip("|").split("|")][2:]


def seeds_for_80_percent(both: list[float]) -> int:
    """By the noncentral t, of which `seeds_needed` is an approximation."""
    effect = abs(statistics.fmean(both)) / statistics.stdev(both)
    return next(
        n for n in range(2, 100_000) if stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, effect * math.sqrt(n)) >= 0.8
    )


def test_means_and_differences_are_those_of_students_t_paired_by_seed(tmp_path: Path, undrawn: None) -> None:
    text = page(tmp_path, *suite(tmp_path, base=BASE, sd=BETTER))
    assert cells(text, "base", "FID down")[3:] == ["-", "-", "-"]
    seeds, mean, deviation, difference, apart, needed = cells(text, "sd", "FID down")
    both = [b - a for a, b in zip(BASE, BETTER)]
    low, high = stats.t.interval(0.95, 3, statistics.fmean(both), stats.sem(both))
    assert (seeds, deviation, apart) == ("4", f"{statistics.stdev(BETTER):.3f}", "yes")
    assert int(needed) == seeds_for_80_percent(both)
    assert difference == f"{statistics.fmean(both):.3f} +- {(high - low) / 2:.3f}"
    low, high = stats.t.interval(0.95, 3, statistics.fmean(BETTER), stats.sem(BETTER))
    assert mean == f"{statistics.fmean(BETTER):.3f} +- {(high - low) / 2:.3f}"


def test_arms_are_compared_by_each_metric_that_two_of_them_have(tmp_path: Path, undrawn: None) -> None:
    """As where runs stand beside a file of `evaluate --json`, which measures something else."""
    runs = suite(tmp_path, base=BASE, sd=BETTER)
    file = tmp_path / "lite0.jsonl"
    with file.open("w") as rows:
        for run in runs:
            value = BASE[0] + ("sd" in run.name) + int(run.name[-1]) / 8
            split = {"kind": "eval", "split": "val", "protocol": protocol()}
            rows.write(json.dumps({**split, "measured": run.name, "seen_img": 100, "fd_lite0": value}) + "\n")
    text = page(tmp_path, *runs, file)
    assert cells(text, "sd", "FID down")[0] == cells(text, "lite0: sd", "FD-Lite0 down")[0] == "4"
    assert cells(text, "lite0: sd", "FD-Lite0 down")[3:] == ["+1.000", "yes", "-"]
    assert "paired by seed with base or lite0: base." in text
    assert not [row for row in text.splitlines() if row.startswith(("| lite0: sd | FID", "| sd | FD-Lite0"))]


LITE0 = [{"extractor": "lite0", "weights": weights} for weights in ("one", "another")]


def later(file: Path, arm: str, protocols: list[dict[str, Any]]) -> Path:
    """What `evaluate --json` says of an arm's seeds."""
    row = {"kind": "eval", "seen_img": 100, "fd_lite0": 5.0}
    lines = [{**row, "measured": f"{arm}-seed{seed}", "protocol": how} for seed, how in enumerate(protocols)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_what_two_arms_measured_is_not_compared_where_only_the_first_could_stand_beside_both(
    tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first has no such features, and so contradicts neither."""
    files = [later(tmp_path / f"{n}.jsonl", "x", [protocol(split="val", fd_lite0=LITE0[n])] * 2) for n in (0, 1)]
    text = page(tmp_path, *suite(tmp_path, base=BASE, sd=BETTER), *files)
    assert "FID down" in text and not [row for row in text.splitlines() if row.startswith("| 1: x | FD-Lite0")]
    assert "1: x is not compared with base: fd_lite0.weights one and another" in capsys.readouterr().err
    tables = [part for part in text.split("\n\n") if "FD-Lite0 down" in part and "x-seed" in part]
    assert len(tables) == 2 and "0: x-seed0" in tables[0] and "1: x-seed0" in tables[1]


def test_seeds_of_an_arm_that_were_measured_in_unlike_ways_are_no_arm(
    tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = later(tmp_path / "x.jsonl", "x", [protocol(split="test", fd_lite0=way) for way in LITE0])
    other = later(tmp_path / "y.jsonl", "y", [protocol(split="test", fd_lite0=LITE0[0])] * 2)
    assert "told apart" not in page(tmp_path, other, file)
    assert "x: x is left out, its seeds are unlike: fd_lite0.weights one and another" in capsys.readouterr().err


def test_roughness_is_two_for_noise_small_for_a_curve_and_of_the_last_stage(tmp_path: Path) -> None:
    draw = random.Random(0)
    noise = [draw.gauss(0, 1) for _ in range(4000)]
    line = [math.sin(i / 300) for i in range(4000)]
    curves = {("", "G/adv", "main"): dict(enumerate(noise)), ("", "D/real", "main"): dict(enumerate(line))}
    early = {("", "G/adv", "teacher"): dict(enumerate(line[:2000])), ("", "G/sup", "teacher"): {0: 1.0, 9: 2.0}}
    few = {("", "D/fake", "main"): {number: 1.0 * number for number in range(3991, 4000)}}
    found = roughness(Written(tmp_path, "a", curves=early | curves | few))
    assert found.keys() == {"G/adv", "D/real"} and found["G/adv"] == pytest.approx(2, abs=0.1)
    assert found["D/real"] < 1e-4
    steps = [b - a for a, b in zip(noise, noise[1:])]
    assert found["G/adv"] == statistics.variance(steps) / statistics.variance(noise)


def test_roughness_is_compared_between_arms_and_its_absence_is_said(tmp_path: Path, undrawn: None, capsys: Any) -> None:
    runs = [gan(tmp_path / f"{arm}-seed{n}", [9.0, 8.0 + n, *[7.0] * 10]) for n in range(2) for arm in ("base", "sd")]
    text = page(tmp_path, *runs, "--roughness")
    assert "| Run | G/adv |" in text and cells(text, "sd", "roughness of G/adv")[0] == "2"
    page(tmp_path, gan(tmp_path / "short", [9.0]), "--roughness")
    assert "no run has the 10 rows of losses" in capsys.readouterr().err


def test_variation_is_compared_between_arms_as_metrics_are(tmp_path: Path) -> None:
    def measured(**of_arms: list[float]) -> list[tuple[Any, Any]]:
        return [
            (Written(tmp_path, f"{name}-seed{seed}"), SimpleNamespace(mean=value, distance="LPIPS"))
            for name, values in of_arms.items()
            for seed, value in enumerate(values)
        ]

    found = arms_of_variation(measured(base=BASE, sd=BETTER, alone=[1.0]))
    assert found is not None and "seeds, LPIPS. " in found.caption and "paired by seed with base" in found.caption
    both = [b - a for a, b in zip(BASE, BETTER)]
    half = stats.t.ppf(0.975, 3) * stats.sem(both)
    assert [line[0] for line in found.rows] == ["base", "sd"] and found.rows[1][1] == "variation down"
    assert found.rows[1][5:] == [f"{statistics.fmean(both):.3f} +- {half:.3f}", "yes", str(seeds_for_80_percent(both))]
    assert arms_of_variation(measured(base=BASE, alone=[1.0])) is None
    assert arms_of_variation([(Written(tmp_path, "plain"), SimpleNamespace(mean=1.0, distance="LPIPS"))]) is None


@pytest.mark.parametrize("freedom", range(1, 31))
def test_the_quantiles_are_students(freedom: int) -> None:
    assert arms.T[freedom - 1] == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)
    assert arms.T_POWER[freedom - 1] == pytest.approx(stats.t.ppf(0.8, freedom), abs=6e-4)


@pytest.mark.parametrize("effect", [9.0, 4.0, 2.0, 1.715, 1.0, 0.6, 0.55, 0.5, 0.2])
def test_so_many_seeds_show_a_difference_with_the_chance_that_is_said(effect: float) -> None:
    exact = seeds_for_80_percent([effect - 1, effect, effect + 1])
    assert arms.seeds_needed(effect) == pytest.approx(exact, abs=1 if exact > 31 else 0)


@pytest.mark.parametrize("both", [[1e99, -1e99, 1e-300], [1.0, -1.0, 1e-200], [0.5, 0.5, 0.5], [1.0, -1.0, 0.2]])
def test_differences_of_which_no_number_of_seeds_can_be_said_have_a_dash(both: list[float]) -> None:
    found = arms.line("arm", "fid", "FID down", dict(enumerate(both)), dict.fromkeys(range(3), 0.0))
    assert found[-1] == "-"


def test_what_seeds_cannot_tell_apart_is_said_with_how_many_could(tmp_path: Path, undrawn: None) -> None:
    text = page(tmp_path, *suite(tmp_path, base=BASE, same=[5.1, 5.2, 5.0, 5.3]))
    *_, apart, needed = cells(text, "same", "FID down")
    both = [0.1, -0.3, 0.2, 0.1]
    assert apart == "no" and int(needed) == pytest.approx(seeds_for_80_percent(both), abs=1)


def test_a_seed_that_only_one_arm_has_is_left_out_of_the_difference_and_named(tmp_path: Path, undrawn: None) -> None:
    runs = suite(tmp_path, base=BASE, sd=BETTER[:3])
    found, notes = read_runs(runs)
    [table] = arms.tables_of_arms(found, notes)
    lines = {(row[0], row[1]): row[2:] for row in table.rows}
    difference = statistics.fmean(b - a for a, b in zip(BASE[:3], BETTER[:3]))
    assert lines["sd", "FID down"][0] == "3" and lines["sd", "FID down"][3].startswith(f"{difference:.3f} ")
    assert any("val sd" in note and "seed" in note for note in notes)


def test_one_seed_one_arm_and_unfinished_runs_make_no_table(tmp_path: Path) -> None:
    made = suite(tmp_path, base=BASE, sd=[4.0])
    assert arms.tables_of_arms(*read_runs(made)) == []
    half = [gan(tmp_path / "half" / f"sd-seed{seed}", [4.0], total=900) for seed in range(2)]
    assert arms.tables_of_arms(*read_runs(made[:1] + made[2:] + half)) == []


def test_other_protocols_are_not_subtracted(tmp_path: Path) -> None:
    made = suite(tmp_path, base=BASE, sd=BETTER)
    made += [gan(tmp_path / f"more-seed{seed}", [9.0, 3.0 + seed], num_fake=200) for seed in range(2)]
    found, notes = read_runs(made)
    [table] = arms.tables_of_arms(found, notes)
    assert {row[0] for row in table.rows} == {"base", "sd"}
    assert any(note.startswith("more is not compared with base: ") for note in notes)


def test_a_student_is_compared_by_its_last_stage_and_never_by_its_teacher(tmp_path: Path) -> None:
    stages = {"teacher": [10.0], "supervised": [30.0], "adversarial": [20.0]}
    made = [sdakd(tmp_path / f"whole-seed{s}", stages | {"adversarial": [20.0 + s]}, 21.0 + s) for s in range(2)]
    made += [sdakd(tmp_path / f"naive-seed{s}", {"naive": [40.0 + 2 * s]}, 41.0 + 2 * s) for s in range(2)]
    tables = {table.caption[:10]: table for table in arms.tables_of_arms(*read_runs(made))}
    val = {(row[0], row[1]): row for row in next(t for t in tables.values() if t.caption.startswith("Split val")).rows}
    assert val["whole", "FID down"][3].startswith("20.500") and val["naive", "FID down"][5].startswith("+20.500")
