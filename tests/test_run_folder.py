"""Without these, a damaged folder begins again over the curve of weeks, or two runs write into one folder.

What a run folder must never lose: its rows while no checkpoint can be taken up, and its only writer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python, run_ranks
from tiny import make_shards, rows, run_jobs, tiny_config, write_config

from sdtrain.engine.checkpoint import MARKER, digest, newest, verify
from sdtrain.engine.lock import FolderLock
from sdtrain.engine.restart import refuse_to_start_over, set_aside
from sdtrain.errors import RunError

END = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    make_shards(folder / "shards", samples=24)
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": 8}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock))
    return folder


def args(place: Path, out: str, *more: str) -> list[str]:
    return ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), *more]


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which each start opens."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def each(out: Path, name: str) -> list[Path]:
    return [folder / name for folder in sorted((out / "checkpoints").glob("img_*"))]


def unmark(out: Path) -> None:
    for marker in each(out, MARKER):
        marker.unlink()


def cut(out: Path) -> None:
    for file in each(out, "G.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])


def empty(out: Path) -> None:
    first, second = each(out, MARKER)
    first.write_text('{"files": {}}')
    second.write_text('{"files": []}')


def lose(out: Path) -> None:
    shutil.rmtree(out / "checkpoints")


# harm: (what it does to a finished run, what the refusal says)
HARMS: dict[str, tuple[Any, str]] = {
    "unmarked": (unmark, "img_000000016 is not used: it has no marker: the save was interrupted"),
    "damaged": (cut, "img_000000008 is not used: G.safetensors does not match its digest"),
    "empty": (empty, "img_000000008 is not used: its marker lists no files"),
    "lost": (lose, "there is no checkpoint"),
}
ROWS = b'5\nnull\n\xff\xfe\n{"seen_img": "x"}\n[]\n{"seen_img": 8}\n'  # the last one alone is a row
STATES = {"text": b"\xff", "list": b"[]", "deep": b"[" * 100_000, "short": b'{"step": 2}'}


def seal(folder: Path) -> None:
    """Mark a checkpoint as complete with what it holds now."""
    files = {path.name: digest(path) for path in folder.iterdir() if path.name != MARKER}
    (folder / MARKER).write_text(json.dumps({"files": files}))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    done = run_jobs(place, [{"args": args(place, "whole")}])[0]
    assert done["code"] == 0, done["said"]
    return place / "whole"


@pytest.fixture(scope="module")
def started(place: Path, whole: Path) -> dict[str, Any]:
    """One start in copies of a finished run: harmed, with a stranger's state and notes, and asked to begin again."""
    names = [*HARMS, "short", "notes", "again"]
    for name in names:
        shutil.copytree(whole, place / name)
    for name, (harm, _) in HARMS.items():
        harm(place / name)
    for file in each(place / "short", "state.json"):
        file.write_bytes(STATES["short"])
        seal(file.parent)
    (place / "notes" / "environment.json").write_bytes(b"")
    (place / "notes" / "metrics.jsonl").write_bytes(ROWS)
    jobs = {name: {"args": args(place, name)} for name in names}
    begin_again = args(place, "again", "--restart", "--set", "seed=1")
    jobs["again"] = {"args": begin_again}
    jobs["requeued"] = {"args": begin_again, "env": {"SLURM_RESTART_COUNT": "1"}}
    before = {name: content(place / name) for name in names}
    done = dict(zip(jobs, run_jobs(place, list(jobs.values())), strict=True))
    return {"done": done, "before": before}


@pytest.mark.parametrize("name", HARMS)
def test_a_folder_with_rows_and_no_usable_checkpoint_is_refused_with_what_was_found_and_stays_as_it_is(
    place: Path, started: dict[str, Any], name: str
) -> None:
    done = started["done"][name]
    assert done["code"] == 2 and "Traceback" not in done["said"], done["said"]
    assert "4 rows of metrics.jsonl up to image 16" in done["said"] and "--restart" in done["said"], done["said"]
    assert HARMS[name][1] in done["said"]
    assert content(place / name) == started["before"][name]


