"""A generator's images as a data set. Without these a killed job would lose images or draw others the next time, ranks
would draw one image twice, or labels would not be those that the images were drawn with.
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
from tiny import tiny_config, write_config

from sdtrain import cli
from sdtrain.commands.source import Source
from sdtrain.data.read.dataset import open_dataset
from sdtrain.interop.network import Network, save_network

NUM, BATCH, SHARDS, SIDE = 22, 4, 3, 16


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StyleGAN2 of three classes, random weights."""
    options = {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8, "mapping_layers": 1}
    card: dict[str, Any] = {"kind": "stylegan2", "player": "Generator", "role": "G_ema", "options": options}
    blank = Network(**card, state={}, resolution=SIDE, num_classes=3)
    torch.manual_seed(0)
    network = Network(**{**vars(blank), "state": blank.fresh().state_dict()})
    return save_network(network, tmp_path_factory.mktemp("generator") / "G_ema")


def words(generator: Path, out: Path, *more: str) -> list[str]:
    chosen = [
        "--num-images",
        str(NUM),
        "--batch",
        str(BATCH),
        "--shards",
        str(SHARDS),
        "--seed",
        "5",
        "--device",
        "cpu",
    ]
    return ["sample", str(generator), "--out", str(out), *chosen, *more]


@pytest.fixture(scope="module")
def whole(generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(words(generator, out)) == 0
    return out


def test_images_become_a_data_set_with_the_labels_they_were_drawn_with(
    generator: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    found = open_dataset(whole)
    assert (found.num_samples, found.resolution, found.label_names) == (NUM, SIDE, ("0", "1", "2"))
    assert [found.index.key(i) for i in range(NUM)] == [f"{i:06d}" for i in range(NUM)] and len(found.shards) == SHARDS
    assert sum(n > 0 for n in found.class_counts) > 1 and sum(found.class_counts) == NUM
    assert cli.main(["verify", str(whole)]) == 0
    single = ["--num", str(NUM), "--batch", str(BATCH), "--seed", "5", "--device", "cpu"]
    assert cli.main(["sample", str(generator), "--out", str(tmp_path), *single]) == 0
    for i in range(NUM):
        assert np.array_equal(Image.open(io.BytesIO(found.read(i))), Image.open(tmp_path / f"{i:06d}.png"))
    label = int(found.index.label[0])
    other = next(k for k in range(3) if k != label)
    for chosen in (label, other):  # drawn again as one class: the same image for the label alone
        out = tmp_path / str(chosen)
        assert cli.main(["sample", str(generator), "--out", str(out), *single, "--class", str(chosen)]) == 0
        same = np.array_equal(Image.open(out / "000000.png"), Image.open(tmp_path / "000000.png"))
        assert same == (chosen == label)


def test_the_cut_into_shards_decides_neither_images_nor_their_batches(
    generator: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[int]] = []
    real = Source.__call__
    monkeypatch.setattr(Source, "__call__", lambda self, part: (drawn.append(list(part)), real(self, part))[1])
    assert cli.main([*words(generator, tmp_path), "--shards", "5"]) == 0
    assert drawn == [list(range(first, min(first + BATCH, NUM))) for first in range(0, NUM, BATCH)]
    cut, found = open_dataset(tmp_path), open_dataset(whole)
    assert len(cut.shards) == 5 and [cut.read(i) for i in range(NUM)] == [found.read(i) for i in range(NUM)]


def test_two_ranks_at_once_under_torchrun_draw_what_one_does(generator: Path, whole: Path, tmp_path: Path) -> None:
    done = run_ranks(2, "-m", "sdtrain.cli", *words(generator, tmp_path))
    assert done.returncode == 0, done.stderr
    assert {f"rank {rank} of 2 had {2 - rank} of 3 shards" for rank in (0, 1)} <= set(done.stdout.splitlines())
    assert digests(tmp_path) == digests(whole)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_job_killed_at_random_moments_writes_the_same_bytes(
    generator: Path,
    whole: Path,
    tmp_path: Path,
    kills: int,
) -> None:
    out = tmp_path / "out"
    kill(words(generator, out), out / ".pack", kills, lambda: same_shards(out, whole))
    assert cli.main(words(generator, out)) == 0
    assert digests(out) == digests(whole)


@pytest.mark.parametrize("other", [["--seed", "6"], ["--truncation", "0.5"], ["--jpeg", "90"], ["--num", "21"]])
def test_a_folder_of_other_images_is_left_as_it_is(
    generator: Path,
    whole: Path,
    other: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = digests(whole)
    assert cli.main([*words(generator, whole), *other]) == 2
    assert "holds shards made from another source or with other choices; choose another folder" in (
        capsys.readouterr().err
    )
    assert digests(whole) == before
    assert cli.main(words(generator, whole)) == 0 and digests(whole) == before


def test_classes_have_the_names_of_the_training_set_unless_it_is_not_to_be_opened(
    generator: Path,
    tmp_path: Path,
) -> None:
    for name in "abc":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "pictures" / name / "one.png")
    data = str(tmp_path / "data")
    how = ["--resolution", str(SIDE), "--labels", "folder", "--workers", "1"]
    assert cli.main(["pack", str(tmp_path / "pictures"), data, *how]) == 0
    assert cli.main(words(generator, tmp_path / "named", "--data", data, "--class", "b")) == 0
    named = open_dataset(tmp_path / "named")
    assert named.label_names == ("a", "b", "c") and named.class_counts == [0, NUM, 0]


def test_a_run_needs_no_training_set_for_data_free_images(generator: Path, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    for file in generator.parent.glob("G_ema*"):
        (tmp_path / "best" / file.name).write_bytes(file.read_bytes())
    place = tmp_path / "best" / generator.name
    write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "gone") | {"name": "gone"})
    assert cli.main(words(place, tmp_path / "no")) == 2
    assert cli.main(words(place, tmp_path / "out", "--data-free")) == 0
    assert open_dataset(tmp_path / "out").num_classes == 3


def test_jpegs_are_packed_where_they_are_asked_for(generator: Path, tmp_path: Path) -> None:
    assert cli.main(words(generator, tmp_path, "--jpeg", "90")) == 0
    found = open_dataset(tmp_path)
    assert found.read(0)[:2] == b"\xff\xd8" and json.loads((tmp_path / "manifest.json").read_text())["pack"]["jpeg"]


def test_a_disk_that_is_full_ends_in_one_sentence_and_the_same_command_goes_on(
    generator: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sdtrain.data.read import tars

    def full(self: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tars.ShardWriter, "_write", full)
        assert cli.main(words(generator, tmp_path)) == 2
    assert "cannot be written (No space left on device); mend that" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tar"))
    assert cli.main(words(generator, tmp_path)) == 0 and digests(tmp_path) == digests(whole)


REFUSALS = [
    (["--shards", "0"], "--shards 0: take at least 1, of single images (no sheet, no interpolation)"),
    (["--grid"], "--shards 3: take at least 1, of single images (no sheet, no interpolation)"),
    (["--jpeg", "101"], "--jpeg 101 is a quality from 1 to 100 of images in shards; add --shards N"),
    (
        ["--data-free", "--data", "x"],
        "--data names a training set and --data-free opens none; leave one of them out",
    ),
    (
        ["--shards", "7"],
        "--shards 7: 22 images in batches of 4 fill 6 shards at most; take fewer shards or a smaller --batch",
    ),
]


@pytest.mark.parametrize(("more", "sentence"), REFUSALS)
def test_choices_that_cannot_work_are_refused(
    generator: Path,
    more: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(words(generator, tmp_path / "out", *more)) == 2
    assert capsys.readouterr().err == f"sdtrain: {sentence}\n"
    assert not (tmp_path / "out").exists()
