"""Recipes of the data sets. Without these a configuration could name shards that nobody knows how to make, or a split
could differ from one machine to the next.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPO
from PIL import Image
from test_pack import packed, parsed, photos

from sdtrain.config.load import load_config
from sdtrain.data.pack import pack
from sdtrain.data.pack.cifar10 import CLASSES
from sdtrain.data.pack.cifar10 import main as cifar_main
from sdtrain.data.pack.photos import export_crops, export_photos
from sdtrain.data.pack.splits import main as splits_main
from sdtrain.data.pack.splits import split
from sdtrain.errors import DataError

__all__ = ["photos"]
RECIPES = sorted((REPO / "shards").glob("*.yaml"))
CONFIGS = sorted(path for path in (REPO / "configs").rglob("*.yaml") if path.parent.name != "suites")


def commands() -> dict[str, list[str]]:
    """The folder that each recipe makes, and the words that make it."""
    entries = [entry for recipe in RECIPES for entry in yaml.safe_load(recipe.read_text())["shards"].values()]
    return {entry["pack"][3]: entry["pack"] for entry in entries}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_where_data_come_from_and_its_commands_parse(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    assert set(content) == {"name", "homepage", "how_to_get", "licence", "notes", "shards"}
    for name, entry in content["shards"].items():
        words = entry["pack"]
        assert words[:2] == ["sdtrain", "pack"] and words[3] in (f"shards/{name}", name)
        pack.check_arguments(parsed(pack, *words[2:]))
        assert entry["count"] is None or entry["count"] > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(REPO / "configs").as_posix())
def test_every_shard_folder_of_a_configuration_is_made_by_a_recipe_at_its_size(path: Path) -> None:
    data = getattr(load_config(path), "data", None)
    if data is None or load_config(path).method == "dirac":
        return
    made = commands()
    for part in (data.train, data.val, data.test):
        for source in [part] if isinstance(part, str) else part or ():
            assert source in made, f"{source}: no recipe in shards/ makes it"
            options = parsed(pack, *made[source][2:])
            side = options.resolution if part is data.train else 0
            assert not side or side == data.resolution or data.resolution is None


def test_the_readme_of_the_shards_names_every_recipe() -> None:
    text = (REPO / "shards" / "README.md").read_text()
    assert [recipe.name for recipe in RECIPES if f"`{recipe.name}`" not in text] == []


def test_lists_of_recipes_lie_here_or_are_made_by_the_command_of_their_recipe() -> None:
    for recipe in RECIPES:
        content = yaml.safe_load(recipe.read_text())
        for entry in content["shards"].values():
            options = parsed(pack, *entry["pack"][2:])
            for name in filter(None, (options.list, options.exclude_list)):
                if name.startswith("shards/") and not (REPO / name).is_file():
                    assert f"splits {options.source} {Path(name).parent}" in " ".join(content["how_to_get"].split())


def test_the_quickstart_packs_as_its_recipe_says() -> None:
    script = " ".join((REPO / "launch" / "quickstart.sh").read_text().split())
    for folder, words in commands().items():
        if folder.startswith("data/"):
            options = re.findall(r"--[a-z-]+ (?!data/)\S+", " ".join(words))
            assert options and [option for option in options if f" {option} " not in script] == [], folder


TABLE_4 = "Table 4"


def test_only_the_backbone_of_a_table_claims_its_figures() -> None:
    """The paper's ablations were run on GCFSR; Tables 1 and 2 belong to one backbone each."""
    for path in (REPO / "configs").rglob("*realesrgan*.yaml"):
        said = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        assert "Table 1" not in said, path
        assert TABLE_4 not in said or "for GCFSR alone (Table 4)" in said, path
    for path in (REPO / "configs").rglob("*gcfsr*.yaml"):
        assert "Table 2" not in path.read_text(), path


def celeba(folder: Path, num: int = 30) -> Path:
    """CelebA-HQ in small: image n was made from photograph 1000 + 7n; every fifth is of val, every sixth of test."""
    (folder / "images").mkdir(parents=True)
    for n in range(num):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(folder / "images" / f"{n}.jpg")
    rows = "".join(f"{n}\t{999 + 7 * n}\t{1000 + 7 * n:06d}.jpg\n" for n in range(num))
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text("idx\torig_idx\torig_file\n" + rows)
    parts = "".join(f"{1000 + 7 * n:06d}.jpg {1 if n % 5 == 0 else 2 if n % 6 == 0 else 0}\n" for n in range(num))
    (folder / "list_eval_partition.txt").write_text(parts)
    return folder