@pytest.mark.parametrize("what", ["rows", "snapshots", "best"])
def test_whatever_a_run_has_left_keeps_a_fresh_start_out(tmp_path: Path, whole: Path, what: str) -> None:
    refuse_to_start_over(tmp_path, [])  # an empty folder may be begun in
    if what == "rows":
        (tmp_path / "metrics.jsonl").write_bytes(b"\xff not even a row\n")
    elif what == "snapshots":
        shutil.copytree(whole / "checkpoints" / "img_000000008", tmp_path / "snapshots" / "img_000000008")
    else:
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / "G.safetensors").write_bytes(b"weights")
    with pytest.raises(RunError, match=f"1 {what}.*\n  there is no checkpoint"):
        refuse_to_start_over(tmp_path, [])


def test_damaged_notes_of_a_run_are_one_sentence_and_it_goes_on(place: Path, started: dict[str, Any]) -> None:
    done, out = started["done"]["notes"], place / "notes"
    assert done["code"] == 0 and "Traceback" not in done["said"], done["said"]
    assert done["said"].count("environment.json is damaged") == 1 and "going on at 16" in done["said"]
    assert (out / "environment.json.damaged").read_bytes() == b""
    assert len(json.loads((out / "environment.json").read_text())["starts"]) == 1
    assert (out / "metrics.jsonl").read_text() == '{"seen_img": 8}\n'


def test_a_state_that_is_none_is_refused_in_one_sentence(
    place: Path, whole: Path, started: dict[str, Any], tmp_path: Path
) -> None:
    done = started["done"]["short"]
    assert done["code"] == 2 and "Traceback" not in done["said"], done["said"]
    assert "is whole, but not of this run" in done["said"]
    assert content(place / "short") == started["before"]["short"]
    for name in ("text", "list", "deep"):
        shutil.copytree(whole / "checkpoints" / "img_000000008", tmp_path / name / "img_000000008")
        (tmp_path / name / "img_000000008" / "state.json").write_bytes(STATES[name])
        seal(tmp_path / name / "img_000000008")
        found, [reason] = newest(tmp_path / name)
        assert found is None and "img_000000008 is not used: its state.json is unreadable" in reason


def test_restart_moves_the_whole_run_into_a_dated_folder_and_begins_again(place: Path, started: dict[str, Any]) -> None:
    done, before = started["done"]["again"], started["before"]["again"]
    assert done["code"] == 0, done["said"]
    [kept] = (place / "again").glob("before-*")
    assert re.fullmatch(r"before-\d{8}-\d{6}", kept.name) and f"moved into {kept}" in done["said"]
    assert content(kept) == before
    assert [row["seen_img"] for row in rows(place / "again")] == [8, 16] and "starting in" in done["said"]


