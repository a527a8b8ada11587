"""Find and read the files of a configuration: the one that is named and those it extends."""

from __future__ import annotations

from pathlib import Path

from sdtrain.config import messages
from sdtrain.config.yaml_source import Source, merge, read_text
from sdtrain.errors import ConfigError

CONFIG_FOLDERS = (Path("configs"), Path(__file__).resolve().parents[2] / "configs")


def find_config(path_or_name: str | Path) -> Path:
    """A path as given, or a bare name (with or without .yaml) in configs/. ConfigError names the nearest one."""
    given = Path(path_or_name)
    folders = [] if given.is_absolute() or len(given.parts) > 1 else CONFIG_FOLDERS
    candidates = [given, *(folder / f"{given.name.removesuffix('.yaml')}.yaml" for folder in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = sorted({file.stem for folder in CONFIG_FOLDERS for file in folder.glob("*.yaml")})
    hint = (
        messages.nearest(given.name.removesuffix(".yaml"), names) or f" (in configs/: {', '.join(names) or 'nothing'})"
    )
    raise ConfigError(f"configuration '{path_or_name}' does not exist, as a path or in configs/{hint}")


def read_file(path: Path, shown: str | None = None) -> Source:
    """The tree of one file. Problems that leave the rest readable are collected; ConfigError if nothing can be read."""
    shown = shown or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"{shown}: cannot read this configuration: {reason}") from error
    return read_text(text, shown)


def read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> Source:
    """A file laid over the file its `base:` names (relative to it), and so on. Run names are not inherited."""
    source = read_file(path, _shown(path))
    base = source.tree.pop("base", None)
    if base is None:
        return source
    seen = (*seen, path.resolve())
    place = source.place(("base",))
    if not isinstance(base, str):
        raise ConfigError(f"{place}: key 'base' must be the name of one YAML file, not {base!r}")
    below = path.parent / base
    if below.resolve() in seen:
        raise ConfigError(f"{place}: base '{base}' leads back to {seen[-1].name}: a configuration cannot extend itself")
    if not below.is_file():
        raise ConfigError(f"{place}: base '{base}' does not exist (looked for {_shown(below)})")
    lower = read_with_bases(below, seen)
    lower.tree.pop("name", None)
    return merge(lower, source)


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
