"""What is said about the keys of configurations. Without these a key could be added that nobody can look up, and the
reference could describe a version that is gone.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import REPO, run_python

from sdtrain import cli
from sdtrain.config import meanings as meanings_module
from sdtrain.config import schema
from sdtrain.config.compare import to_tree
from sdtrain.config.load import load_config
from sdtrain.config.markdown import page
from sdtrain.config.meanings import Meaning, meanings
from sdtrain.config.reference import keys
from sdtrain.config.words import nearest
from sdtrain.errors import ConfigError

EXAMPLE = '''
import dataclasses

@dataclasses.dataclass
class Lower:
    depth: int = 3
    """[layers] How deep; null = 4."""
    silent: int = 3

@dataclasses.dataclass
class Upper(Lower):
    """Not a meaning of a key."""

    share: float = 0.5
    """Two
    lines in [4, 64]."""
    depth: int = 5
    """[heads] Another meaning."""
'''


def tell(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["config", *args]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["config", *args]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


# Meanings


@pytest.fixture
def example(tmp_path, monkeypatch) -> Any:
    (tmp_path / "written_example.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("written_example")
    sys.modules.pop("written_example")
    meanings_module._written.cache_clear()


def test_a_meaning_is_the_text_under_a_field_without_its_unit(example):
    assert meanings(example.Lower) == {"depth": Meaning("How deep; null = 4.", "layers")}
    assert meanings(example.Upper) == {
        "depth": Meaning("Another meaning.", "heads"),
        "share": Meaning("Two lines in [4, 64]."),
    }


def test_every_key_of_every_method_and_model_has_a_meaning_that_is_a_sentence():
    assert [key.path for key in keys() if not re.fullmatch(r"\S.*\.", key.meaning)] == []


def test_every_key_that_counts_something_says_what():
    """A whole number without a unit is a seed."""
    silent = [key.path for key in keys() if "whole number" in key.type and not key.unit]
    assert [path for path in silent if not path.endswith("seed")] == []
    assert silent, "seeds are looked at too"


def leaves(tree: Any, path: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for name, inner in tree.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path


@pytest.mark.parametrize("name", ["dirac", "sdgan_projected", "sdakd_gcfsr", "sdakd_realesrgan"])
def test_every_key_of_a_loaded_configuration_is_in_the_reference(name: str):
    config = load_config(name)
    players = schema.method(config.method).players
    known = {key.path for key in keys()}
    for path in leaves(to_tree(config)):
        for player in players:
            path = path.replace(f"optimizer.{player}.", "optimizer.PLAYER.")
        assert path in known


def test_defaults_in_the_reference_are_those_of_a_loaded_configuration():
    config = load_config("sdgan_projected_l1")
    of = {key.path: key for key in keys() if "method sdgan" in key.owners or not key.owners}
    assert of["sd.alpha"].default == "1.0" and of["summation"].default == config.summation
    assert of["log_img"].default == "4k" and of["data.train"].default == "required"
    sdakd = {key.path: key for key in keys() if "method sdakd" in key.owners}
    assert sdakd["sd.alpha"].default == "0.0", "the method's own default, not that of the class"


# The command


def test_a_key_is_explained_with_type_default_unit_meaning_and_owners(capsys):
    assert tell(capsys, "metrics.num_fake").splitlines() == [
        "metrics.num_fake",
        "  meaning  Generated images.",
        "  type     a whole number >= 1",
        "  default  50000",
        "  unit     images",
        "  in       every configuration",
    ]


def test_a_key_of_several_methods_is_explained_once_for_each_difference(capsys):
    said = tell(capsys, "sd.alpha")
    assert said.count("sd.alpha\n") == 2
    assert "default  1.0" in said and "default  0.0" in said
    assert tell(capsys, "sd.alpha", "--method", "sdgan").count("sd.alpha\n") == 1


def test_a_section_lists_its_keys(capsys):
    said = tell(capsys, "r1")
    assert re.search(r"^r1\.gamma +0\.0 .*Weight; a number or a schedule; 0 = off\.", said, re.MULTILINE)
    assert re.search(r"^r1\.every +16 ", said, re.MULTILINE)


def test_without_a_key_all_sections_are_listed(capsys):
    words = {line.split()[0] for line in tell(capsys).splitlines() if line}
    assert {field.name for field in dataclasses.fields(schema.method("sdgan").options)} <= words
    assert {"data", "optimizer", "model", "n1", "simulation"} <= words
    assert "simulation" not in tell(capsys, "--method", "sdgan")


def test_a_player_of_the_method_has_the_keys_of_an_optimizer(capsys):
    assert "Step size." in tell(capsys, "optimizer.G_pixel.lr")
    assert re.search(r"^optimizer\.D\.betas ", tell(capsys, "optimizer.D"), re.MULTILINE)


def test_a_configuration_chooses_models_and_shows_its_values(capsys):
    assert "  here     0.0" in tell(capsys, "sd.alpha", "--cfg", "sdgan_projected_baseline")
    said = tell(capsys, "model.generator", "--cfg", "sdakd_realesrgan")
    assert "num_block" in said and "z_dim" not in said


MISTAKES = {
    "sd.alpa": "sdtrain: there is no key 'sd.alpa' (did you mean 'sd.alpha'?)\n",
    "alpha": "sdtrain: there is no key 'alpha' (did you mean simulation.alpha or sd.alpha?)\n",
    "optimiser": "sdtrain: there is no key 'optimiser' (did you mean 'optimizer'?)\n",
    "qqqq": "sdtrain: there is no key 'qqqq'; `sdtrain config` lists the sections\n",
    "": "sdtrain: there is no key ''; `sdtrain config` lists the sections\n",
}


@pytest.mark.parametrize("word, sentence", MISTAKES.items())
def test_a_key_that_does_not_exist_suggests_the_nearest(capsys, word: str, sentence: str):
    assert refusal(capsys, word) == sentence


def test_a_key_of_another_method_names_its_owners(capsys):
    assert refusal(capsys, "bcr", "--method", "dirac") == (
        "sdtrain: 'bcr' is a key of method sdgan, not of what was chosen\n"
    )
    assert refusal(capsys, "model.generator.ngf", "--cfg", "dirac") == (
        "sdtrain: 'model.generator.ngf' is a key of generator fastgan, not of what was chosen\n"
    )


@pytest.mark.parametrize("name", ["sdgam", "os", "../methods/sdgan"])
def test_only_a_method_that_has_a_folder_can_be_chosen(capsys, name: str):
    hint = nearest(name, schema.methods())
    assert refusal(capsys, "--method", name) == f"sdtrain: there is no method '{name}'{hint}\n"


def test_the_keys_are_explained_without_torch():
    script = (
        "from sdtrain.cli import main; main(['config', 'sd.alpha']); import sys; print({'torch'} & set(sys.modules))"
    )
    done = run_python("-c", script)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


def test_the_readme_of_the_configurations_is_what_the_command_prints(capsys):
    """After a change of keys: `sdtrain config --markdown > configs/README.md`."""
    assert tell(capsys, "--markdown") == page() == (REPO / "configs" / "README.md").read_text()


def test_the_readme_tells_how_long_image_counts_may_be_written():
    for written in ("100k", "100ki", "100kimg", "1.5M", "1.5Mi", "1.5Mimg"):
        assert f"`{written}`" in page()


@pytest.mark.parametrize("key", ["model.generator.z_dim=0", "model.generator.ngf=-1", "style_mixing=1.5", "bcr=-1"])
def test_sizes_weights_and_shares_that_cannot_be_are_refused_by_the_type_of_the_key(key: str):
    with pytest.raises(ConfigError, match=f"^--set {key}: key '{key.partition('=')[0]}' must be a "):
        load_config("sdgan_projected", [key])
