"""Without these, a run goes on with other images, another arithmetic or half a data set, and its curve does not say so.

What decides the numbers of a run besides its configuration: the bytes of the shards, versions, device, threads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from tiny import make_shards, run_jobs, tensors, tiny_config, unequal, write_config

from sdtrain import outlook
from sdtrain.config.load import load_config
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.identity import PIECE_BYTES, differences, identity
from sdtrain.data.read.stream import Stream
from sdtrain.engine import launcher, threads
from sdtrain.engine.checkpoint import verify
from sdtrain.engine.origin import warnings
from sdtrain.errors import ShardChanged

END = 24


def flip(file: Path, at: int) -> None:
    """Change one byte, and leave size and time as they were."""
    found, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set under the name `data`, a link that can be pointed at others."""
    folder = tmp_path_factory.mktemp("origin")
    make_shards(folder / "right", samples=24)
    for name in ("flipped", "gone", "live"):
        shutil.copytree(folder / "right", folder / name)
    flip(folder / "flipped" / "001.tar", 600)
    (folder / "gone" / "002.tar").unlink()
    make_shards(folder / "copied", samples=24)  # the same bytes at another time
    (folder / "data").symlink_to("right")
    clock = {"batch_size": 8, "total_img": END, "log_img": 8, "save_img": END, "data__max_bad": 0.9}
    write_config(folder / "tiny.yaml", tiny_config(folder / "data", **clock))
    return folder


def args(place: Path, out: str, *more: str) -> list[str]:
    return ["--cfg", str(place / "tiny.yaml"), "--out", str(place / out), *more]


ON_DATA = ("flipped", "gone", "copied")
# while it runs: (what happens to the second shard in the second step, what is said)
CHANGES = {
    "replaced": ('mv "$0/../spare.tar" "$0/001.tar"', "was changed or replaced (20480 bytes then, 20480 now)"),
    "overwritten": ('truncate -s 1000 "$0/001.tar"', "was changed or replaced (20480 bytes then, 1000 now)"),
    "deleted": ('rm "$0/001.tar"', "was deleted while the run was reading it"),
}


# exchanges two files of a checkpoint, marker included
SWAP = """
import json, os, sys
folder, one, two = sys.argv[1:]
os.chdir(folder)
os.rename(one, "spare")
os.rename(two, one)
os.rename("spare", two)
marker = json.load(open("complete.json"))
files = marker["files"]
files[one], files[two] = files[two], files[one]
json.dump(marker, open("complete.json", "w"))
"""
SWAP = SWAP.strip()
CROSSED = {
    "nets": ("G.safetensors", "D.safetensors", "nets/checkpoints/img_000000016/G.safetensors holds something else: "),
    "optimizers": (
        *("G.optim.safetensors", "D.optim.safetensors"),
        "optimizers/checkpoints/img_000000016/G.optim.safetensors holds something else: ",
    ),
}


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, dict[str, Any]]:
    """One uninterrupted run, one stopped and resumed in many ways, and runs whose shards change under them."""
    stop = {"point": "in a step", "name": "SIGTERM", "time": 2}
    jobs: dict[str, dict[str, Any]] = {
        "whole": {"args": args(place, "whole")},
        "stopped": {"args": args(place, "stopped"), "signal": stop},
    }
    copy = f"cp -r {place}/stopped {place}/"
    for name in ON_DATA:
        jobs[name] = {"before": f"ln -sfn {name} {place}/data; {copy}{name}_run", "args": args(place, f"{name}_run")}
    allowed = args(place, "allowed", "--allow", "data.train")
    before = f"ln -sfn gone {place}/data; {copy}allowed"
    jobs["allowed"] = {"before": before, "args": allowed, "env": {"OMP_NUM_THREADS": "640"}}
    back = f"ln -sfn right {place}/data; {copy}threads"
    jobs["threads"] = {"before": back, "args": args(place, "threads"), "env": {"OMP_NUM_THREADS": ""}}
    for name, (one, two, _) in CROSSED.items():
        swap = f"{sys.executable} -c '{SWAP}' {place}/{name}/checkpoints/img_000000016 {one} {two}"
        jobs[name] = {"before": f"{copy}{name}; {swap}", "args": args(place, name)}
    wider = ["--set", "model.generator.ngf=4", "--allow", "model.generator.ngf"]
    jobs["wider"] = {"before": f"{copy}wider", "args": args(place, "wider", *wider)}
    live = place / "live"
    for name, (command, _) in CHANGES.items():
        fresh = f"cd {place}; ln -sfn live data; cp -p right/*.tar live/; cp flipped/001.tar spare.tar"
        more = ["--set", f"data.workers={int(name == 'deleted')}", "--set", "data.prefetch=1"]
        meanwhile = {"time": 2, "command": ["sh", "-c", command, str(live)]}
        jobs[name] = {"before": fresh, "args": args(place, name, *more), "meanwhile": meanwhile}
    restored = f"cp -p {place}/right/*.tar {live}/"
    jobs["restored"] = {"before": restored, "args": args(place, "deleted")}
    return dict(zip(jobs, run_jobs(place, list(jobs.values())), strict=True))


