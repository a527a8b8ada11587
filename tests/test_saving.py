"""Without these a checkpoint could mix two steps, be lost when something ends the run while it is written, or
hide behind an older one.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import make_shards, rows, run_jobs, tensors, tiny_config, unequal, write_config

from sdtrain.engine.checkpoint import MARKER, commit, newest, recover, retain, verify
from sdtrain.engine.preempt import StopRequest
from sdtrain.engine.saving import Order, Saver, deal
from sdtrain.engine.staging import DTYPES, Staging
from sdtrain.engine.writing import Writing, cannot_write
from sdtrain.files import write_json, write_pieces

END, KILLED, REQUEUE = 32, -9, 75
CPU = torch.device("cpu")

# In this process


def some(step: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "G": {"weight": torch.full((300, 7), step), "count": torch.tensor(step)},
        "D": {"b": torch.full((5,), step)},
    }


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    return Saver(Writing(tmp_path), CPU)


def order(root: Path, seen_img: int, files: dict[str, Any]) -> Order:
    return Order(root=root / "checkpoints", seen_img=seen_img, files=files, state={"step": seen_img}, keep=1)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writers begin when it is set."""
    opened, write = threading.Event(), Saver._write

    def wait_and_write(*args: Any) -> None:
        assert opened.wait(60)
        write(*args)

    monkeypatch.setattr(Saver, "_write", wait_and_write)
    return opened


def test_a_checkpoint_holds_its_own_step_whatever_training_does_before_it_is_written(
    tmp_path: Path, saver: Saver, gate: threading.Event
) -> None:
    for step in (1, 2):
        live, stop = some(step), StopRequest()
        asked = order(tmp_path, step, live)
        saver.save(asked, stop)
        assert asked.state is not None
        asked.state["step"] = 99
        for file in live.values():
            for value in file.values():
                value.add_(1000)
        assert saver.busy and stop._saving and not asked.final.exists()
        gate.set()
        assert saver.wait() and not saver.busy and not stop._saving
        gate.clear()
        for name, file in some(step).items():
            found = load_file(asked.final / f"{name}.safetensors")
            assert found.keys() == file.keys() and all(torch.equal(found[key], file[key]) for key in file)
        checkpoint, refused = newest(asked.root)
        assert checkpoint is not None and checkpoint.state == {"step": step, "meters": {"0": None}} and not refused
    assert [path.name for path in asked.root.glob("*")] in (["latest", asked.final.name], [asked.final.name, "latest"])


def test_a_second_writer_beside_the_first_is_an_error(tmp_path: Path, saver: Saver, gate: threading.Event) -> None:
    saver.save(order(tmp_path, 1, some(1)), StopRequest())
    with pytest.raises(AssertionError):
        saver.save(order(tmp_path, 2, some(2)), StopRequest())
    assert saver.wait(0.5) and saver.busy  # it has not failed so far
    gate.set()
    assert saver.wait()


