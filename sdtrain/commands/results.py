"""What runs have written, read for `sdtrain report`: rows that can be trusted, and a note on every one that cannot.

Nothing here needs torch or matplotlib.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sdtrain.engine.positions import saved_img
from sdtrain.errors import RunError
from sdtrain.files import read_json, read_rows
from sdtrain.metrics import table
from sdtrain.metrics.protocol import conflicts, whole

T = TypeVar("T")
METRICS: dict[str, str] = table.merged(dict(metric.labels) for metric in table.METRICS.values())
METRICS |= {"psnr_y": "PSNR-Y [dB]", "ssim_y": "SSIM-Y", "lpips": "LPIPS"}
RISING = (*(key for metric in table.METRICS.values() for key in metric.rising), "psnr_y", "ssim_y")  # higher is better
MEASURED = re.compile(rf"(?:{'|'.join(METRICS)})(?:_std|_\d+)?")
FACTOR = re.compile(r"fid_(\d+)")
FEATURES_OF = {  # a measurement -> where a protocol says in whose features it was made, the first that is there
    **dict.fromkeys(("fid", "fid_biased", "kid"), ("features", "fid")),
    **dict.fromkeys(("precision", "recall"), ("pr_features", "features")),
}
DIGITS = {"kid": 5, "ssim_y": 4, "lpips": 4}
SEED_OF_NAME = re.compile(r"[-_.]?seed[-_=]?\d+", re.IGNORECASE)
WORDS = ("kind", "stage", "split", "weights", "method", "measured")
PERF = ("sec_per_kimg", "peak_mem_gb", "data_wait_frac", "sec/evaluate")
HUGE = 1e100  # no loss or metric is so large; sums of larger numbers overflow
NUMBER, FINITE = "values that are no numbers", "values that are not finite"
OBJECT, PLACE = "rows that are no JSON objects", "rows without a position, or with a stage or protocol that is none"


def called(key: str, protocol: Mapping[str, Any]) -> str:
    """The name of a measurement, which by a random network must not be taken for that of papers."""
    factor = FACTOR.fullmatch(key)
    name = f"FID x{factor[1]}" if factor else METRICS.get(key, key)
    if key == "lpips":
        return f"{name} of random weights" if str(protocol.get(key)).endswith(", random") else name
    places = FEATURES_OF.get("fid" if factor else key, ())
    features = next((protocol[place] for place in places if protocol.get(place)), None)
    random = isinstance(features, dict) and features.get("extractor") == "random-inception"
    return f"{name} in random features" if random else name


def heading(key: str, protocol: Mapping[str, Any], more: str = "") -> str:
    """What stands over a column of this measurement."""
    return f"{called(key, protocol)}{more} {'up' if key in RISING else 'down'}"


def printed(key: str, value: float, spread: float | None = None) -> str:
    """A value of this measurement as tables show it."""
    digits = DIGITS.get(key, 3)
    return f"{value:.{digits}f}" + (f" +- {spread:.{digits}f}" if spread else "")


@dataclass(frozen=True)
class Row:
    """One evaluation."""

    split: str
    network: str  # teacher, student, bicubic; of a generator G_ema or G
    stage: str
    seen_img: int | None
    values: dict[str, float]
    protocol: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """One run, or what one `evaluate --json` file says of one subject."""

    path: Path
    name: str
    rows: list[Row] = field(default_factory=list)
    # (split, or "" for losses; name; stage) -> images seen -> value
    curves: dict[tuple[str, str, str], dict[int, float]] = field(default_factory=dict)
    total_img: int | None = None
    select_by: str | None = None  # what chose the weights of best/
    seen_img: int = 0
    perf: dict[int, dict[str, float]] = field(default_factory=dict)  # images seen -> what a tick says of speed
    speeds: list[dict[str, Any]] = field(default_factory=list)  # rows of `sdtrain speed --json`, as they are

    @property
    def group(self) -> str:
        return SEED_OF_NAME.sub("", self.name) or self.name

    @property
    def unfinished(self) -> bool:
        return self.total_img is not None and self.seen_img < self.total_img


def read_runs(paths: Sequence[Path]) -> tuple[list[Written], list[str]]:
    """The runs under names that differ, and notes on what was left out. Raises RunError when nothing is left."""
    notes: list[str] = []
    files = {path.resolve(): file_of(path) for path in paths}
    parts = [(*path.parts[:-1], path.name if path.is_dir() else path.stem) for path in files]
    if len(set(parts)) < len(parts):  # of a run `x` and a file `x.jsonl`, or of two such files
        parts = [path.parts for path in files]
    names = dict(zip(files, distinct(parts)))
    runs = [run for path, file in files.items() for run in read(path, file, names[path], notes)]
    if not runs:
        raise RunError("; ".join(notes) or "there is nothing to report")
    return runs, notes


def file_of(path: Path) -> Path:
    """The rows of a run folder, or the file itself. Raises RunError when there are none."""
    try:
        file = path / "metrics.jsonl" if path.is_dir() else path
        if file.is_file():
            return file
    except OSError as error:
        raise RunError(f"{str(path)[:60]}... cannot be looked up ({error.strerror}); give run folders") from None
    raise RunError(f"{path} is no run: it has no metrics.jsonl; give run folders, or files of `evaluate --json`")


def distinct(parts: Sequence[tuple[str, ...]]) -> list[str]:
    """Of paths that differ the last part of each, or as many of the last parts as make all of them different."""
    depths = range(1, max(map(len, parts), default=1) + 1)
    spellings = ([str(Path(*part[-depth:])) for part in parts] for depth in depths)
    return next(names for names in spellings if len(set(names)) == len(names))


def read(path: Path, file: Path, name: str, notes: list[str]) -> list[Written]:
    """A run; a file of `evaluate --json` may hold several subjects, each a run of its own."""
    left_out: Counter[str] = Counter()
    rows = objects(file, left_out)
    if path.is_dir():
        total, select_by = planned(path)
        found = [collect(Written(path, name, [], {}, total, select_by, saved_img(path)), rows, left_out)]
    else:
        subjects: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            subjects[Path(row.get("measured", "")).parts].append(row)
        titles = [f"{name}: {about}" for about in distinct(list(subjects))] if len(subjects) > 1 else [name]
        found = [collect(Written(path, title), part, left_out) for title, part in zip(titles, subjects.values())]
    if left_out:
        notes.append(f"{name}: left out {', '.join(f'{what} ({count})' for what, count in left_out.items())}")
    kept = [run for run in found if run.rows or run.curves or run.speeds]
    if not kept:
        notes.append(f"{file} has no losses and no evaluations yet; wait for the first tick (log_img)")
    return kept


def objects(file: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows that are JSON objects whose words are words; the others are counted.

    Raises RunError when the file cannot be read.
    """
    try:
        for row in read_rows(file):
            if row is None:
                left_out[OBJECT] += 1
            elif not all(isinstance(row.get(word, ""), str) for word in WORDS) or not placed(row):
                left_out[PLACE] += 1
            else:
                yield row
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror}); mend its permissions, or leave it out") from None


