"""Read a suite: the runs of a table, checked before the first one starts. Torch is not imported.

    out: runs/suites/NAME              # holds the runs: teacher/, ARM-seed0/, ...
    set: {KEY: VALUE}                  # for every run, the teacher's too; KEY as in --set
    seeds: [0]                         # each arm is trained once a seed
    teacher: {cfg: NAME, set: {...}}   # trained once, handed to every arm that learns from one
    runs:
      ARM: {cfg: NAME, set: {...}}

`read_suite` lists the runs in the order of training. What an arm is asked is cfg, the suite's `set`, its own, and the
--set of the command, the later over the earlier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdtrain.config import schema
from sdtrain.config.compare import differences, to_tree
from sdtrain.config.find import SUITES, find_config, read_file
from sdtrain.config.keys import MAX_NAME, Config
from sdtrain.config.load import read_config, resolve, validated
from sdtrain.config.messages import NO_VALUE, value_at
from sdtrain.config.options import CountOrZero
from sdtrain.config.words import report
from sdtrain.config.yaml_source import KeyPath, Source, merge, parse_overrides
from sdtrain.errors import ConfigError
from sdtrain.terminal import clip

TEACHER = "teacher"
ARM = re.compile(rf"(?!.*seed)[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME - 20}}}", re.IGNORECASE)  # reports group by seed
GIVEN = {
    "seed": "seeds of a suite are listed under seeds: take it out",
    "name": "a run is named by its arm: take it out",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One configuration."""

    cfg: str
    """A path, or a name in configs/."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys laid over it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The keys of a suite file."""

    out: str | None = None
    """Folder of the runs; null = runs/suites/NAME."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys laid over the configuration of every run."""
    seeds: tuple[CountOrZero, ...] = (0,)
    """Each arm is trained once a seed."""
    teacher: Entry | None = None
    """Trained once, for every arm that learns from one."""
    runs: dict[str, Entry]
    """The arms by name."""


@dataclass(frozen=True)
class Member:
    """One run of a suite."""

    arm: str
    out: Path
    cfg: str
    overrides: tuple[str, ...]
    config: Config
    taught: bool = False
    """Whether it learns from the suite's teacher."""


@dataclass(frozen=True)
class Suite:
    """What a table is made of."""

    name: str
    out: Path
    arms: list[Member]
    """Those of the first seed, those of the second, ..."""
    teacher: Member | None = None

    @property
    def members(self) -> list[Member]:
        return [*([self.teacher] if self.teacher else []), *self.arms]


def read_suite(path_or_name: str, typed: Sequence[str] = (), out: str | None = None) -> Suite:
    """The suite of a file, or of a name in configs/suites, with the overrides of the command line.

    Raises ConfigError for a file that is no suite, for an arm whose configuration cannot work, and for arms that would
    not share their teacher.
    """
    path = find_config(path_or_name, SUITES, "suite")
    source = read_file(path)
    asked, problems = validated(schema.harden(Asked), source)
    texts = [*source.problems, *problems.values()]
    texts += [f"{source.place(key)}: {sentence}" for key, sentence in _problems(asked)] if asked else []
    for override in typed:
        key = override.partition("=")[0].strip()
        texts += [f"--set {override}: {GIVEN[key]}"] if key in GIVEN else []
    if texts:
        raise ConfigError(report(texts))
    folder = Path(out or asked.out or f"runs/suites/{path.stem}").expanduser()
    teacher = _teacher(asked, source, typed, folder) if asked.teacher else None
    arms = [_arm(arm, asked, source, typed, folder, teacher) for arm in asked.runs]
    if problem := _unshared(arms, len(asked.seeds), teacher):
        raise ConfigError(f"{source.place((TEACHER,))}: {problem}")
    return Suite(path.stem, folder, [_seeded(arm, seed) for seed in asked.seeds for arm in arms], teacher)


def _problems(asked: Asked) -> Iterator[tuple[KeyPath, str]]:
    if not asked.runs:
        yield ("runs",), "runs is empty: name the arms of the table"
    if not asked.seeds or len(set(asked.seeds)) < len(asked.seeds):
        yield ("seeds",), "seeds must list at least one seed, and each once"
    for arm in asked.runs:
        if arm == TEACHER or not ARM.fullmatch(arm):
            taken = "is the shared teacher's" if arm == TEACHER else "cannot be the name of an arm"
            yield ("runs", arm), f"'{clip(arm)}' {taken}: take letters, digits, - and _, and not the word seed"
    sections = [((), asked.set), *((("runs", arm), entry.set) for arm, entry in asked.runs.items())]
    for path, keys in sections:
        yield from (((*path, "set", key), GIVEN[key]) for key in GIVEN if key in keys)


