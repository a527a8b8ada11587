"""The keys of every configuration and the rules across them. Torch is not imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sdtrain.config.options import Count, CountOrZero, Data, Duration, Ema, Images, Metrics, Optimizer, Weights
from sdtrain.config.schedule import Schedule, out_of_order
from sdtrain.config.sizes import size_problems
from sdtrain.config.words import nearest
from sdtrain.metrics.table import FILES, METRICS
from sdtrain.terminal import clip

INTERVALS = ("log_img", "sample_img", "eval_img", "save_img")
MAX_RANKS = 1 << 16
MAX_NAME = 100  # characters; file systems take 255 bytes, and files of a run add to it
# Keys that may differ between a run folder and the command that resumes it: they change no weight.
HARMLESS = (
    *("name", "total_img", *INTERVALS, "keep_checkpoints", "save_async", "ghosts_at_once", "on_nonfinite"),
    *("data.workers", "data.prefetch", "data.cache", "data.max_bad", "data.check", "data.val", "data.test"),
    *("data.allow_pipe", "sd.log", "snapshots", *(f"weights.{name}" for name in ("alex", *FILES))),
    *("timeout", "max_time", "tracker", "metrics"),
    *("summation", "deterministic"),  # they change how sums round, of which a resumed run is told
    "compile",  # the same
    *("engine", "shard_teacher", "shard_ranks", "offload_optimizer", "checkpoint_activations"),
)


if TYPE_CHECKING:

    class Section(Protocol):
        """Options of a network; its kind decides which."""

        kind: str

        def __getattr__(self, name: str) -> Any: ...

    class Model(Protocol):
        generator: Section
        discriminator: Section

    class Optimizers(Protocol):
        def __getattr__(self, name: str) -> Optimizer: ...

else:
    Model = Optimizers = Any  # the schema of the method lays real classes over them


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of every configuration (a loaded one has those of its method too). A `base:` key names a file to extend."""

    name: str
    """Name of the run folder; default: the file's name without .yaml (never inherited through `base`)."""
    seed: CountOrZero = 0
    """Decides every random number."""
    method: str
    """Folder of sdtrain/methods that says what the networks minimise."""
    batch_size: Count
    """[images] Images of an optimizer step, over all ranks."""
    ghost_batch: Count
    """[images] Images of a ghost: the unit of batch statistics and random numbers."""
    ghosts_at_once: Count | None = None
    """[ghosts] summation fast: ghosts in one forward pass; null = all of the rank. summation exact: one."""
    summation: Literal["auto", "exact", "fast"] = "auto"
    """exact: one forward a ghost, sums in float64; the curve is the same, number for number, on any number of ranks.
    fast: several ghosts at once, overlapped with sharing; equal up to rounding, which training amplifies.
    auto: exact on a CPU and with deterministic: true, else fast."""
    deterministic: bool = False
    """A GPU takes kernels that repeat their bits, which costs time; a CPU does so anyway."""
    total_img: Images
    """Images to train on."""
    log_img: Images = 4_000
    """Images between rows of metrics.jsonl; 0 = never."""
    sample_img: Images = 100_000
    """Images between sample grids; 0 = never."""
    eval_img: Images = 200_000
    """Images between evaluations; 0 = never."""
    save_img: Images = 200_000
    """Images between checkpoints; 0 = never; the end of a run is always saved."""
    keep_checkpoints: Count = 2
    """[checkpoints] Newest checkpoints that stay on disk."""
    save_async: bool = True
    """Training goes on while a checkpoint is written from a copy in host memory, which takes as much as its files."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the trained networks; weights and averages are fp32 always."""
    tf32: bool = False
    """Let a GPU round the factors of float32 products and convolutions to 10 bits, as official StyleNAT does."""
    engine: Literal["ddp", "fsdp2", "hsdp", "zero1", "zero2"] | None = None
    """How ranks share a network. ddp: each holds all of it. zero1: optimizer state is dealt out, zero2: gradients too
    (both by DeepSpeed), fsdp2: weights too, hsdp: within groups of ranks. null = what accelerate's configuration asks
    for, else ddp. Checkpoints are the same for all."""
    shard_teacher: bool = False
    """fsdp2 and hsdp: averages and teachers are dealt out too; they are then gathered whenever they are called."""
    shard_ranks: Count | None = None
    """[ranks] hsdp: neighbours that share one copy of the networks; null = those of one machine."""
    offload_optimizer: bool = False
    """zero1 and zero2: optimizer state lives in the memory of the host, where the optimizer then runs."""
    checkpoint_activations: bool = False
    """Blocks of the networks keep their inputs alone and compute the rest again in backward: the same numbers, bit for
    bit, in less memory and more time. For high resolutions; --plan says how much of both."""
    compile: Literal["none", "frozen"] = "none"
    """frozen: torch.compile for what nobody trains and nothing differentiates twice: the average that teaches and is
    validated, LPIPS and VGG, the feature network of D (unless R1 is on). Equal up to rounding, and minutes of compiling
    before the first step; --plan says what is compiled. Weights, checkpoints and their names are the same."""
    on_nonfinite: Literal["stop", "skip", "clamp"] = "stop"
    """What all ranks do when a loss or gradient is not finite. stop: end the run. skip: leave the phase out, as torch's
    GradScaler does with an optimizer's step; the other phases of the step and the averages go on, and ten such steps in
    a row end the run. clamp: replace gradients (nan by 0, inf by 1e5, as StyleGAN2-ADA does for its float16 layers) and
    count them."""
    data: Data
    """Images."""
    model: Model
    """One section a role (generator, discriminator), each with its `kind` and that kind's keys."""
    optimizer: Optimizers = None  # type: ignore[assignment]  # the schema of the method lays its own over it
    """One section a player of the method."""
    ema: Ema = field(default_factory=Ema)
    """Running average of the generator."""
    weights: Weights = field(default_factory=Weights)
    """Frozen networks."""
    metrics: Metrics = field(default_factory=Metrics)
    """Evaluations."""
    tracker: Literal["tensorboard", "wandb", "none"] | tuple[Literal["tensorboard", "wandb"], ...] = "tensorboard"
    """What scalars, images and histograms are mirrored to, one or a list: files of TensorBoard, Weights & Biases (pip
    install 'sdtrain[wandb]'; offline, unless WANDB_MODE says otherwise or WANDB_API_KEY is set), or none."""
    timeout: Duration = 180.0
    """[seconds, or 3min] How long a rank or decoding process may be silent before the run ends and names it; ten times
    that in the first step, evaluations, pictures and saves, and never less than twice what a step has needed before."""
    max_time: Duration = 0.0
    """[seconds, or 12h] The run stops by itself with a checkpoint before it has lasted this long; 0 = no limit but the
    end of its Slurm job (SLURM_JOB_END_TIME)."""

    @property
    def num_ghosts(self) -> int:
        return self.batch_size // self.ghost_batch

    @property
    def trackers(self) -> tuple[str, ...]:
        asked = [self.tracker] if isinstance(self.tracker, str) else self.tracker
        return tuple(name for name in dict.fromkeys(asked) if name != "none")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def valid_world_sizes(config: Config) -> list[int]:
    """Numbers of ranks that give each rank the same number of ghosts."""
    return [world for world in range(1, min(config.num_ghosts, MAX_RANKS) + 1) if config.num_ghosts % world == 0]