def placed(row: dict[str, Any]) -> bool:
    """Whether position and protocol are what they should be; images outside a run have no position."""
    seen = row.get("seen_img")
    if row.get("kind") in ("eval", "baseline") and not isinstance(row.get("protocol", {}), dict):
        return False
    if seen is None:
        return "seen_img" not in row and row.get("kind") != "train"
    return isinstance(seen, int) and not isinstance(seen, bool) and 0 <= seen < 1 << 53


def planned(run: Path) -> tuple[int | None, str | None]:
    """Images until the end of the last stage and the metric that chooses weights; None where the plan does not say."""
    try:
        plan = read_json(run / "plan.json")
        total, chooses = plan["stages"][-1]["end_img"], plan.get("select_by")
        return total if isinstance(total, int) else None, chooses if chooses in METRICS else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None, None


def collect(run: Written, rows: Iterable[dict[str, Any]], left_out: Counter[str]) -> Written:
    """`run` with the numbers of these rows."""
    seen_img = run.seen_img
    for row in rows:
        seen_img = max(seen_img, row.get("seen_img", 0))
        if row.get("kind") == "perf" and "seen_img" in row:
            run.perf[row["seen_img"]] = numbers(row, PERF.__contains__, left_out)
        elif row.get("kind") == "speed":
            run.speeds.append(row)
        elif row.get("kind") == "train":
            stage = "" if row.get("stage") == "main" else row.get("stage", "")
            enter(run, "", stage, row["seen_img"], numbers(row, lambda key: "/" in key, left_out))
        elif row.get("kind") in ("eval", "baseline"):
            found = evaluation(row, left_out)
            run.rows.extend(found)
            if row["kind"] == "eval" and found[0].seen_img is not None:
                enter(run, found[0].split, found[0].stage, found[0].seen_img, found[0].values)
    return replace(run, seen_img=seen_img)


def enter(run: Written, split: str, stage: str, seen_img: int, values: dict[str, float]) -> None:
    for key, value in values.items():
        run.curves.setdefault((split, key, stage), {})[seen_img] = value