def _teacher(asked: Asked, source: Source, typed: Sequence[str], folder: Path) -> Member:
    """The run that trains the teacher. Raises ConfigError for one that would take its teacher from elsewhere."""
    assert asked.teacher is not None
    read, overrides = _read(asked.teacher, asked, source.place((TEACHER,)), typed)
    named = _named(read, _teacher_keys(read))
    if named:
        raise ConfigError(
            f"{source.place((TEACHER,))}: {named[0]} of the teacher's configuration names a trained one: "
            "let the arms name it, and take the teacher out of the suite"
        )
    config = _resolved(read, f"{source.place((TEACHER,))}: teacher")
    overrides = [*overrides, f"name={TEACHER}"]
    return Member(TEACHER, folder / TEACHER, asked.teacher.cfg, tuple(overrides), replace(config, name=TEACHER))


def _arm(arm: str, asked: Asked, source: Source, typed: Sequence[str], folder: Path, teacher: Member | None) -> Member:
    """An arm, of no seed yet. Raises ConfigError for one that would learn from another teacher."""
    entry, place = asked.runs[arm], source.place(("runs", arm))
    read, overrides = _read(entry, asked, place, typed)
    keys = _teacher_keys(read) if teacher else ()
    handed = written({key: str(folder / TEACHER) for key in keys})
    config = _resolved(_merged(read, handed), f"{place}: run {arm}")
    if not keys or not schema.method(config.method).needs_teacher(config):
        config = _resolved(read, f"{place}: run {arm}") if keys else config
        return Member(arm, folder, entry.cfg, tuple(overrides), config)
    if named := _named(read, keys):
        raise ConfigError(
            f"{place}: run {arm} names a teacher of its own ({named[0]}), and the suite has one for all: keep one"
        )
    for other in differences(to_tree(teacher.config.model), to_tree(config.model)) if teacher else ():
        raise ConfigError(f"{place}: run {arm} describes another teacher than the suite's: model.{other}")
    return Member(arm, folder, entry.cfg, (*overrides, *handed), config, taught=True)


def _read(entry: Entry, asked: Asked, place: str, typed: Sequence[str]) -> tuple[Source, list[str]]:
    """The sources of a run's configuration, and what its command has to set."""
    of_file = [*written(asked.set), *written(entry.set)]
    try:
        return read_config(entry.cfg, typed, of_file), [*of_file, *typed]
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _resolved(read: Source, what: str) -> Config:
    try:
        config: Config = resolve(read)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    if getattr(config, "simulation", None):
        raise ConfigError(f"{what} follows equations and is no training: start it with `sdtrain train`")
    return config


def _merged(source: Source, overrides: Iterable[str]) -> Source:
    for override in parse_overrides(overrides):
        source = merge(source, override)
    return source


def written(keys: dict[str, Any]) -> list[str]:
    """Keys of a file as --set takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]


def _teacher_keys(read: Source) -> tuple[str, ...]:
    method = read.tree.get("method")
    return schema.method(method).teacher_keys if method in schema.methods() else ()


def _named(read: Source, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if value_at(read.tree, tuple(key.split("."))) not in (NO_VALUE, None)]


def _unshared(arms: list[Member], num_seeds: int, teacher: Member | None) -> str | None:
    """Why the arms would not share the teacher."""
    if teacher:
        return None if any(arm.taught for arm in arms) else "no run of this suite learns from a teacher: take it out"
    alone = [arm.arm for arm in arms if _trains_its_own(arm.config)]
    if len(alone) * num_seeds < 2:
        return None
    return (
        f"{clip(', '.join(alone))} would train a teacher in every run, and differ by that too: "
        "add teacher: {cfg: ...}, which is trained once for all"
    )


def _trains_its_own(config: Config) -> bool:
    declared, tree = schema.method(config.method), to_tree(config)
    given = [value_at(tree, tuple(key.split("."))) for key in declared.teacher_keys]
    return None in given and declared.needs_teacher(config)


def _seeded(arm: Member, seed: int) -> Member:
    name = f"{arm.arm}-seed{seed}"
    config = replace(arm.config, seed=seed, name=name)
    return replace(arm, out=arm.out / name, config=config, overrides=(*arm.overrides, f"seed={seed}", f"name={name}"))