def test_celeba_hq_is_divided_as_celeba_is_and_the_hundreds_come_from_its_val(tmp_path: Path) -> None:
    folder, out = celeba(tmp_path / "celebahq"), tmp_path / "lists"
    words = [str(folder / "images"), str(out), "--celeba", str(folder), "--held-out", "val100=2", "test100=3"]
    assert splits_main(words) == 0
    lists = {path.stem: path.read_text().split() for path in out.glob("*.txt")}
    assert lists["val"] == ["0.jpg", "10.jpg", "15.jpg", "20.jpg", "25.jpg", "5.jpg"]
    assert lists["test"] == ["12.jpg", "18.jpg", "24.jpg", "6.jpg"] and len(lists["train"]) == 20
    assert not set(lists["val100"]) & set(lists["test100"])
    assert sorted(lists["val100"] + lists["test100"]) == lists["held_out"]
    assert set(lists["held_out"]) < set(lists["val"])
    made = packed(folder / "images", tmp_path / "train", "--resolution", "8", "--list", str(out / "train.txt"))
    assert made["count"] == 20


def test_the_tables_of_celeba_are_asked_for_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = celeba(tmp_path / "celebahq")
    words = [str(folder / "images"), str(tmp_path / "lists"), "--celeba", str(folder), "--held-out"]
    assert splits_main([*words, "val=2"]) == 2
    assert "give --held-out other names, such as val100=100" in capsys.readouterr().err
    assert splits_main([*words, "many"]) == 2
    assert "--held-out many= is not NAME=COUNT, such as val=150" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(folder / "images" / "31.jpg")
    assert splits_main([*words, "val100=2"]) == 2
    assert "31.jpg is not in CelebA-HQ-to-CelebA-mapping.txt and list_eval_partition.txt" in capsys.readouterr().err
    (folder / "list_eval_partition.txt").unlink()
    assert splits_main([*words, "val100=2"]) == 2
    assert "list_eval_partition.txt cannot be read (No such file or directory)" in capsys.readouterr().err
    assert not (tmp_path / "lists").exists()


def test_cifar_batches_become_images_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0)
    rows = noise.integers(0, 256, (10, 3073), np.uint8)
    rows[:, 0] = np.arange(10)
    for batch in range(5):
        rows[2 * batch : 2 * batch + 2].tofile(tmp_path / f"data_batch_{batch + 1}.bin")
    assert cifar_main([str(tmp_path), str(tmp_path / "images")]) == 0
    image = np.asarray(Image.open(tmp_path / "images" / CLASSES[3] / "00003.png"))
    assert np.array_equal(image.transpose(2, 0, 1).reshape(-1), rows[3, 1:])
    assert packed(tmp_path / "images", tmp_path / "out", "--resolution", "32")["count"] == 10
    (tmp_path / "data_batch_2.bin").write_bytes(b"short")
    assert cifar_main([str(tmp_path), str(tmp_path / "again")]) == 2
    assert "is not a whole batch of the binary version of CIFAR-10" in capsys.readouterr().err


def test_the_quickstart_photographs_can_be_cut_into_images(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image brings the photographs")
    paths = export_photos(tmp_path / "photos")
    assert [path.name for path in paths[:2]] == ["astronaut.png", "chelsea.png"] and len(paths) == 5
    manifest = packed(tmp_path / "photos", tmp_path / "out", "--tile", "64", "--stride", "64")
    assert manifest["count"] > 300 and manifest["rejected"] == [] and manifest["converted"] == {}


def test_crops_of_the_quickstart_photographs_are_four_classes_and_always_the_same(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image brings the photographs")
    first, again = (export_crops(tmp_path / name, side=16, count=3) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert len({path.read_bytes() for path in first}) == 12, "every crop is another one"
    manifest = packed(tmp_path / "one", tmp_path / "out", "--resolution", "16", "--labels", "folder")
    assert manifest["count"] == 12 and manifest["label_names"] == ["astronaut", "chelsea", "coffee", "rocket"]


def test_the_held_out_lists_are_disjoint_and_do_not_depend_on_order() -> None:
    names = [f"sky/{number}.png" for number in range(40)]
    lists = split(names, {"val": 5, "test": 6}, seed=0)
    assert lists == split(names[::-1], {"val": 5, "test": 6}, seed=0) != split(names, {"val": 5, "test": 6}, seed=1)
    assert len(set(lists["val"]) | set(lists["test"])) == 11
    assert lists["val"][0] == "sky/12.png"
    with pytest.raises(DataError, match="^40 images are fewer than the 41 to hold out; lower the numbers$"):
        split(names, {"val": 41}, seed=0)


def test_the_split_command_writes_lists_that_pack_accepts(photos: Path, tmp_path: Path) -> None:
    assert splits_main([str(photos), str(tmp_path / "lists"), "--held-out", "val=2", "test=3", "--min-side", "16"]) == 0
    held_out = tmp_path / "lists" / "held_out.txt"
    assert packed(photos, tmp_path / "train", "--keep", "--exclude-list", str(held_out))["count"] == 7
    assert packed(photos, tmp_path / "test", "--keep", "--list", str(tmp_path / "lists" / "test.txt"))["count"] == 3