def common_problems(config: Config, world: int | None) -> Iterator[tuple[str, str]]:
    """Combinations of common keys that cannot work, as (keys, sentence)."""
    yield from _batch_problems(config, world)
    yield from _sum_problems(config)
    yield from _time_problems(config)
    yield from _schedule_problems(config)
    yield from _metric_problems(config)
    yield from size_problems(config.model)
    name = config.name
    if not name or len(name) > MAX_NAME or "/" in name or name.startswith(".") or not name.isprintable():
        yield "name", f"name '{clip(name)}' cannot be a folder name: use letters, digits, - and _"
    yield from _engine_problems(config, world)
    if config.data is not None and config.data.train in ("", []):
        yield "data.train", "data.train is empty: give it a folder of shards or a pattern"


def _engine_problems(config: Config, world: int | None) -> Iterator[tuple[str, str]]:
    engine = config.engine or "ddp"
    owners = {"shard_teacher": "fsdp2, hsdp", "shard_ranks": "hsdp", "offload_optimizer": "zero1, zero2"}
    for key, wanted in owners.items():
        if getattr(config, key) and config.engine and engine not in wanted:
            yield f"{key}, engine", f"{key} means nothing to engine {engine}: it belongs to {wanted}"
    if config.shard_teacher and config.compile != "none":
        yield (
            "compile, shard_teacher",
            f"compile: {config.compile} needs averages and teachers whole: set compile: none, or shard_teacher: false",
        )
    if world and config.shard_ranks and world % config.shard_ranks:
        yield "shard_ranks", f"shard_ranks {config.shard_ranks} does not divide {world} ranks"


def _metric_problems(config: Config) -> Iterator[tuple[str, str]]:
    for name in config.metrics.names:
        if name not in METRICS:
            known = f"choose from {', '.join(METRICS)}{nearest(name, METRICS)}"
            yield "metrics.names", f"metrics.names has '{clip(name)}', which is no metric: {known}"
    rows = [METRICS[name] for name in config.metrics.names if name in METRICS]
    falling = [value for row in rows for value in row.labels if value not in row.rising]
    if config.eval_img and config.metrics.select_by not in falling:
        what = f"what metrics.names measures and is better when low: {', '.join(falling) or 'nothing'}"
        chosen = clip(config.metrics.select_by)
        yield "metrics.select_by, metrics.names", f"metrics.select_by {chosen} cannot choose best/: {what}"


def schedules(section: object, path: str = "") -> Iterator[tuple[str, Schedule]]:
    """Every schedule below a section, with its key."""
    if isinstance(section, Schedule):
        yield path, section
    elif dataclasses.is_dataclass(section):
        for item in dataclasses.fields(section):
            yield from schedules(getattr(section, item.name), f"{path}.{item.name}".lstrip("."))
    elif isinstance(section, tuple):
        for i, inner in enumerate(section):
            yield from schedules(inner, f"{path}.{i}")


def _schedule_problems(config: Config) -> Iterator[tuple[str, str]]:
    for key, schedule in schedules(config):
        if out_of_order(schedule):
            yield f"{key}.points", f"{key}.points must be pairs whose positions rise, all in images or all in %"
        if any(value < 0 for _, value in schedule.points):
            yield f"{key}.points", f"{key}.points has a value below 0"


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
            f"evenly: launch one of {sizes} ranks{_for_as_many(world, ghost) if world > config.num_ghosts else ''}",
        )


def _for_as_many(world: int, ghost: int) -> str:
    return f", or set batch_size {world * ghost} for one ghost on each of {world}"


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