def test_restart_moves_nothing_that_no_run_wrote(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert set_aside(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("")
    moved = set_aside(tmp_path)
    assert moved is not None and [path.name for path in moved.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_requeued_job_whose_command_says_restart_goes_on(place: Path, started: dict[str, Any]) -> None:
    assert "going on at 16" in started["done"]["requeued"]["said"]
    assert len(list((place / "again").glob("before-*"))) == 1


def test_a_repeated_job_begins_again_where_nothing_but_the_rows_before_the_first_save_was_there(place: Path) -> None:
    """And only there: what is repeated by itself must not begin over a run that has lost its checkpoints."""
    start, again = args(place, "early"), {"SLURM_RESTART_COUNT": "1"}
    killed, refused, begun = run_jobs(
        place,
        [
            {"args": start, "env": {"SDTRAIN_FAULT": "before-marker"}},
            {"args": start},
            {"args": start, "env": again},
        ],
    )
    assert killed["code"] == -signal.SIGKILL and refused["code"] == 2
    assert begun["code"] == 0 and "beginning again: the run that was here was moved into" in begun["said"]
    assert [row["seen_img"] for row in rows(place / "early")] == [8, 16]
    lose(place / "early")
    [late] = run_jobs(place, [{"args": start, "env": again}])
    assert late["code"] == 2 and "there is no checkpoint" in late["said"]


@pytest.mark.parametrize(
    "marker",
    [
        *('{"files": {}}', '{"files": []}', '{"files": null}', "{}", "[]", "5", "", "[" * 100_000),
        '{"files": {"a": 1}}',
        *('{"files": {"../../G": {}}}', '{"files": {"a\\u0000b": {}}}', '{"files": {"pipe": {"bytes": 0}}}'),
    ],
)
def test_a_marker_that_vouches_for_nothing_makes_no_checkpoint(tmp_path: Path, marker: str) -> None:
    (tmp_path / "G.safetensors").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / MARKER).write_text(marker)
    reason = verify(tmp_path)
    assert reason and "\n" not in reason and len(reason) < 200


# The lock


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[int]:
    """Another process that holds the lock of a folder; its pid."""
    ready, held = os.pipe()
    if (pid := os.fork()) == 0:
        with FolderLock(folder):
            os.write(held, b"!")
            time.sleep(300)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(held)


def test_a_second_run_ends_on_all_ranks_and_names_host_process_and_time_of_the_first(place: Path, whole: Path) -> None:
    before = content(whole)
    with holder(whole) as pid:
        began = time.strftime("%Y-%m-%d %H:")
        done = run_ranks(2, "sdtrain/main.py", *args(place, "whole", "--set", "total_img=400"))
    sentence = f"{whole} is in use by process {pid} on {socket.gethostname()} since {began}"
    for rank in (0, 1):
        [said] = [line for line in done.stderr.splitlines() if f"sdtrain (rank {rank}): " in line]
        assert sentence in said and "another run folder with --out" in said
    assert done.returncode and not re.search(r'File ".*/sdtrain/', done.stderr), done.stderr
    assert content(whole) == before


def test_reading_commands_do_not_ask_for_the_lock(tmp_path: Path, whole: Path) -> None:
    with holder(whole):
        done = run_python("-m", "sdtrain.cli", "report", str(whole), "--out", str(tmp_path / "report.md"))
    assert done.returncode == 0, done.stderr


def test_the_lock_of_a_killed_process_is_free_and_one_that_ended_leaves_it_empty(tmp_path: Path) -> None:
    with holder(tmp_path), pytest.raises(RunError, match="in use"), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_bytes() == b""


def test_an_orphan_of_the_holder_does_not_keep_the_folder(tmp_path: Path) -> None:
    ready, held = os.pipe()
    if (pid := os.fork()) == 0:
        with FolderLock(tmp_path):
            orphan = subprocess.Popen(["sleep", "30"], close_fds=False)
            os.write(held, str(orphan.pid).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    orphan_pid = int(os.read(ready, 20))
    with FolderLock(tmp_path):
        assert (Path("/proc") / str(orphan_pid)).exists(), "the orphan ended before its lock could matter"
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    os.kill(orphan_pid, signal.SIGKILL)


def race(folder: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        with FolderLock(Path(folder)):
            results.put("held")
            barrier.wait(60)
    except RunError as error:
        results.put(str(error))
        barrier.wait(60)


def test_of_starts_at_the_same_moment_one_gets_the_folder_and_the_others_are_told_whose_it_is(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        barrier, results = context.Barrier(4), context.Queue()
        racers = [context.Process(target=race, args=(str(tmp_path / str(attempt)), barrier, results)) for _ in range(4)]
        for racer in racers:
            racer.start()
        told = sorted(results.get(timeout=60) for _ in racers)
        for racer in racers:
            racer.join()
        assert told.count("held") == 1 and sum("is in use by process" in said for said in told) == 3, told


@pytest.mark.parametrize("obstacle", ["link", "folder", "pipe", "file above"])
def test_a_lock_that_is_no_file_is_neither_followed_nor_waited_for(tmp_path: Path, obstacle: str) -> None:
    (tmp_path / "theirs").write_text("precious")
    run = tmp_path / "theirs" / "run" if obstacle == "file above" else tmp_path / "run"
    if obstacle != "file above":
        run.mkdir()
    if obstacle == "link":
        (run / ".lock").symlink_to(tmp_path / "theirs")
    elif obstacle == "folder":
        (run / ".lock").mkdir()
    elif obstacle == "pipe":
        os.mkfifo(run / ".lock")
    with pytest.raises(RunError, match="choose another"), FolderLock(run):
        pass
    assert (tmp_path / "theirs").read_text() == "precious"


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with FolderLock(tmp_path):
        assert "no locks here" in caplog.text
