"""Find and read the files of a configuration: the one that is named and those it extends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from sdtrain.config.words import nearest
from sdtrain.config.yaml_source import MAX_BYTES, Source, merge, read_text, too_long
from sdtrain.errors import ConfigError
from sdtrain.files import open_regular
from sdtrain.terminal import clip

CONFIG_FOLDERS = (Path("configs"), Path(__file__).resolve().parents[2] / "configs")
SUITES = "suites/"  # in configs/; no configurations
MAX_CHAIN = 20
RUN_CONFIG = "config.yaml"  # what a run leaves behind is called so


def find_config(path_or_name: str | Path, room: str = "", what: str = "configuration") -> Path:
    """A path as given, or a name in configs/ROOM, with or without .yaml. ConfigError names the nearest one."""
    found = _first_file(Path(path_or_name), room=room)
    if found is None:
        given = str(path_or_name)
        nearby = _hint(given, room)
        raise ConfigError(f"{what} '{clip(given)}' does not exist, as a path or in configs/{room}{nearby}")
    return found


def _first_file(given: Path, beside: Path | None = None, room: str = "") -> Path | None:
    near = _in(beside, given) if beside else ()
    places = chain(near, [given], *(_in(folder / room, given) for folder in CONFIG_FOLDERS))
    # os.path.isfile says no, where Path.is_file raises, to names that no file can have
    return next((path for path in places if os.path.isfile(path)), None)


def _in(folder: Path, given: Path) -> Iterator[Path]:
    yield folder / given
    if given.name:
        yield folder / given.with_name(f"{given.name.removesuffix('.yaml')}.yaml")


def _hint(given: str, room: str = "") -> str:
    """The nearest name in configs/ROOM, else those at its top."""
    files = [(folder / room, file) for folder in CONFIG_FOLDERS for file in (folder / room).rglob("*.yaml")]
    found = {file.relative_to(folder).with_suffix("").as_posix() for folder, file in files}
    names = sorted(name for name in found if not name.startswith(SUITES))
    top = ", ".join(name for name in names if "/" not in name)
    close = nearest(given.removesuffix(".yaml"), names) or nearest(Path(given).stem, names)
    return close or f" (in configs/{room}: {top or 'nothing'})"


def read_file(path: Path) -> Source:
    """The tree of one file. Problems that leave the rest readable are collected; ConfigError if nothing can be read."""
    shown = _shown(path)
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise too_long(shown)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"{shown}: cannot read this configuration: {reason}") from error
    return read_text(text, shown)


def read_written(path: Path) -> Source:
    """The config.yaml of a run folder: whole, as runs write it. ConfigError for one that extends another file."""
    source = read_file(path)
    if isinstance(mirrored := source.tree.pop("tensorboard", None), bool):  # runs of earlier versions stay runs
        source.tree.setdefault("tracker", "tensorboard" if mirrored else "none")
    if "base" in source.tree:
        raise ConfigError(
            f"{source.place(('base',))}: a run folder's {RUN_CONFIG} is written whole and extends no other file; "
            "take 'base' out, or name the file with --cfg"
        )
    return source


def read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> Source:
    """A file laid over the file its `base:` names, and so on. Run names are not inherited.

    A base is found as `--cfg` finds one, but first beside the file that names it.
    """
    source = read_file(path)
    base = source.tree.pop("base", None)
    if base is None:
        return source
    seen = (*seen, path.resolve())
    below = _base(base, path.parent, source.place(("base",)), seen)
    lower = read_with_bases(below, seen)
    lower.tree.pop("name", None)
    return merge(lower, source)


def _base(base: object, beside: Path, place: str, seen: tuple[Path, ...]) -> Path:
    """The file that `base` means; ConfigError if there is none, or if it leads in a circle."""
    if not isinstance(base, str):
        raise ConfigError(f"{place}: key 'base' must be the name of one YAML file, not {clip(str(base))}")
    below = _first_file(Path(base), beside)
    if below is None:
        raise ConfigError(f"{place}: base '{clip(base)}' does not exist, as a path or in configs/{_hint(base)}")
    if below.resolve() in seen:
        raise ConfigError(f"{place}: base '{base}' leads back to {seen[-1].name}: a configuration cannot extend itself")
    if len(seen) > MAX_CHAIN:
        raise ConfigError(f"{place}: more than {MAX_CHAIN} files extend each other: write the last ones together")
    return below


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
