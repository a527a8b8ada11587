"""Finding configuration files, and refusing hostile ones. Without these a base could be found from one folder only, and
a damaged or malicious file could hang a launch or end it in a traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

from sdtrain.config.find import find_config
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError

DIRAC = (REPO / "configs" / "dirac.yaml").read_text()
MANY = 1_000_000


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder far from the repository."""
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "x.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(text: str, *overrides: str) -> str:
    """The sentence, which is short whatever the file holds."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), overrides)
    assert len(str(caught.value)) < 5_000
    return str(caught.value)


def seed_of(path: str | Path) -> Any:
    return load_config(path).seed


# Finding


@pytest.mark.parametrize("name", ["dirac", "dirac.yaml", "sdakd/gcfsr_half", "sdakd/gcfsr_half.yaml"])
def test_shipped_configurations_are_found_by_name_from_any_folder(name: str):
    assert find_config(name).resolve().is_relative_to(REPO / "configs")


@pytest.mark.parametrize("name", ["dirac", "dirac.yaml"])
def test_a_base_may_be_the_bare_name_of_a_shipped_configuration(name: str):
    assert load_config(write(f"base: {name}\nseed: 7\n")).method == "dirac"


@pytest.mark.parametrize("name", ["parent", "parent.yaml", "./parent.yaml", "../near/parent"])
def test_a_base_is_looked_for_beside_its_file_before_anywhere_else(name: str):
    write("base: dirac\nseed: 1\n", "near/parent.yaml")
    write("base: dirac\nseed: 2\n", "parent.yaml")
    write("base: dirac\nseed: 3\n", "configs/parent.yaml")
    assert seed_of(write(f"base: {name}\n", "near/x.yaml")) == 1


def test_a_base_is_looked_for_as_a_path_and_then_in_the_configs_of_the_working_folder():
    write("base: dirac\nseed: 3\n", "configs/parent.yaml")
    assert seed_of(write("base: parent\n", "near/x.yaml")) == 3
    write("base: dirac\nseed: 2\n", "parent.yaml")
    assert seed_of(write("base: parent.yaml\n", "near/x.yaml")) == 2


def test_a_base_that_does_not_exist_suggests_the_nearest():
    for base in ("dirak", "../there/dirak.yaml"):
        assert refusal(f"seed: 1\nbase: {base}\n") == (
            f"x.yaml:2: base '{base}' does not exist, as a path or in configs/ (did you mean 'dirac'?)"
        )


def test_a_name_means_the_one_in_configs_and_a_path_the_file_there():
    write("base: dirac\nseed: 2\n", "parent.yaml")
    write("base: dirac\nseed: 3\n", "configs/parent.yaml")
    assert (seed_of("parent"), seed_of("parent.yaml")) == (3, 2)


# Chains of bases


def test_a_configuration_that_extends_itself_is_refused():
    assert refusal("base: x\n") == "x.yaml:1: base 'x' leads back to x.yaml: a configuration cannot extend itself"


def test_a_circle_through_links_is_refused():
    write("base: link.yaml\n", "x.yaml")
    Path("link.yaml").symlink_to("x.yaml")
    assert "a configuration cannot extend itself" in refusal("base: link.yaml\n")


def test_a_link_that_leads_to_itself_does_not_exist():
    Path("loop.yaml").symlink_to("loop.yaml")
    assert refusal("base: loop.yaml\n").startswith("x.yaml:1: base 'loop.yaml' does not exist")


def test_a_chain_of_bases_without_end_is_refused():
    write(DIRAC, "b0.yaml")
    for i in range(1, 40):
        write(f"base: b{i - 1}\n", f"b{i}.yaml")
    with pytest.raises(ConfigError, match=r"^b\d+\.yaml:1: more than 20 files extend each other: "):
        load_config("b39.yaml")
    assert load_config("b15.yaml").method == "dirac"


@pytest.mark.parametrize("base", ['"a\\0b"', '"a\\nb"', "a" * 300, "a/" * 3000, "/", "..", '""', '"\\uD800"'])
def test_a_base_that_is_no_file_name_is_refused(base: str):
    assert refusal(f"base: {base}\n").startswith(("x.yaml:1: base '", "x.yaml:1: not valid YAML: text holds a char"))


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "", "~"])
def test_a_name_that_is_no_file_name_is_refused(name: str):
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert len(str(caught.value)) < 2_000 and "\0" not in str(caught.value)


# Hostile files

HOSTILE = {
    "one value of a megabyte": "seed: " + "a" * (MANY - 20),
    "one number of a megabyte": "seed: " + "9" * (MANY - 20),
    "one count of a megabyte": "total_img: " + "9" * (MANY - 20) + "ki",
    "one key of a megabyte": "a" * (MANY - 20) + ": 1",
    "one base of a megabyte": "base: " + "a" * (MANY - 20),
    "more than a megabyte": "# " + "a" * MANY,
    "a hundred megabytes": "# " + "a" * 100 * MANY,
    "a hundred thousand keys": "".join(f"k{i}: 1\n" for i in range(100_000)),
    "ten thousand wrong keys in sections": "sd: {" + ", ".join(f"alpha{i}: 1" for i in range(10_000)) + "}",
    "a thousand wrong keys": "sd: {" + ", ".join(f"alpha{i}: 1" for i in range(1_000)) + "}",
    "a long list of wrong words": "metrics: {names: [" + "fidd, " * 19_000 + "]}",
    "a list of a hundred thousand": "metrics: {names: [" + "a, " * 100_000 + "]}",
    "deep lists": "seed: " + "[" * 100_000,
    "deep closed lists": "seed: " + "[" * 50 + "]" * 50,
    "deep sections": "seed: " + "{a: " * 100_000,
    "deep lines": "\n".join(" " * i + "a:" for i in range(1000)),
    "deep dashes": "seed: \n  " + "- " * 100_000,
    "laughing aliases": "a: &a [l, l]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "an alias to itself": "seed: &a [*a]",
    "a merge key": "seed: {<<: {a: 1}}",
    "a letter beyond unicode": 'seed: "\\UFFFFFFFF"',
    "half a letter": 'seed: "\\uD800"',
    "half a letter as a name": 'name: "\\uD800"',
    "a NUL in the name": 'name: "a\\0b"',
    "a name of a megabyte": "name: " + "a" * (MANY - 20),
    "a NUL as the method": 'method: "a\\0b"',
    "two documents": "seed: 1\n---\nseed: 2\n",
    "many documents": "---\n" * 200_000,
    "a directive": "%YAML 9.9\n---\nseed: 1\n",
    "a huge directive": "%TAG " + "!" * 100_000,
    "question marks": "? " * 100_000,
    "colons": ": " * 100_000,
    "quotes": "'" * 100_001,
    "anchors": " ".join(f"&a{i}" for i in range(1000)),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_ends_in_a_short_sentence(text: str):
    for bottom in (text, f"base: dirac\n{text}"):
        refusal(bottom)


@pytest.mark.parametrize("key", ["a." * 5000 + "a", "seed." * 50 + "a", "a" * 100_000])
def test_a_hostile_override_ends_in_a_short_sentence(key: str):
    refusal(DIRAC, f"{key}=1")


def test_a_folder_or_a_pipe_is_not_taken_for_a_configuration(tmp_path: Path):
    import os

    os.mkfifo("pipe.yaml")
    Path("folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml", "/dev/zero", str(tmp_path)):
        with pytest.raises(ConfigError, match="does not exist"):
            load_config(name)


def test_the_limits_leave_room_for_long_lists_of_shards():
    shards = "".join(f"    - bucket/ffhq/train-{i:06d}.tar\n" for i in range(5_000))
    text = f"base: sdgan_projected\ndata:\n  train:\n{shards}"
    assert len(load_config(write(text)).data.train) == 5_000


# Names of folders


@pytest.mark.parametrize("name", ["os", "sdgan.method", "../methods/sdgan", "sdgan/../sdgan", "__init__", "SDGAN", ""])
def test_only_methods_and_models_that_have_a_folder_can_be_chosen(name: str):
    assert f"key 'method' must be one of dcd, dirac, omgd, sdakd, sdgan, not the text '{name}'" in refusal(
        f"base: dirac\nmethod: '{name}'\n"
    )
    found = refusal(f"base: dirac\nmodel: {{generator: {{kind: '{name}'}}}}\n")
    assert "key 'model.generator.kind' must be one of dirac, fastgan" in found