def test_a_writer_that_fails_leaves_the_earlier_checkpoint_and_its_sentence_for_the_step_boundary(
    tmp_path: Path, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.save(order(tmp_path, 1, some(1)), StopRequest())
    assert saver.wait()

    def refuse(*_: Any) -> None:
        raise ValueError("no idea")

    monkeypatch.setattr(Saver, "_write", refuse)
    saver.save(order(tmp_path, 2, some(2)), StopRequest())
    assert not saver.wait() and "no idea" in saver.writing.problem and "img_000000002" in saver.writing.problem
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["img_000000001", "latest"]


def test_a_staged_file_is_what_safetensors_would_write_in_memory_that_is_used_again() -> None:
    chance, staging = torch.Generator().manual_seed(0), Staging(CPU)
    mixed = {f'{kind}"\u00e4': torch.randint(0, 2, (3, 5), generator=chance).to(kind) for kind in DTYPES}
    mixed |= {"turned": torch.rand(4, 6, generator=chance).t(), "none": torch.empty(0, 3), "one": torch.tensor(2.5)}
    first = staging.take({"a": mixed, "b": {}})
    assert b"".join(first["a"].pieces()) == save({name: value.contiguous() for name, value in mixed.items()})
    assert b"".join(first["b"].pieces()) == save({})
    assert staging.take({"a": mixed})["a"].data.data_ptr() == first["a"].data.data_ptr()


def test_files_are_dealt_by_their_size_so_that_no_rank_has_much_more_than_another() -> None:
    sizes = {"G": 30, "D": 30, "G_ema": 30, "G.optim": 60, "D.optim": 60, "best": 30}
    for ranks in (1, 2, 4):
        owner = deal(sizes, ranks)
        loads = [sum(sizes[name] for name in sizes if owner[name] == rank) for rank in range(ranks)]
        assert sum(loads) == 240 and max(loads) - min(loads) <= 30, loads
    assert max(deal(sizes, 16).values()) == 5  # whole files: more ranks than files have nothing to write


# Folders


def folder(root: Path, seen_img: int, value: float = 0.0) -> Path:
    """A complete checkpoint."""
    tmp, final = root / ".writing", root / f"img_{seen_img:09d}"
    tmp.mkdir(parents=True)
    state = write_pieces(tmp / "state.json", [b'{"step": %d}' % seen_img])
    content = write_pieces(tmp / "G.safetensors", [save({"w": torch.tensor(value)})])
    commit(tmp, final, {"state.json": state, "G.safetensors": content})
    return final


def test_the_newest_is_the_one_with_the_largest_number_also_beyond_nine_digits(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    old, new = folder(root, 999_999_999), folder(root, 1_000_000_000)
    for name in ("img_2e9", "img_", "img_-3", "img_\u00b2"):
        shutil.copytree(new, root / name)
    found, refused = newest(root)
    assert found is not None and found.path == new and not refused
    assert new.name in StopRequest(root).kept()
    assert f"up to {new.name} are safe" in cannot_write(root / "x", OSError(28, "full"), tmp_path)
    retain(root, 1)
    assert new.exists() and not old.exists()


def test_a_damaged_newer_checkpoint_does_not_cost_the_one_that_was_just_written(tmp_path: Path) -> None:
    damaged, older, last = folder(tmp_path, 24), folder(tmp_path, 8), folder(tmp_path, 16)
    (damaged / "G.safetensors").write_bytes(b"")
    retain(tmp_path, 1, last)
    assert last.exists() and damaged.exists() and not older.exists()
    found, [reason] = newest(tmp_path)
    assert found is not None and found.path == last and "img_000000024 is not used: G.safetensors" in reason


def test_what_is_wanted_is_read_once_and_an_older_checkpoint_is_taken_where_a_bit_is_wrong(tmp_path: Path) -> None:
    folder(tmp_path, 8, value=1.5)
    flipped = folder(tmp_path, 16) / "G.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\1")
    found, refused = newest(tmp_path, lambda name: True)
    assert refused == ["img_000000016 is not used: G.safetensors does not match its digest"] and found is not None
    (tmp_path / "img_000000008" / "G.safetensors").unlink()  # it is in memory already
    assert found.tensors("G")["w"] == 1.5


@pytest.mark.parametrize("wanted", [None, lambda name: True], ids=["main rank", "each rank"])
def test_both_ways_of_reading_refuse_with_the_same_words(tmp_path: Path, wanted: Any) -> None:
    kinds = {
        8: (lambda f: (f / "G.safetensors").unlink(), "G.safetensors is missing"),
        16: (lambda f: (f / "G.safetensors").write_bytes(b"x"), "G.safetensors does not match its digest"),
        24: (lambda f: (f / "state.json").write_bytes(b'{"step": 9.}'), "state.json does not match its digest"),
        32: (lambda f: (f / MARKER).unlink(), "it has no marker: the save was interrupted"),
        40: (lambda f: write_json(f / MARKER, {"files": {}}), "its marker lists no files"),
        48: (lambda f: write_json(f / MARKER, {"files": {"a": {}}}), "its marker does not say what a holds"),
    }
    for seen_img, (harm, _) in kinds.items():
        harm(folder(tmp_path, seen_img))
    found, refused = newest(tmp_path, wanted)
    said = [f"img_{at:09d} is not used: {kinds[at][1]}" for at in sorted(kinds, reverse=True)]
    assert found is None and refused == said


def test_a_checkpoint_that_was_being_replaced_when_the_process_died_gets_its_name_back(tmp_path: Path) -> None:
    kept = folder(tmp_path, 8)
    kept.rename(tmp_path / f".writing-old-{kept.name}")  # between the two renames of `commit`
    assert newest(tmp_path)[0] is None
    recover(tmp_path)
    assert verify(kept) is None
    folder(tmp_path, 8, value=3.0)  # replaces it
    recover(tmp_path)
    found = newest(tmp_path, lambda name: True)[0]
    assert found is not None and found.tensors("G")["w"] == 3.0


# Whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    make_shards(folder / "shards", samples=24)
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": 8, "eval_img": 16, "keep_checkpoints": 9}
    metrics = {"names": ["rfid"], "num_fake": 12, "seeds": 1, "tap": 64, "select_by": "rfid", "batch_size": 4}
    write_config(folder / "tiny.yaml", tiny_config(folder / "shards", **clock, metrics=metrics))
    return folder


def job(place: Path, out: str, *more: str, **wishes: Any) -> dict[str, Any]:
    args = ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out)]
    return {"args": [*args, *(word for key in more for word in ("--set", key))], "plain": True, **wishes}


