"""Configuration. Without these a misspelt key would be ignored, and a wrong one would stop a job hours later."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_python

import sdtrain.methods
import sdtrain.models
from sdtrain.config import schema as config_schema
from sdtrain.config.compare import config_hash, differences, dump, read_tree, to_tree
from sdtrain.config.find import find_config
from sdtrain.config.keys import valid_world_sizes
from sdtrain.config.load import load_config
from sdtrain.errors import ConfigError

MODEL = """
from dataclasses import dataclass
from typing import Literal

from sdtrain.config.declare import ModelDeclaration

WIDTH = 64

@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    width: int = WIDTH  # channels
    style: Literal["plain", "gated"] = "plain"

@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    depth: int = 4

MODEL = ModelDeclaration(generator=GeneratorOptions, discriminator=DiscriminatorOptions)
"""
METHOD = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdtrain.config.declare import MethodDeclaration
from sdtrain.config.options import Images, SelfDistillation, Span

@dataclass(frozen=True, kw_only=True)
class Options:
    sd: SelfDistillation = SelfDistillation()
    fade_img: Images = 0
    share: float = 0.5
    length: Span = "1 epoch"

def problems(config: Any) -> list[tuple[str, str]]:
    if config.sd.alpha and config.model.generator.style == "gated":
        yield "sd.alpha", "sd.alpha needs model.generator.style: plain"

METHOD = MethodDeclaration(options=Options, problems=problems)
"""
GOOD = """\
method: adversarial
batch_size: 64
ghost_batch: 8
total_img: 200ki
data:
  train: shards/faces
model:
  generator: {kind: tiny}
  discriminator: {kind: tiny}
"""