def test_a_run_goes_on_with_the_same_bytes_wherever_they_lie_and_says_nothing(place: Path, done: Any) -> None:
    assert done["stopped"]["code"] == 75 and done["copied"]["code"] == 0, done["copied"]["said"]
    assert "unlike" not in done["copied"]["said"]
    assert unequal(tensors(place / "whole", END), tensors(place / "copied_run", END)) == []


@pytest.mark.parametrize(
    "name, sentence",
    [("flipped", "shard 001.tar has another content"), ("gone", "24 samples, now 16\n  3 shards, now 2")],
)
def test_other_images_are_refused_and_named_and_nothing_is_touched(
    place: Path, done: Any, name: str, sentence: str
) -> None:
    assert done[name]["code"] == 2 and "Traceback" not in done[name]["said"], done[name]["said"]
    assert "the training data is not that of img_000000016" in done[name]["said"]
    assert sentence in done[name]["said"] and "--allow data.train" in done[name]["said"], done[name]["said"]
    for file in ("metrics.jsonl", "environment.json"):
        assert (place / f"{name}_run" / file).read_bytes() == (place / "stopped" / file).read_bytes()


def test_other_images_that_are_allowed_are_a_warning(done: Any) -> None:
    assert done["allowed"]["code"] == 0, done["allowed"]["said"]
    assert "unlike img_000000016: 24 samples, now 16" in done["allowed"]["said"]


def test_another_number_of_threads_is_chosen_recorded_and_a_warning(place: Path, done: Any) -> None:
    assert done["threads"]["code"] == 0, done["threads"]["said"]
    starts = json.loads((place / "threads" / "environment.json").read_text())["starts"]
    assert [start["threads"] for start in starts] == [[1], [threads.cores()]]
    if threads.cores() > 1:
        sentence = f"1 threads a rank (OMP_NUM_THREADS) then, {threads.cores()} threads a rank (OMP_NUM_THREADS) now"
        assert done["threads"]["said"].count(sentence) == 1, done["threads"]["said"]


@pytest.mark.parametrize("name", [*CROSSED, "wider"])
def test_tensors_of_another_network_are_refused_by_name_and_shape(place: Path, done: Any, name: str) -> None:
    said = done[name]["said"]
    assert done[name]["code"] == 2 and "Traceback" not in said, said
    sentence = CROSSED[name][2] if name in CROSSED else "wider/checkpoints/img_000000016/G.safetensors holds something"
    [line] = [line for line in said.splitlines() if sentence in line]
    assert "in the file and" in line and "in this run" in line and "nothing was loaded" in line
    assert (place / name / "metrics.jsonl").read_bytes() == (place / "stopped" / "metrics.jsonl").read_bytes()
    assert verify(place / name / "checkpoints" / "img_000000016") is None


@pytest.mark.parametrize("name", CHANGES)
def test_a_shard_that_changes_under_a_run_is_named_and_the_state_before_it_is_saved(
    place: Path, done: Any, name: str
) -> None:
    said = done[name]["said"]
    assert done[name]["code"] == 2 and "Traceback" not in said, said
    kept = place / name / "checkpoints" / "img_000000016"
    assert f"shard {place / 'data' / '001.tar'} {CHANGES[name][1]}" in said and f"{kept} was kept" in said, said
    assert verify(kept) is None
    assert unequal(tensors(place / "stopped", 16), tensors(place / name, 16)) == []


def test_with_the_shard_put_back_the_run_is_the_uninterrupted_one(place: Path, done: Any) -> None:
    assert done["restored"]["code"] == 0, done["restored"]["said"]
    assert unequal(tensors(place / "whole", END), tensors(place / "deleted", END)) == []


