"""Without these a run would go on without the curves that somebody watches, show what it repeats after a kill twice, or
fall over the tracker instead of training.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_shards, rows, run_jobs, tiny_config, write_config

from sdtrain.config.find import read_written
from sdtrain.config.load import load_config
from sdtrain.engine.trackers import Mark, check_trackers, read_mark, told, wandb_mode
from sdtrain.errors import ConfigError, RunError

END, USER_ERROR = 40, 2
BLOCK, HEADER = 32768, 7  # of the log that Weights & Biases writes: LevelDB's, with a magic number before it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    make_shards(folder / "shards")
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": 16, "sample_img": 16, "eval_img": 16}
    metrics = {"names": ["rfid"], "num_fake": 12, "seeds": 1, "tap": 64, "select_by": "rfid", "batch_size": 4}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock, metrics=metrics))
    return folder


def job(place: Path, out: str, tracker: str, **wishes: Any) -> dict[str, Any]:
    args = ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), "--set", f"tracker={tracker}"]
    return {"args": args, "plain": True, **wishes}


@pytest.fixture(scope="module")
def runs(place: Path) -> Iterator[dict[str, Any]]:
    """A run that is killed after rows it will repeat, one that is watched from its middle on, one of two ranks."""
    pytest.importorskip("wandb")
    both = "[tensorboard, wandb]"
    point = {"point": "in a step", "how": "command"}
    jobs = {
        "killed": job(place, "killed", both, harm={**point, "time": 4, "command": "sleep 1; kill -9 $PPID"}),
        "went on": job(place, "killed", both),
        "unwatched": job(place, "late", "none", signal={"point": "in a step", "name": "SIGTERM", "time": 3}),
        "watched": job(place, "late", both),
        "ranks": job(place, "ranks", "wandb", ranks=2),
        "lonely": job(place, "lonely", "wandb", harm={**point, "command": "pkill -9 -P $PPID wandb-core"}),
    }
    yield dict(zip(jobs, run_jobs(place, list(jobs.values())), strict=True))


def records(file: Path) -> Iterator[bytes]:
    """What is in a .wandb file: records cut into parts (whole 1, first 2, middle 3, last 4) that no block breaks."""
    data, at, parts = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):
            yield parts
            parts = b""


def history(out: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """What all starts of a run have told Weights & Biases: number of the call, and the values of it."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                yield record.history.step.num, items


def curves(found: Iterator[tuple[int, dict[str, Any]]]) -> dict[tuple[str, int], float]:
    """Every number by its name and its position; one that is told twice is a failure."""
    points: dict[tuple[str, int], float] = {}
    for _, items in found:
        own = {} if any(name.endswith("/_type") for name in items) else items  # else it is a picture
        for name, value in own.items():
            if isinstance(value, (int, float)) and not name.startswith("_") and name != "seen_img":
                assert (name, items["seen_img"]) not in points
                points[name, items["seen_img"]] = value
    return points


def written(out: Path, *kinds: str) -> dict[tuple[str, int], float]:
    found = [told(row) for row in rows(out, *kinds)]
    return {(name, seen_img): value for _, seen_img, values in found for name, value in values.items()}


def board(out: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "tensorboard")).Reload()
    return {(name, event.step): event.value for name in found.Tags()["scalars"] for event in found.Scalars(name)}


