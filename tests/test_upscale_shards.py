"""Whole data sets through `sdtrain upscale`. Without these a killed job would lose pictures or write others the next
time, two ranks would write one shard twice, and a bad picture would stop ten thousand good ones.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from killed_jobs import digests, kill, same_shards
from PIL import Image
from test_upscale import network_of, save
from tiny import picture

from sdtrain import cli
from sdtrain.data.read.dataset import open_dataset
from sdtrain.data.read.picture import read_picture
from sdtrain.interop.network import save_network
from sdtrain.models.srvgg import networks as srvgg

SHARDS, SAMPLES, SIDE = 4, 24, 32


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small x2 network."""
    torch.manual_seed(0)
    net = srvgg.Generator(srvgg.GeneratorOptions(num_feat=4, num_conv=2, upscale=2))
    return save_network(network_of(net), tmp_path_factory.mktemp("student") / "student.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes in four shards."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(SAMPLES):
        place = folder / "pictures" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        save(place / f"{number:02}.png", picture(number)[:SIDE, :SIDE])
    how = ["--resolution", str(SIDE), "--labels", "folder", "--shard-count", str(SHARDS), "--workers", "1"]
    assert cli.main(["pack", str(folder / "pictures"), str(folder / "shards"), *how]) == 0
    return folder / "shards"


def words(source: Path, student: Path, out: Path) -> list[str]:
    return ["upscale", str(source), "--model", str(student), "--out", str(out), "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(source: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(words(source, student, out)) == 0
    return out


def test_shards_become_a_data_set_of_enlarged_pictures_with_their_labels(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
) -> None:
    small, large = open_dataset(source), open_dataset(whole)
    assert (large.num_samples, large.resolution, large.label_names) == (SAMPLES, 2 * SIDE, ("a", "b"))
    assert large.index.label.tolist() == small.index.label.tolist()
    assert len(large.shards) == SHARDS and sorted(digests(whole)) == sorted(digests(source))
    alone = save(tmp_path / "one.png", np.asarray(Image.open(io.BytesIO(small.read(5)))))
    assert cli.main(["upscale", str(alone), *words(alone, student, tmp_path / "out")[2:]]) == 0
    (tmp_path / "shown.png").write_bytes(large.read(5))
    assert np.array_equal(read_picture(tmp_path / "out" / "one.png").rgb, read_picture(tmp_path / "shown.png").rgb)


def test_two_ranks_write_what_one_does_and_the_last_puts_all_in_their_places(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(words(source, student, tmp_path)) == 0
    assert "the rank that does the last one" in capsys.readouterr().out and not (tmp_path / "manifest.json").exists()
    monkeypatch.setenv("RANK", "1")
    assert cli.main(words(source, student, tmp_path)) == 0
    assert "upscaled 24 of 24 pictures into 4 shards" in capsys.readouterr().out
    assert digests(tmp_path) == digests(whole)


def test_two_ranks_at_once_under_torchrun_write_what_one_does(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
) -> None:
    done = run_ranks(2, "-m", "sdtrain.cli", *words(source, student, tmp_path))
    assert done.returncode == 0, done.stderr
    assert {f"rank {rank} of 2 had 2 of 4 shards" for rank in (0, 1)} <= set(done.stdout.splitlines())
    assert digests(tmp_path) == digests(whole)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_job_killed_at_random_moments_writes_the_same_bytes(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
    kills: int,
) -> None:
    out = tmp_path / "out"
    kill(words(source, student, out), out / ".pack", kills, lambda: same_shards(out, whole))
    assert cli.main(words(source, student, out)) == 0
    assert digests(out) == digests(whole)


def test_what_goes_wrong_on_one_rank_is_said_by_that_rank(
    source: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    (tmp_path / ".pack").write_text("in the way")
    assert cli.main(words(source, student, tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sdtrain (rank 1): --out {tmp_path}: cannot be written (File exists); mend that")


def test_a_picture_that_cannot_be_used_is_left_out_and_counted(
    source: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hurt = tmp_path / "shards"
    hurt.mkdir()
    for path in source.iterdir():
        (hurt / path.name).write_bytes(path.read_bytes())
    found = open_dataset(source)
    shard, offset = hurt / Path(found.shards[0]).name, int(found.index.offset[1])
    data = bytearray(shard.read_bytes())
    data[offset : offset + 16] = bytes(16)
    shard.write_bytes(data)
    assert cli.main(words(hurt, student, tmp_path / "out")) == 2
    told = capsys.readouterr()
    assert "upscaled 23 of 24 pictures" in told.out and "refused 1:" in told.err and found.index.key(1) in told.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["count"] == SAMPLES - 1 and [key for key, _ in manifest["rejected"]] == [found.index.key(1)]


def test_a_folder_of_other_shards_or_of_the_input_is_left_as_it_is(
    source: Path,
    whole: Path,
    student: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = digests(whole)
    assert cli.main([*words(source, student, whole), "--scale", "1"]) == 2
    assert (
        "holds shards made from another source or with other choices; choose another folder" in capsys.readouterr().err
    )
    assert cli.main(words(source, student, source)) == 2
    assert "is the folder of the input; choose another" in capsys.readouterr().err
    assert digests(whole) == before
    assert cli.main(words(source, student, whole)) == 0 and digests(whole) == before


def test_a_disk_that_is_full_ends_in_one_sentence_and_the_same_command_goes_on(
    source: Path,
    whole: Path,
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    from sdtrain.data.read import tars

    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tars.ShardWriter, "_write", full)
        assert cli.main(words(source, student, tmp_path / "out")) == 2
    assert "cannot be written (No space left on device); mend that" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert cli.main(words(source, student, tmp_path / "out")) == 0 and digests(tmp_path / "out") == digests(whole)