def test_the_same_bytes_under_another_inode_go_on(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", samples=24)
    dataset = open_dataset(tmp_path / "shards")
    stream = Stream(dataset, seed=0, batch_size=8, ghost_batch=2, ghosts=range(4), workers=0)
    with stream:
        next(stream)
        for name in ("000.tar", "001.tar", "002.tar"):
            shutil.copy2(tmp_path / "shards" / name, tmp_path / "spare")
            os.replace(tmp_path / "spare", tmp_path / "shards" / name)
        for _ in range(3):
            next(stream)
        (tmp_path / "shards" / "000.tar").touch()
        with pytest.raises(ShardChanged, match="000.tar was changed or replaced"):
            for _ in range(3):
                next(stream)


def test_a_full_comparison_sees_every_byte_and_a_quick_one_the_ends(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", samples=24)
    shard = tmp_path / "shards" / "001.tar"
    before = {full: identity(open_dataset(tmp_path / "shards"), full) for full in (False, True)}
    flip(shard, PIECE_BYTES + 1)
    after = {full: identity(open_dataset(tmp_path / "shards"), full) for full in (False, True)}
    assert differences(before[True], after[True]) == ["shard 001.tar has another content"]
    assert differences(before[False], after[False]) == differences(before[False], after[True]) == []
    flip(shard, shard.stat().st_size - 1)
    found = identity(open_dataset(tmp_path / "shards"))
    assert differences(before[False], found) == ["shard 001.tar has another content"]
    assert json.loads(json.dumps(found)) == found


def test_what_ends_the_equality_to_the_bit_is_one_sentence_each() -> None:
    one = {"torch": "2.10.0", "sdtrain": "1 a", "devices": ["CPU with AVX2"], "threads": [1], "world": []}
    two = {"torch": "2.11.0", "sdtrain": "1 b", "devices": ["H100"], "threads": [], "world": []}
    told = warnings(one, two)
    assert len(told) == 3 and all("not those of an uninterrupted run to the bit" in text for text in told)
    assert told[0].startswith("torch 2.10.0 then, torch 2.11.0 now") and warnings(one, one) == []


# Threads


def test_the_default_number_of_threads_is_a_ranks_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 12)
    shares = {ranks: threads.share({"LOCAL_WORLD_SIZE": ranks}) for ranks in ("1", "4", "5", "64", "many")}
    assert shares == {"1": 12, "4": 3, "5": 2, "64": 1, "many": 12}


def test_the_quota_of_a_container_cuts_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(threads, "PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert threads.cores() == 16
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("3:cpu,cpuacct:/docker/x\n0::/job/step\n")
    (tmp_path / "fs" / "job" / "step").mkdir(parents=True)
    (tmp_path / "fs" / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert threads.cores() == 16
    (tmp_path / "fs" / "job" / "cpu.max").write_text("350000 100000\n")
    assert threads.cores() == 3
    (tmp_path / "fs" / "cpu").mkdir()
    (tmp_path / "fs" / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "fs" / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.cores() == 1


def test_more_threads_than_cores_are_one_sentence_at_the_start_and_in_the_plan(
    place: Path, done: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "OMP_NUM_THREADS=640 for 1 rank here is more than"
    assert done["allowed"]["said"].count(sentence) == 1 and sentence not in done["whole"]["said"]
    monkeypatch.setenv("OMP_NUM_THREADS", "640")
    planned = outlook.warnings(load_config(place / "tiny.yaml"), open_dataset(place / "right"), END)
    assert sum(text.startswith(sentence) for text in planned) == 1
    assert threads.warning({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "64"}) == ""
    assert threads.warning({}) == threads.warning({"OMP_NUM_THREADS": "some"}) == ""


COUNT = """
import os, torch
from sdtrain.engine.threads import set_threads, share
set_threads()
print("threads", torch.get_num_threads(), "of", share(os.environ), "launcher says", os.environ["OMP_NUM_THREADS"])
"""


def test_the_one_thread_of_torchrun_is_no_wish_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text(COUNT)
    env = {name: value for name, value in os.environ.items() if name not in threads.ASKING}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "count.py")]
    done = subprocess.run([sys.executable, *launch], env=env, cwd=REPO, capture_output=True, text=True, timeout=300)
    share = max(threads.cores() // 2, 1)
    assert done.stdout.count(f"threads {share} of {share} launcher says 1") == 2, done.stdout + done.stderr


LAUNCHED = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    "env, parent, words, asked",
    [
        ({}, "", "torchrun", False),
        ({"OMP_NUM_THREADS": "1"}, "", "bash", True),
        (LAUNCHED, "A=1", "torchrun", False),
        (LAUNCHED, "OMP_NUM_THREADS=1", "torchrun", True),
        (LAUNCHED, "A=1", "accelerate\0launch\0--num_cpu_threads_per_process\x001", True),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, "A=1", "accelerate\0launch", False),
        (LAUNCHED, None, "", True),  # a system that does not say
    ],
)
def test_a_wish_is_told_from_a_launchers_habit_by_the_environment_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], parent: str | None, words: str, asked: bool
) -> None:
    if parent is not None:
        (tmp_path / str(os.getppid())).mkdir()
        (tmp_path / str(os.getppid()) / "environ").write_text(f"PATH=/bin\0{parent}\0")
        (tmp_path / str(os.getppid()) / "cmdline").write_text(words)
    monkeypatch.setattr(threads, "PROC", tmp_path)
    monkeypatch.setattr(launcher, "PROC", tmp_path)
    assert threads.asked(env) is asked