SLOW = {"point": "inside a save", "how": "sleep", "sec": 3}
TERM = {"point": "inside a save", "name": "SIGTERM", "time": 3}


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """Runs whose writer is slow at a save that the next one follows at once, at the last, and when a signal comes."""
    jobs = {
        "whole": job(place, "whole", "save_async=false"),
        "slow": job(place, "slow", harm=SLOW),
        "last": job(place, "last", harm={**SLOW, "time": 4}),
        "stopped": job(place, "stopped", harm={**SLOW, "time": 3}, signal=TERM),
        "killed": job(place, "killed", harm={"point": "in an evaluation", "how": "SIGKILL", "time": 2}),
        "killed again": job(place, "killed"),
        "last killed": job(place, "last killed", env={"SDTRAIN_FAULT": "between-renames"}),
        "last killed again": job(place, "last killed"),
    }
    return dict(zip(jobs, run_jobs(place, list(jobs.values())), strict=True))


def saved(out: Path) -> list[int]:
    return sorted(int(path.name[4:]) for path in (out / "checkpoints").glob("img_*"))


@pytest.mark.parametrize("name", ["slow", "last"])
def test_saves_that_fall_behind_training_hold_what_synchronous_ones_do(
    place: Path, done: dict[str, Any], name: str
) -> None:
    assert done["whole"]["code"] == done[name]["code"] == 0, done[name]["said"]
    assert saved(place / name) == saved(place / "whole") == [8, 16, 24, 32]
    for at in saved(place / name):
        assert verify(place / name / "checkpoints" / f"img_{at:09d}") is None
        assert unequal(tensors(place / "whole", at), tensors(place / name, at)) == []
    assert rows(place / "whole") == rows(place / name)


def test_a_signal_while_a_save_runs_waits_for_it_and_names_what_is_there(place: Path, done: dict[str, Any]) -> None:
    told = done["stopped"]
    assert told["code"] == REQUEUE, told["said"]
    last = saved(place / "stopped")[-1]
    assert f"stopped at {last} images; kept {place / 'stopped' / 'checkpoints' / f'img_{last:09d}'};" in told["said"]
    assert last >= 24 and unequal(tensors(place / "whole", last), tensors(place / "stopped", last)) == []


def test_a_kill_inside_an_evaluation_loses_nothing_and_it_is_done_after_all(place: Path, done: dict[str, Any]) -> None:
    killed, again = done["killed"], done["killed again"]
    assert killed["code"] == KILLED and again["code"] == 0, again["said"]
    assert "going on at 16 from" in again["said"]
    assert rows(place / "whole") == rows(place / "killed")
    assert unequal(tensors(place / "whole", END), tensors(place / "killed", END)) == []
    for name in ("metrics.json", "G_ema.safetensors"):
        assert (place / "whole" / "best" / name).read_bytes() == (place / "killed" / "best" / name).read_bytes()


def test_a_kill_while_the_last_checkpoint_is_replaced_by_one_that_owes_nothing_keeps_it(
    place: Path, done: dict[str, Any]
) -> None:
    killed, again = done["last killed"], done["last killed again"]
    assert killed["code"] == KILLED and again["code"] == 0, again["said"]
    assert "going on at 32 from" in again["said"]
    assert rows(place / "whole") == rows(place / "last killed") and saved(place / "last killed")[-1] == END
    assert unequal(tensors(place / "whole", END), tensors(place / "last killed", END)) == []
