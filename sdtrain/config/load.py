"""The configuration: common keys, loading with every problem reported at once, rules across keys, dumping, comparing.

    config = load_config("sdgan_projected.yaml", ["sd.alpha=0.5"])
    config.sd.alpha, config.model.generator.kind, config.optimizer.G.lr

A method adds its own top-level keys, a model the keys of its section: see `schema.py`. Torch is not imported.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from sdtrain.config import messages
from sdtrain.config import schema as config_schema
from sdtrain.config.declare import ROLES
from sdtrain.config.options import Count, CountOrZero, Data, Ema, Images, Metrics, Weights
from sdtrain.config.schema import Schema
from sdtrain.config.yaml_source import KeyPath, Source, Tree, dump_tree, merge, parse_overrides, read_with_bases
from sdtrain.errors import ConfigError

CONFIG_FOLDERS = (Path("configs"), Path(__file__).resolve().parents[1] / "configs")
INTERVALS = ("log_img", "sample_img", "eval_img", "save_img")
# Keys that may differ between a run folder and the command that resumes it: they change no weight.
HARMLESS = (
    *("name", "total_img", *INTERVALS, "keep_checkpoints", "ghosts_at_once", "on_nonfinite", "tensorboard", "metrics"),
    *("data.workers", "data.prefetch", "data.cache", "data.max_bad", "data.val", "data.test"),
    *("weights.inception", "weights.alex", "sd.log"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of every configuration (a loaded one has those of its method too). A `base:` key names a file to extend."""

    name: str
    """Name of the run folder; default: the file's name without .yaml (never inherited through `base`)."""
    seed: CountOrZero = 0
    """Decides every random number."""
    method: str
    """File of sdtrain/methods that says what the networks minimise."""
    batch_size: Count
    """Images an optimizer step, over all ranks."""
    ghost_batch: Count
    """Images a ghost: the unit of batch statistics and random numbers."""
    ghosts_at_once: Count | None = None
    """summation fast: ghosts in one forward pass; null = all of the rank, less saves memory. exact takes one."""
    summation: Literal["exact", "fast"] = "exact"
    """exact: one forward a ghost, sums in float64; the curve is the same, number for number, on any number of ranks.
    fast: several ghosts at once, overlapped with sharing; equal up to rounding, which training amplifies."""
    total_img: Images
    """Images to train on."""
    log_img: Images = 4_000
    """Images between rows of metrics.jsonl; 0 = never (so for the next three)."""
    sample_img: Images = 100_000
    """Images between sample grids."""
    eval_img: Images = 200_000
    """Images between evaluations."""
    save_img: Images = 200_000
    """Images between checkpoints; the end of a run is always saved."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that stay on disk."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the trained networks; weights and averages are fp32 always."""
    engine: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """How ranks share a network."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What all ranks do when a loss is not finite: stop, or leave the phase out."""
    data: Data
    """Images."""
    model: Any
    """One section a role (generator, discriminator), each with its `kind` and that kind's keys."""
    optimizer: Any = None
    """One section a player of the method."""
    ema: Ema = field(default_factory=Ema)
    """Running average of the generator."""
    weights: Weights = field(default_factory=Weights)
    """Frozen networks."""
    metrics: Metrics = field(default_factory=Metrics)
    """Evaluations."""
    tensorboard: bool = True
    """Mirror scalars and images to TensorBoard files."""

    @property
    def num_ghosts(self) -> int:
        return self.batch_size // self.ghost_batch

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def valid_world_sizes(config: Config) -> list[int]:
    """Numbers of ranks that give each rank the same number of ghosts."""
    return [world for world in range(1, config.num_ghosts + 1) if config.num_ghosts % world == 0]


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