CACHED = (config_schema.method, config_schema.model, config_schema.schema, config_schema.role_class)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One method and two kinds of models in place of ours, and a working folder of its own."""
    for room, name, text in (("methods", "adversarial", METHOD), ("models", "tiny", MODEL), ("models", "wide", MODEL)):
        folder = tmp_path / "package" / room / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "options.py").write_text(text)
        monkeypatch.setattr(getattr(sdtrain, room), "__path__", [str(folder.parent)])
        (folder / "networks.py").write_text("import torch_that_is_not_installed")
    monkeypatch.chdir(tmp_path)
    forget()
    yield
    forget()


def forget() -> None:
    """No declaration of this test may be found by the next."""
    for cached in CACHED:
        cached.cache_clear()
    for room, name in (("methods", "adversarial"), ("models", "tiny"), ("models", "wide")):
        for module in (f"sdtrain.{room}.{name}", f"sdtrain.{room}.{name}.options"):
            sys.modules.pop(module, None)
        vars(getattr(sdtrain, room)).pop(name, None)


def write(text: str, name: str = "x.yaml") -> str:
    Path(name).write_text(text)
    return name


def load(text: str, *overrides: str, world: int | None = None) -> Any:
    return load_config(write(text), overrides, world)


def refusal(text: str, *overrides: str, world: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, world=world)
    return str(caught.value)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


# What is read


def test_a_good_file_has_every_key_of_method_models_and_defaults():
    config = load(GOOD)
    assert (config.name, config.method, config.batch_size, config.num_ghosts) == ("x", "adversarial", 64, 8)
    assert config.total_img == 200_000 and config.fade_img == 0
    assert config.model.generator.kind == "tiny" and config.model.generator.width == 64
    assert config.model.discriminator.depth == 4
    assert config.optimizer.G.lr == config.optimizer.D.lr == 2e-4
    assert config.sd.loss == "lpips-vgg"


def test_a_configuration_cannot_be_changed_after_loading():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(GOOD).batch_size = 3


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("1E3", 1000.0), (".5", 0.5), ("3", 3.0), ("1_000.5", 1000.5)])
def test_numbers_may_be_written_as_people_write_them(text: str, value: float):
    assert load(GOOD + f"share: {text}\n").share == value


COUNTS = {"25_000": 25_000, "4e4": 40_000, "0.5k": 500} | dict.fromkeys(["1.5M", "1.5Mi", "1.5Mimg"], 1_500_000)


@pytest.mark.parametrize("text, value", (COUNTS | dict.fromkeys(["100k", "100ki", "100kimg"], 100_000)).items())
def test_images_may_be_counted_in_thousands_and_millions(text: str, value: int):
    assert load(changed("200ki", text)).total_img == value


@pytest.mark.parametrize("text", ["30 epochs", "1 epoch", "1.5k steps", "0 steps", "2M images"])
def test_a_span_has_a_number_and_a_unit(text: str):
    assert load(GOOD + f"length: {text}\n").length == text


@pytest.mark.parametrize("text", ["64ki", "64kimg", "1.4Mi", "1.4Mimg"])
def test_a_span_counted_as_the_papers_count_images_means_images(text: str):
    assert load(GOOD + f"length: {text}\n").length == f"{text} images"


@pytest.mark.parametrize("text", ["250", "0", "1.5", "250k", "'250'"])
def test_a_span_without_a_unit_is_refused(text: str):
    bare = text.strip("'")
    shown = f"the text '{bare}'" if bare == "250k" or "'" in text else bare
    assert refusal(GOOD + f"length: {text}\n") == (
        f"x.yaml:10: key 'length' cannot be {shown}: the unit is missing: "
        f"write {bare} epochs, {bare} steps or {bare} images"
    )


@pytest.mark.parametrize("text", ["on", "yes", "010", "2020-01-01", "0x10", "1:30", "no"])
def test_words_that_other_readers_twist_stay_text(text: str):
    assert load(changed("shards/faces", text)).data.train == text


def test_set_overrides_one_key_and_keeps_its_neighbours():
    config = load(GOOD, "sd.alpha=0.5", "data.train=[a, b]", "model.generator.width=8", "optimizer.D.betas=[0.5, 0.9]")
    assert config.sd.alpha == 0.5 and config.sd.loss == "lpips-vgg"
    assert config.data.train == ["a", "b"]
    assert config.model.generator.width == 8 and config.model.generator.kind == "tiny"
    assert config.optimizer.D.betas == (0.5, 0.9)


def test_set_reads_an_equals_sign_in_the_value():
    assert load(GOOD, "data.train=http://host/a?b=c").data.train == "http://host/a?b=c"


def test_a_configuration_extends_another_by_base():
    write(GOOD + "name: parent\nsd: {alpha: 0.25, loss: l1}\n", "parent.yaml")
    config = load("base: parent.yaml\nsd: {loss: l2}\n")
    assert (config.name, config.sd.alpha, config.sd.loss) == ("x", 0.25, "l2")


def test_a_section_whose_kind_changes_does_not_keep_the_keys_of_the_old_kind():
    write(changed("generator: {kind: tiny}", "generator: {kind: tiny, width: 7}"), "parent.yaml")
    assert load("base: parent.yaml\nmodel: {generator: {kind: wide}}\n").model.generator.width == 64
    assert load("base: parent.yaml\nmodel: {generator: {kind: tiny}}\n").model.generator.width == 7


def test_a_dumped_configuration_loads_back_to_an_equal_one():
    tricky = ["sd.alpha=1e-7", "data.train='on'", "data.val='1e-3'", "data.test=['010', 'null', 'a: b']"]
    config = load(GOOD, *tricky)
    again = load_config(write(dump(config), "config.yaml"))
    assert again == config and config_hash(again) == config_hash(config)
    assert again.data.test == ["010", "null", "a: b"]


def test_a_dumped_configuration_means_the_same_to_other_yaml_readers():
    tree = yaml.safe_load(dump(load(GOOD, "data.train='on'", "data.val='1e-3'", "sd.alpha=1e-7")))
    assert tree["data"]["train"] == "on" and tree["data"]["val"] == "1e-3" and tree["sd"]["alpha"] == 1e-7
    assert tree["total_img"] == 200_000


def test_a_bare_name_is_looked_up_in_configs(tmp_path: Path):
    (tmp_path / "configs").mkdir()
    write(GOOD, "configs/mine.yaml")
    assert load_config("mine").name == load_config("mine.yaml").name == "mine"


# Refusals: one mistake, the whole message

MISTAKES = [
    ("batch_sise: 3", ":10: unknown key 'batch_sise' (did you mean 'batch_size'?)"),
    ("alpha: 3", ":10: unknown key 'alpha' (did you mean 'sd.alpha'?)"),
    ("sd: {alpa: 3}", ":10: unknown key 'sd.alpa' (did you mean 'alpha'?)"),
    ("optimizer: {H: {lr: 1}}", ":10: unknown key 'optimizer.H' (known here: G, D)"),
    ("ema: {decay_half: 3}", None),
    ("batch_size: 8", ":10: key 'batch_size' is given twice, first on line 2: keep one"),
    ("seed: true", ":10: key 'seed' must be a whole number >= 0, not true"),
    ("seed: -1", ":10: key 'seed' must be a whole number >= 0, not -1"),
    ("seed: 1.5", ":10: key 'seed' must be a whole number >= 0, not 1.5"),
    (
        "seed: 010",
        ":10: key 'seed' must be a whole number >= 0, not the text '010' (a leading zero makes it text: write 10)",
    ),
    ("share: true", ":10: key 'share' must be a number, not true"),
    ("share: '1e-3'", ":10: key 'share' must be a number, not the text '1e-3' (remove the quotes)"),
    ("share: half", ":10: key 'share' must be a number, not the text 'half'"),
    ("share: .nan", ":10: key 'share' must be a number, not nan"),
    ("share: .inf", ":10: key 'share' must be a number, not inf"),
    ("share:", ":10: key 'share' must be a number, not null"),
    ("save_async: on", ":10: key 'save_async' must be true or false, not the text 'on' (write true)"),
    ("save_async: no", ":10: key 'save_async' must be true or false, not the text 'no' (write false)"),
    ("save_async: 1", ":10: key 'save_async' must be true or false, not 1"),
    (
        "tensorboard: true",
        ":10: key 'tensorboard' is no more: write tracker: tensorboard in place of true, tracker: none in place of "
        "false",
    ),
    (
        "tracker: [tensorboard, wandbb]",
        ":10: key 'tracker.1' must be one of tensorboard, wandb, not the text 'wandbb' (did you mean 'wandb'?)",
    ),
    (
        "tracker: off",
        ":10: key 'tracker' must be one of tensorboard, wandb, none or a list (each entry one of tensorboard, wandb), "
        "not the text 'off'",
    ),
    (
        "precision: bf61",
        ":10: key 'precision' must be one of fp32, bf16, not the text 'bf61' (did you mean 'bf16'?)",
    ),
    ("name: [a]", ":10: key 'name' must be text, not a list"),
    ("name: a/b", ":10: name 'a/b' cannot be a folder name: use letters, digits, - and _"),
    (
        "log_img: 4kb",
        ":10: key 'log_img' must be a number of images such as 4000, 200k or 1.5M (1k = 1000), not the text '4kb'",
    ),
    ("log_img: 0.5", ":10: key 'log_img' must be a number of images such as 4000, 200k or 1.5M (1k = 1000), not 0.5"),
    (
        "optimizer: {G: {betas: [0]}}",
        ":10: key 'optimizer.G.betas.1' is missing: give it a number >= 0 and <= 1 or a section with the keys points, "
        "curve",
    ),
    (
        "optimizer: {G: {betas: [0, 2]}}",
        ":10: key 'optimizer.G.betas.1' must be a number >= 0 and <= 1 or a section with the keys points, curve, not 2",
    ),
    (
        "metrics: {names: [fid, kidd]}",
        ":10: metrics.names has 'kidd', which is no metric: choose from fid, rfid, kid, pr, fd_dinov2, fd_clip, "
        "kid_clip, fd_lite0, kid_lite0 (did you mean 'kid'?)",
    ),
    (
        "metrics: {names: [kid, pr]}",
        ":10: metrics.select_by fid cannot choose best/: what metrics.names measures and is better when low: kid",
    ),
    (
        "metrics: {names: [fid, pr], select_by: recall}",
        ":10: metrics.select_by recall cannot choose best/: what metrics.names measures and is better when low: fid",
    ),
    ("sd: 3", None),
    ("engine: deepspeed", None),
    (
        "log_img: 10",
        ":10: log_img 10 is less than one batch of 64, and nothing happens between steps: "
        "take at least 64, or 0 for never",
    ),
    (
        "length: 64kimg steps",
        ":10: key 'length' cannot be the text '64kimg steps': "
        "write a number and its unit, such as 30 epochs, 500 steps or 64k images",
    ),
    ("base: 3", ":10: key 'base' must be the name of one YAML file, not 3"),
    ("base: x.yaml", ":10: base 'x.yaml' leads back to x.yaml: a configuration cannot extend itself"),
    (
        "seed: !!python/object/apply:os.system ['touch canary']",
        ":10: tag '!!python/object/apply:os.system' is refused: a configuration holds plain values only",
    ),
    ("seed: &a 3\nshare: *a", ":11: not valid YAML: aliases (*name) are refused: write the value out"),
    ("seed: [1", ":11: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ("\tseed: 1", ":10: not valid YAML: found character '\\t' that cannot start any token"),
    ("? [a]\n: 1", ":10: a key must be a word, not a list or a section"),
]


@pytest.mark.parametrize("line, message", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_refused_with_its_line_and_what_would_work(line: str, message: str | None):
    found = refusal(GOOD + line + "\n")
    assert found == f"x.yaml{message}" if message else found.startswith("x.yaml:10: ")
    assert not Path("canary").exists()


CHANGES = [
    (
        "method: adversarial",
        "method: adverserial",
        ":1: key 'method' must be one of adversarial, not the text 'adverserial' (did you mean 'adversarial'?)",
    ),
    ("method: adversarial\n", "", ": key 'method' is missing: give it one of adversarial"),
    ("batch_size: 64\n", "", ": key 'batch_size' is missing: give it a whole number >= 1"),
    ("batch_size: 64", "batch_size: 60", ":2: batch_size 60 is not a multiple of ghost_batch 8: take 56 or 64"),
    ("batch_size: 64", "batch_size: 4", ":2: batch_size 4 is not a multiple of ghost_batch 8: take 8"),
    ("batch_size: 64", "batch_size: 0", ":2: key 'batch_size' must be a whole number >= 1, not 0"),
    ("total_img: 200ki", "total_img: 3", ":4: total_img 3 is less than one batch of 64: take at least 64"),
    (
        "  train: shards/faces",
        "  xflip: true",
        ":5: key 'data.train' is missing: give it text or a list (each entry text)",
    ),
    ("train: shards/faces", "train: ''", ":6: data.train is empty: give it a folder of shards or a pattern"),
    ("train: shards/faces", "train: [a, 3]", ":6: key 'data.train.1' must be text, not 3"),
    ("train: shards/faces", "train: 3", ":6: key 'data.train' must be text or a list (each entry text), not 3"),
    ("  generator: {kind: tiny}\n", "", ":7: key 'model.generator.kind' is missing: give it one of tiny, wide"),
    (
        "generator: {kind: tiny}",
        "generator: {width: 3}",
        ":8: key 'model.generator.kind' is missing: give it one of tiny, wide",
    ),
    (
        "generator: {kind: tiny}",
        "generator: {kind: tinny}",
        ":8: key 'model.generator.kind' must be one of tiny, wide, not the text 'tinny' (did you mean 'tiny'?)",
    ),
    (
        "generator: {kind: tiny}",
        "generator: {kind: tiny, widht: 3}",
        ":8: unknown key 'model.generator.widht' (did you mean 'width'?)",
    ),
    (
        "generator: {kind: tiny}",
        "generator: {kind: tiny, style: gated}",
        ": sd.alpha needs model.generator.style: plain",
    ),
    ("discriminator: {kind: tiny}", "diskriminator: {kind: tiny}", None),
]


@pytest.mark.parametrize("old, new, message", CHANGES, ids=[f"{old} -> {new}" for old, new, _ in CHANGES])
def test_a_key_that_is_missing_or_cannot_work_is_named(old: str, new: str, message: str | None):
    found = refusal(changed(old, new))
    assert found == f"x.yaml{message}" if message else found.startswith("2 problems")


OVERRIDES = [
    ("sd.alpah=1", "--set sd.alpah=1: unknown key 'sd.alpah' (did you mean 'alpha'?)"),
    ("sd.alpha=high", "--set sd.alpha=high: key 'sd.alpha' must be a number >= 0, not the text 'high'"),
    ("batch_size=60", "--set batch_size=60: batch_size 60 is not a multiple of ghost_batch 8: take 56 or 64"),
    ("sd.alpha", "--set sd.alpha: write it as --set key.path=value"),
    ("=3", "--set =3: write it as --set key.path=value"),
    ("sd..alpha=3", "--set sd..alpha=3: write it as --set key.path=value"),
    ("seed=[1", "--set seed=[1:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    ("seed.x=1", "--set seed.x=1: key 'seed' must be a whole number >= 0, not a section"),
    (
        "seed=!!python/none",
        "--set seed=!!python/none: tag '!!python/none' is refused: a configuration holds plain values only",
    ),
    ("base=y.yaml", None),
]


@pytest.mark.parametrize("override, message", OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_a_mistake_in_an_override_names_the_override(override: str, message: str | None):
    found = refusal(GOOD, override)
    assert found == message if message else found.startswith(f"--set {override}: unknown key")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file():
    text = changed("batch_size: 64", "batch_size: 60") + "seed: x\nseed: 4\nlog_img: 3\nsd: {alpha: -1, los: l1}\n"
    assert refusal(text, "precision=fp64").splitlines() == [
        "7 problems in the configuration:",
        "  --set precision=fp64: key 'precision' must be one of fp32, bf16, not the text 'fp64'",
        "  x.yaml:2: batch_size 60 is not a multiple of ghost_batch 8: take 56 or 64",
        "  x.yaml:10: key 'seed' must be a whole number >= 0, not the text 'x'",
        "  x.yaml:11: key 'seed' is given twice, first on line 10: keep one",
        "  x.yaml:12: log_img 3 is less than one batch of 60, and nothing happens between steps: "
        "take at least 60, or 0 for never",
        "  x.yaml:13: key 'sd.alpha' must be a number >= 0, not -1",
        "  x.yaml:13: unknown key 'sd.los' (did you mean 'loss'?)",
    ]


def test_a_rule_is_not_judged_by_a_key_that_is_wrong_already():
    assert refusal(changed("batch_size: 64", "batch_size: many")) == (
        "x.yaml:2: key 'batch_size' must be a whole number >= 1, not the text 'many'"
    )


def test_a_mistake_in_the_base_names_the_base_and_its_line():
    write(GOOD + "sd: {alpha: -2}\n", "parent.yaml")
    assert refusal("base: parent.yaml\n").startswith("parent.yaml:10: key 'sd.alpha'")


def test_a_value_that_the_child_replaces_is_not_judged_in_the_base():
    write(GOOD + "sd: {alpha: -2}\n", "parent.yaml")
    assert load("base: parent.yaml\nsd: {alpha: 2}\n").sd.alpha == 2


def test_two_files_cannot_extend_each_other():
    write("base: x.yaml\n", "y.yaml")
    assert refusal("base: y.yaml\n" + GOOD) == (
        "y.yaml:1: base 'x.yaml' leads back to y.yaml: a configuration cannot extend itself"
    )


def test_sections_nested_without_end_are_refused():
    assert refusal("a: " + "[" * 5000) == "x.yaml:1: not valid YAML: sections are nested more than 30 deep"


def test_any_damaged_file_gives_a_sentence_and_never_a_traceback():
    chance = random.Random(5)
    pieces = [
        *GOOD,
        *GOOD.split("\n"),
        "[",
        "{a",
        "!!python/name:x ",
        "&a",
        "\t",
        "\0",
        "null",
        ": ",
        "- ",
        "1e999",
        "?",
        '"',
    ]
    outcomes = []
    for _ in range(400):
        text = GOOD
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice(pieces) + text[at + chance.randint(0, 9) :]
        try:
            load(text)
            outcomes.append("fine")
        except ConfigError as error:
            outcomes.append(str(error).split(":")[0][:6])
    assert {"fine", "x.yaml", "2 prob"} <= set(outcomes)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "word"])
def test_a_file_that_is_no_section_is_refused(text: str):
    assert "x.yaml" in refusal(text)


def test_a_file_that_is_not_text_is_refused():
    Path("x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="^x.yaml: cannot read this configuration: it is not UTF-8 text$"):
        load_config("x.yaml")


def test_a_name_that_does_not_exist_suggests_the_nearest(tmp_path: Path):
    (tmp_path / "configs").mkdir()
    write(GOOD, "configs/dirac_x.yaml")
    with pytest.raises(ConfigError, match=r"^configuration 'dirak_x' does not exist.*\(did you mean 'dirac_x'\?\)$"):
        find_config("dirak_x")


# Ranks, resume


def test_a_world_size_that_does_not_divide_the_ghosts_lists_the_ones_that_do():
    assert refusal(GOOD, world=3) == (
        "x.yaml:2: 3 ranks cannot share 8 ghosts (batch_size 64 / ghost_batch 8) evenly: launch one of 1, 2, 4, 8 ranks"
    )
    assert valid_world_sizes(load(GOOD, world=4)) == [1, 2, 4, 8]


def test_differences_tell_harmless_keys_from_those_that_change_weights():
    old, new = (
        load(GOOD),
        load(GOOD, "log_img=8ki", "metrics.num_fake=9", "sd.alpha=2", "data.workers=0", "batch_size=128"),
    )
    found = {d.key: d.harmless for d in differences(to_tree(old), to_tree(new))}
    assert found == {
        "log_img": True,
        "metrics.num_fake": True,
        "sd.alpha": False,
        "data.workers": True,
        "batch_size": False,
    }


def test_differences_survive_keys_that_only_one_version_knows():
    write(dump(load(GOOD)) + "gone: 3\n", "config.yaml")
    assert [str(d) for d in differences(read_tree(Path("config.yaml")), to_tree(load(GOOD)))] == ["gone: 3 -> None"]


# The real package


def test_every_shipped_configuration_loads_and_none_needs_torch():
    script = """
import pathlib, sys
from sdtrain.config.compare import dump
from sdtrain.config.load import load_config
for path in sorted(pathlib.Path("configs").glob("*.yaml")):
    config = load_config(path)
    assert config.name == path.stem, path
assert "torch" not in sys.modules
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