def numbers(row: dict[str, Any], wanted: Callable[[str], Any], left_out: Counter[str]) -> dict[str, float]:
    """The finite numbers among the wanted keys."""
    found = {}
    for key, value in row.items():
        if wanted(key):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                left_out[NUMBER] += 1
            elif not abs(value) < HUGE:  # NaN is not less than anything
                left_out[FINITE] += 1
            else:
                found[key] = float(value)
    return found


def evaluation(row: dict[str, Any], left_out: Counter[str]) -> list[Row]:
    """The row as a Row; `evaluate` puts the enlargement by bicubic into the same line."""
    stage, protocol = row.get("stage", ""), row.get("protocol", {})
    stage = "" if stage == "main" else stage
    split = row.get("split") or protocol.get("split")
    split = split if isinstance(split, str) else "val"
    network = {"raw": "G", "ema": "G_ema"}.get(row.get("weights", "ema"), row.get("weights", ""))
    if stage:
        network = "teacher" if stage.startswith("teacher") else "student"
    seen_img = row.get("seen_img")
    if row["kind"] == "baseline":
        network, stage, seen_img = row.get("method", "baseline"), "", None
    found = [Row(split, network, stage, seen_img, numbers(row, MEASURED.fullmatch, left_out), protocol)]
    if isinstance(row.get("bicubic"), dict):
        plain = numbers(row["bicubic"], MEASURED.fullmatch, left_out)
        found.append(Row(split, "bicubic", "", None, plain, protocol))
    return found


# Choosing and comparing


def chosen(run: Written, split: str) -> list[Row]:
    """One row for each stage and network of a split: of validation the best, of anything else the last.

    Best is by the metric that chose the run's weights, where the stage has it, else by the first of METRICS.
    What was tested is what validation had chosen.
    """
    parts: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in run.rows:
        if row.split == split and row.values:
            parts[row.network, row.stage].append(row)
    return [best(rows, run.select_by) if split == "val" else rows[-1] for rows in parts.values()]


def best(rows: Sequence[Row], select_by: str | None) -> Row:
    key = judge(rows, select_by)
    if key is None:
        return rows[-1]
    return better(key)((row for row in rows if key in row.values), key=lambda row: row.values[key])


def judge(rows: Iterable[Row], select_by: str | None) -> str | None:
    """The metric that the best of these rows is best by; None where nothing was measured."""
    measured = {key for row in rows for key in row.values}
    return next((key for key in (select_by, *METRICS) if key in measured), None)


def better(key: str) -> Any:
    """`max` for what should be high, else `min`."""
    return max if key in RISING else min


def comparable(items: Iterable[T], protocol: Callable[[T], dict[str, Any]]) -> list[list[T]]:
    """The items in lists whose members were all measured in one way."""
    lists: list[list[T]] = []
    ways: list[dict[str, Any]] = []  # of each list
    for item in items:
        way = protocol(item)
        home = next((number for number, known in enumerate(ways) if not conflicts(known, way)), None)
        if home is None:
            lists.append([item])
            ways.append(way)
        else:
            lists[home].append(item)
            ways[home] = whole((ways[home], way))
    return lists


def grouped(runs: Sequence[Written]) -> dict[str, list[Written]]:
    """Runs whose names differ by seed, together; each alone where they were not measured in one way."""
    alike: dict[str, list[Written]] = defaultdict(list)
    for run in runs:
        alike[run.group].append(run)
    groups: dict[str, list[Written]] = {}
    for name, members in alike.items():
        together = len(comparable(protocols(members), dict)) < 2
        groups |= {name: members} if together else {run.name: [run] for run in members}
    return groups


def protocol_of(rows: Iterable[Row]) -> dict[str, Any]:
    """How the first of these was measured that says how."""
    return next((row.protocol for row in rows if row.protocol), {})


def protocols(runs: Iterable[Written]) -> Iterator[dict[str, Any]]:
    """How each run validates, its own latents aside."""
    return (row.protocol for run in runs for row in run.rows if row.split == "val")


def series(runs: Sequence[Written], split: str, key: str, stage: str) -> list[tuple[int, float, float]]:
    """(images, mean, standard deviation over runs with n - 1) where every run of the group has a value."""
    found = [run.curves.get((split, key, stage), {}) for run in runs]
    if len(found) == 1:
        return [(images, value, 0.0) for images, value in sorted(found[0].items())]
    shared = sorted(set.intersection(*map(set, found)))
    columns = [(images, [values[images] for values in found]) for images in shared]
    return [(x, statistics.fmean(v), statistics.stdev(v)) for x, v in columns]