def load_config(path_or_name: str | Path, overrides: Iterable[str] = (), world: int | None = None) -> Any:
    """Read, extend, override and check a configuration. ConfigError lists every problem, one a line, with its place.

    `world` is the number of ranks when it is known; a world size that does not divide the ghosts is then a problem too.
    """
    path = find_config(path_or_name)
    source = read_with_bases(path)
    source.tree.setdefault("name", path.stem)
    for override in parse_overrides(overrides):
        source = merge(source, override)
    return resolve(source, world)


def resolve(source: Source, world: int | None = None) -> Any:
    """Check a source and build the frozen `Config`."""
    problems, schema = _choices(source)
    config, found = _validate(schema.cls, source)
    problems = {**found, **problems}
    broken = set(problems)
    if config is None:
        config, _ = _validate(schema.cls, _pruned(source, broken))
    if config is not None:
        problems.update(_broken_rules(config, schema, world, source, broken))
    texts = [*source.problems, *problems.values()]
    if texts:
        raise ConfigError(_report(texts))
    return config


def _report(texts: list[str]) -> str:
    lines = sorted(dict.fromkeys(texts), key=_file_and_line)
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems in the configuration:", *lines])


def _file_and_line(text: str) -> tuple[str, int]:
    place, _, rest = text.partition(":")
    line = rest.partition(":")[0]
    return place, int(line) if line.isdigit() else 0


def _choices(source: Source) -> tuple[dict[KeyPath, str], Schema]:
    """Read `method` and each `kind`, and the schema they choose."""
    problems: dict[KeyPath, str] = {}
    method = _choice(source, ("method",), config_schema.methods(), problems)
    chosen = {}
    for role in ROLES:
        chosen[role] = _choice(source, ("model", role, "kind"), config_schema.kinds(role), problems)
    return problems, config_schema.schema(Config, method, tuple(chosen.items()))


def _choice(source: Source, path: KeyPath, names: list[str], problems: dict[KeyPath, str]) -> str | None:
    value = messages.value_at(source.tree, path)
    if isinstance(value, str) and value in names:
        return value
    key, known = messages.dotted(path), f"one of {', '.join(names) or '(none)'}"
    if value is messages.NO_VALUE:
        outer = path[:2] if messages.value_at(source.tree, path[:2]) is messages.NO_VALUE else path
        text = f"key '{key}' is missing: give it {known}"
    else:
        outer = path
        text = f"key '{key}' must be {known}, not {messages.show(value)}{messages.nearest(str(value), names)}"
    problems[outer] = f"{source.place(path)}: {text}"
    return None


@cache
def _checker(cls: Any) -> TypeAdapter:
    return TypeAdapter(cls)


def _validate(cls: Any, source: Source) -> tuple[Any, dict[KeyPath, str]]:
    # through JSON, because pydantic's strict mode takes sections and lists for dataclasses and tuples only from there
    try:
        return _checker(cls).validate_json(json.dumps(source.tree)), {}
    except ValidationError as error:
        return None, messages.type_problems(error, cls, source)


def _pruned(source: Source, broken: Iterable[KeyPath]) -> Source:
    """The source without the keys at fault, so that rules can be checked on the rest."""
    tree = json.loads(json.dumps(source.tree))
    for path in broken:
        while path and not isinstance(messages.value_at(tree, path[:-1]), dict):
            path = path[:-1]
        if path:
            messages.value_at(tree, path[:-1]).pop(path[-1], None)
    return Source(tree, source.places)


def _broken_rules(
    config: Any, schema: Schema, world: int | None, source: Source, broken: set[KeyPath]
) -> dict[KeyPath, str]:
    """Rules across keys; those that involve a key already at fault are left out."""
    found: dict[KeyPath, str] = {}
    kinds_known = not any(path[0] in ("method", "model") for path in broken)
    own = schema.rules(config) if kinds_known else ()
    for keys, sentence in chain(common_problems(config, world), own):
        paths = [tuple(key.strip().split(".")) for key in keys.split(",")]
        if not any(path[: len(bad)] == bad or bad[: len(path)] == path for path in paths for bad in broken):
            given = [path for path in paths if path in source.places]
            at = (*paths[0], sentence)
            found[at] = f"{source.place((given or paths)[0])}: {sentence}"
    return found