def test_a_killed_run_goes_on_with_one_curve_and_tells_nothing_twice(place: Path, runs: dict[str, Any]) -> None:
    out = place / "killed"
    assert runs["killed"]["code"] == -9 and runs["went on"]["code"] == 0, runs["went on"]["said"]
    files = sorted(file.name for file in out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len(set(files)) == 1 and read_mark(out / "wandb" / "told.json").id in files[0]
    calls = [number for number, _ in history(out)]
    assert calls == list(range(len(calls)))
    assert {seen for _, seen in curves(history(out))} == set(range(8, END + 1, 8))
    assert written(out, "train", "eval").items() <= curves(history(out)).items()
    assert all(point in curves(history(out)) for point in written(out, "perf"))


def test_pictures_are_told_once_too(place: Path, runs: dict[str, Any]) -> None:
    out = place / "killed"
    kinds = [(name, items["seen_img"]) for _, items in history(out) for name in items if name.endswith("/_type")]
    found = sorted(f"{name.removesuffix('/_type')}_{seen_img:09d}" for name, seen_img in kinds)
    assert found == sorted(path.stem for path in (out / "samples").glob("*.png")) and len(found) > 3
    assert len(list(out.glob("wandb/offline-run-*/files/media/images/*.png"))) == len(found)


def test_a_tracker_that_comes_later_gets_the_whole_curve(place: Path, runs: dict[str, Any]) -> None:
    assert runs["unwatched"]["code"] == 75 and runs["watched"]["code"] == 0, runs["watched"]["said"]
    whole = written(place / "late", "train", "perf", "eval")
    assert curves(history(place / "late")) == whole
    assert board(place / "late") == {point: pytest.approx(value, rel=1e-6) for point, value in whole.items()}


def test_the_axis_is_images_seen(place: Path, runs: dict[str, Any]) -> None:
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in records(next((place / "late").glob("wandb/offline-run-*/*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found += [(record.metric.glob_name, record.metric.step_metric)] if record.HasField("metric") else []
    assert ("*", "seen_img") in found


def test_of_two_ranks_one_has_a_tracker(place: Path, runs: dict[str, Any]) -> None:
    assert [one["code"] for one in runs["ranks"]["ranks"]] == [0, 0]
    assert len(list((place / "ranks" / "wandb").glob("offline-run-*"))) == 1
    assert sum("wandb sync" in one["said"] for one in runs["ranks"]["ranks"]) == 1


def test_a_tracker_that_is_gone_ends_the_run_with_one_sentence(place: Path, runs: dict[str, Any]) -> None:
    done = runs["lonely"]
    assert done["code"] == USER_ERROR and "Traceback" not in done["said"], done["said"]
    assert f"cannot write {place / 'lonely' / 'wandb'}: the process of Weights & Biases has ended" in done["said"]
    assert "was kept; the same command goes on from there" in done["said"]


def test_a_missing_package_is_one_sentence_before_anything_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = load_config(place / "tiny.yaml", ["tracker=[wandb]", f"data.train={place / 'nowhere'}"])
    with pytest.raises(ConfigError, match=r"tracker wandb needs .*pip install 'sdtrain\[wandb\]', or write tracker: t"):
        check_trackers(config)
    from sdtrain.main import main

    args = ["--cfg", str(place / "tiny.yaml"), "--set", "tracker=wandb", "--set", f"data.train={place / 'nowhere'}"]
    assert main([*args, "--out", str(place / "missing")]) == USER_ERROR and not (place / "missing").exists()


def test_a_folder_of_runs_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="needs the package"):
        check_trackers(load_config("quickstart", ["tracker=wandb"]))


ENVIRONMENTS = {"": "offline", "WANDB_API_KEY=x": "online", "WANDB_API_KEY=x WANDB_MODE=offline": "offline"}


@pytest.mark.parametrize("variables, mode", {**ENVIRONMENTS, "WANDB_MODE=disabled": "disabled"}.items())
def test_it_is_offline_unless_asked(monkeypatch: pytest.MonkeyPatch, variables: str, mode: str) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert wandb_mode() == mode


DAMAGED = [
    "",
    "[]",
    "{}",
    '{"id": "../../x", "calls": 0, "seen_img": 0, "names": []}',
    '{"id": "00000000", "names": 3}',
]
DAMAGED += ['{"id": "00000000", "calls": 1e3, "seen_img": 0, "names": []}', '{"id": 3, "names": [], "more": 1}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_mark_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "told.json").write_text(text)
    with pytest.raises(RunError, match=r"told.json is damaged .*put it back, or remove it"):
        read_mark(tmp_path / "told.json")


def test_what_is_told_at_a_position_is_told_once_and_in_order() -> None:
    mark = Mark(id="00000000").moved("train/", 16).moved("perf/", 16)
    assert mark.covers("train/", 16) and mark.covers("train/", 15) and not mark.covers("eval/val", 16)
    assert not mark.moved("train/", 32).covers("perf/", 32) and mark.moved("train/", 32).calls == 3


def test_what_no_curve_can_hold_is_left_out() -> None:
    row = {"kind": "eval", "split": "val", "seen_img": "8", "fid": 1.5, "of": "val", "\ud800": 1, "large": 10**400}
    assert told(row) == ("eval/val", 8, {"eval/val/fid": 1.5})


@pytest.mark.parametrize("old, new", [("true", "tensorboard"), ("false", "none")])
def test_run_folders_of_earlier_versions_say_it_in_the_old_way(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "config.yaml").write_text(f"seed: 1\ntensorboard: {old}\n")
    assert read_written(tmp_path / "config.yaml").tree == {"seed": 1, "tracker": new}