def common_problems(config: Config, world: int | None) -> Iterator[tuple[str, str]]:
    """Combinations of common keys that cannot work, as (keys, sentence)."""
    yield from _batch_problems(config, world)
    yield from _sum_problems(config)
    yield from _time_problems(config)
    if not config.name or "/" in config.name or config.name.startswith("."):
        yield "name", f"name '{config.name}' cannot be a folder name: use letters, digits, - and _"
    if config.engine != "ddp":
        yield "engine", f"engine '{config.engine}' is not available in this version: use ddp"
    if config.data is not None and config.data.train in ("", []):
        yield "data.train", "data.train is empty: give it a folder of shards or a pattern"


def _batch_problems(config: Config, world: int | None) -> Iterator[tuple[str, str]]:
    batch, ghost = config.batch_size, config.ghost_batch
    if batch % ghost:
        lower = batch - batch % ghost
        working = f"{lower} or {lower + ghost}" if lower else str(ghost)
        yield "batch_size, ghost_batch", f"batch_size {batch} is not a multiple of ghost_batch {ghost}: take {working}"
    elif world is not None and config.num_ghosts % world:
        sizes = ", ".join(map(str, valid_world_sizes(config)))
        yield (
            "batch_size, ghost_batch",
            f"{world} ranks cannot share {config.num_ghosts} ghosts (batch_size {batch} / ghost_batch {ghost}) "
            f"evenly: launch one of {sizes} ranks",
        )


def _sum_problems(config: Config) -> Iterator[tuple[str, str]]:
    if config.summation == "exact" and (config.ghosts_at_once or 1) > 1:
        keys = "ghosts_at_once, summation"
        yield keys, f"summation exact takes one ghost at once, not {config.ghosts_at_once}: leave it out or set fast"


def _time_problems(config: Config) -> Iterator[tuple[str, str]]:
    batch = config.batch_size
    if config.total_img is not None and config.total_img < batch:
        yield (
            "total_img, batch_size",
            f"total_img {config.total_img} is less than one batch of {batch}: take at least {batch}",
        )
    for key in INTERVALS:
        if 0 < getattr(config, key) < batch:
            yield (
                f"{key}, batch_size",
                f"{key} {getattr(config, key)} is less than one batch of {batch}, and nothing happens between steps: "
                f"take at least {batch}, or 0 for never",
            )


def to_tree(config: Any) -> Any:
    """Plain values (sections, lists, text, numbers) with every default; `kind` first in a section."""
    if dataclasses.is_dataclass(config):
        names = sorted((item.name for item in dataclasses.fields(config)), key=lambda name: name != "kind")
        return {name: to_tree(getattr(config, name)) for name in names}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    return [to_tree(value) for value in config] if isinstance(config, (list, tuple)) else config


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every default written out; loads back to an equal `Config`."""
    return dump_tree(to_tree(config))


def config_hash(config: Config) -> str:
    """Hex digest of everything in the configuration."""
    return hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Difference:
    """One key that differs between a run folder and the command that resumes it; None = the key is absent there."""

    key: str
    old: Any
    new: Any

    @property
    def harmless(self) -> bool:
        return any(self.key == key or self.key.startswith(f"{key}.") for key in HARMLESS)

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Compare two trees (see `to_tree`; `read_tree` reads that of a run folder), key by key."""
    before, after = _leaves(old), _leaves(new)
    keys = dict.fromkeys([*before, *after])
    return [Difference(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        found.update(inner)
    return found


def read_tree(path: Path) -> Tree:
    """The plain tree of a written `config.yaml`, without checking its keys: it may come from another version."""
    source = read_with_bases(path)
    if source.problems:
        raise ConfigError(_report(source.problems))
    return source.tree
