"""What a run needs and will do, before it does anything: `--plan`, and the checks that come before the first step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.config import schema
from sdtrain.config.compare import config_hash
from sdtrain.config.keys import valid_world_sizes
from sdtrain.errors import ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    from sdtrain.config.keys import Config
    from sdtrain.contracts import Method
    from sdtrain.data.read.dataset import Dataset
    from sdtrain.engine.scale import Asked as AskedScale
    from sdtrain.finetune import Initial
    from sdtrain.run import Run
    from sdtrain.trainer import Trainer

CYCLE = 64  # steps after which lazy penalties have come round


def check_data(config: Config, keep_index: bool = True) -> Dataset:
    """Open the training data; without `keep_index` nothing is written.

    Raises `DataError` for too few samples or labels that are not there, `ConfigError` for a resolution that cannot be.
    """
    from sdtrain.data.read.dataset import open_dataset, reading

    dataset = open_dataset(config.data.train, keep_index=keep_index, **reading(config.data))
    if config.data.labels and not dataset.num_classes:
        raise DataError(
            f"{dataset.source} has no class labels and data.labels is true; pack it with --labels folder (a folder for "
            "each class), or leave the key out"
        )
    if config.data.labels is False:
        dataset = replace(dataset, label_names=())
    if dataset.num_samples < config.batch_size:
        raise DataError(
            f"{dataset.source} has {dataset.num_samples} samples, fewer than one batch of {config.batch_size}; "
            "lower batch_size or pack more images"
        )
    if not (config.data.resolution or dataset.resolution):
        raise ConfigError(f"{dataset.source} holds images of mixed sizes; set data.resolution or pack them to one size")
    problems = list(schema.method(config.method).data_problems(config, dataset))
    if problems:
        raise DataError("\n  ".join(problems))
    return dataset


def weights_needed(config: Config) -> dict[str, str]:
    """Frozen networks this run uses: file name in the weights registry -> source."""
    needs: dict[str, str | None] = {}
    asked = schema.method(config.method).weights_needed(config)
    needs |= {name: getattr(config.weights, key) for name, key in asked.items()}
    for section in vars(config.model).values():
        name_of = schema.model(section.kind).feature_weights
        if name_of:
            needs[name_of(section)] = config.weights.features
    if config.eval_img:
        needs |= _needed_by_metrics(config)
    return {name: source or "download" for name, source in needs.items()}


def _needed_by_metrics(config: Config) -> dict[str, str | None]:
    """Feature networks of the evaluations of generated images, as the table of metrics says."""
    from sdtrain.metrics.table import FILES, Settings

    m = config.metrics
    settings = Settings(metrics=m.names, extractor=m.extractor, pr_features=m.pr_features)
    kinds = {kind for kind, _ in settings.nets().values()}
    return {kind: getattr(config.weights, kind) for kind in FILES if kind in kinds}


def check_weights_needed(config: Config) -> dict[str, Any]:
    """Raises `WeightsError` listing every file that is missing, where to put it, and how to fetch it."""
    from sdtrain.weights import check_weights

    needs = weights_needed(config)
    problems = check_weights(needs)
    if problems:
        raise WeightsError("\n  ".join(problems))
    return {name: describe_source(name, source) for name, source in needs.items()}


def check_initial(config: Config, dataset: Dataset) -> Initial | None:
    """The weights a fresh run starts from, read and checked; None without `init`. Raises `WeightsError`."""
    from sdtrain.finetune import read_initial, wanted

    if not wanted(config):
        return None
    side = config.data.resolution or dataset.resolution
    assert side is not None  # `check_data` came first
    return read_initial(config, side, dataset.num_classes)


def describe_source(name: str, source: str) -> dict[str, Any]:
    """Where a frozen network's tensors come from, and the hash of the file when it is there."""
    from sdtrain.weights import sha256_of, weights_path

    path = weights_path(name, source)
    if path is None:
        return {"source": "random"}
    return {"source": source, "place": str(path), "sha256": sha256_of(path) if path.is_file() else "missing"}


def make_plan(
    config: Config,
    run: Run | None = None,
    initial: Initial | None = None,
    out: Path | None = None,
    asked: AskedScale | None = None,
) -> dict[str, Any]:
    """The plan as data. Builds the networks (on the CPU) unless a `run` that has them is given.

    `initial` is what `check_initial` has found; without a run it is looked up here. `out`: where a speed may be known.
    `asked`: ranks to plan for that are not there, and what they may send and write.
    """
    from sdtrain.activations import recomputing_of
    from sdtrain.engine.compiled import described
    from sdtrain.engine.cost import compared
    from sdtrain.engine.ranks import has_gpu
    from sdtrain.engine.scale import Asked, scaled
    from sdtrain.outlook import forecast, warnings
    from sdtrain.precision import exact_sums
    from sdtrain.weights import check_weights

    dataset = run.dataset if run is not None else check_data(config, keep_index=False)
    initial = initial if run is not None else check_initial(config, dataset)
    if run is not None:
        asked = Asked(ranks=int(os.environ.get("WORLD_SIZE", "1")))
    ranks = asked.ranks if asked else num_ranks(config)
    trainer = run if run is not None else _build(config, dataset, asked.ranks if asked else None)
    method = trainer.method
    total_img = method.stages[-1].end_img if method.stages else 0
    needs = weights_needed(config)
    exact, teacher = exact_sums(config, "cuda" if has_gpu() else "cpu"), config.shard_teacher
    networks = _networks(method, exact=exact)
    memory = _memory(networks, _stages(method))
    phases = _phases(trainer)
    recomputing = {} if run is not None else recomputing_of(config, trainer)
    engines = compared(networks, _stages(method), config.engine or "ddp", ranks, exact, teacher)
    kept = recomputing["gb"]["again" if recomputing["used"] else "plain"] if recomputing else {}
    most = max(kept.values(), default=0.0)
    return {
        "name": config.name,
        "config_hash": config_hash(config),
        "summation": "exact" if exact else "fast",
        "data": {
            "what": dataset.describe(),
            "samples": dataset.num_samples,
            "shards": len(dataset.shards),
            "hash": dataset.hash,
            "epochs": total_img / dataset.num_samples,
            "classes": len(trainer.builder.class_counts),
        },
        "steps": total_img // config.batch_size,
        "stages": _stages(method),
        "select_by": getattr(config, "validation", config.metrics).select_by,
        "images_per_tick": config.log_img,
        "steps_per_tick": config.log_img // config.batch_size,
        "ghosts": config.num_ghosts,
        "valid_world_sizes": valid_world_sizes(config),
        "networks": networks,
        "memory_gb_per_rank": memory,
        "activations_gb": kept,
        "checkpointing": recomputing,
        "compiled": described(trainer.parts),
        "engine": engines,
        "scale": scaled(asked, config, networks, _stages(method), phases, most, out, exact) if asked else {},
        "ghosts_at_once": trainer.ghosts_at_once,
        "checkpoint_gb": sum(n["checkpoint_gb"] for n in networks.values()),
        "disk_gb": sum(n["checkpoint_gb"] for n in networks.values()) * (config.keep_checkpoints + 1)
        + len(method.snapshots) * sum(networks[n]["weights_gb"] for n in ("G", "G_ema") if n in networks),
        "weights": {name: describe_source(name, source) for name, source in needs.items()},
        "weights_missing": check_weights(needs),
        "init": initial.described if initial else {},
        "switched_off": _switched_off(config),
        "forecast": forecast(out, {s.name: s.end_img for s in method.stages}),
        "warnings": warnings(config, dataset, total_img),
    }


def num_ranks(config: Config) -> int:
    """Those that were started, else as many of one machine's eight as the run can have."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return started if started > 1 else max(n for n in valid_world_sizes(config) if n <= 8)


def _stages(method: Method) -> list[dict[str, Any]]:
    """What every stage trains and until when."""
    return [
        {"name": s.name, "end_img": s.end_img, "trains": [n for nets in s.players.values() for n in nets]}
        for s in method.stages
    ]


def _networks(method: Method, exact: bool) -> dict[str, dict[str, Any]]:
    """Parameters and bytes of every network the method holds.

    `summation: exact` keeps, beside a float32 gradient, its float64 sum and the copy of it that ranks exchange.
    """
    trained = {net for stage in method.stages for nets in stage.players.values() for net in nets}
    table = {}
    for name, net in method.nets.items():
        live, total = net.size(trained=True), net.size()
        kept = 0 if name in method.given else live if name in trained else total
        table[name] = {
            "role": "trained" if name in trained else "teacher, frozen" if name in method.given else "average",
            "parameters": total,
            "trainable": live,
            "weights_gb": total * 4 / 1e9,
            "gradients_gb": live * (4 + 16 * exact) / 1e9,
            "optimizer_gb": live * 8 / 1e9,
            "checkpoint_gb": (kept * 4 + live * 8) / 1e9,
        }
    return table


def _phases(trainer: Trainer) -> dict[str, tuple[tuple[str, ...], float]]:
    """Networks of each player of the last stage, and its phases in the mean of many steps."""
    if not trainer.method.stages:
        return {}
    last = trainer.method.stages[-1]
    players = [phase.player for step in range(CYCLE) for phase in trainer.method.phases(last, step)]
    return {name: (tuple(nets), players.count(name) / CYCLE) for name, nets in last.players.items()}


def _build(config: Config, dataset: Dataset, ranks: int | None = None) -> Trainer:
    import torch

    from sdtrain.engine.ranks import has_gpu
    from sdtrain.precision import exact_sums
    from sdtrain.trainer import Trainer

    side, cpu = config.data.resolution or dataset.resolution, torch.device("cpu")
    assert side is not None  # `check_data` came first
    config = replace(config, checkpoint_activations=True)  # both ways are counted
    trainer = Trainer(config, cpu, side, dataset.class_counts, num_samples=dataset.num_samples, random_weights=True)
    if not exact_sums(config, "cuda" if has_gpu() else "cpu"):  # on as many ranks as the run can have, unless told
        share = config.num_ghosts // (ranks or max(valid_world_sizes(config)))
        trainer.ghosts_at_once = config.ghosts_at_once or share
    return trainer


def _memory(networks: dict[str, dict[str, Any]], stages: list[dict[str, Any]]) -> dict[str, float]:
    """All weights, and gradients and optimizer of the stage that trains most; frozen networks cost weights alone."""
    parts = {"weights": sum(n["weights_gb"] for n in networks.values())}
    for part in ("gradients", "optimizer"):
        parts[part] = max((sum(networks[n][f"{part}_gb"] for n in s["trains"]) for s in stages), default=0.0)
    return {**parts, "total_without_activations": sum(parts.values())}


def _switched_off(config: Config) -> list[str]:
    """Terms with weight zero: not computed at all."""
    weights = {
        "sd.alpha": getattr(getattr(config, "sd", None), "alpha", None),
        "r1.gamma": getattr(getattr(config, "r1", None), "gamma", None),
        "path_length.weight": getattr(getattr(config, "path_length", None), "weight", None),
        "bcr": getattr(config, "bcr", None),
        "eval_img": config.eval_img,
        "save_img": config.save_img,
    }
    return [key for key, value in weights.items() if value == 0]


def size(gigabytes: float) -> str:
    """'1.23 GB', or '4.5 MB' for what is small."""
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.1f} MB"


def _activations(plan: dict[str, Any]) -> str:
    """The end of the sum of memory, with the phase that needs most."""
    total, kept = plan["memory_gb_per_rank"]["total_without_activations"], plan["activations_gb"]
    if not kept:
        return f" = {size(total)} without activations"
    phase, ghosts = max(kept, key=kept.get), plan["ghosts_at_once"]
    of = f"{phase}, {ghosts} ghost{'s' * (ghosts > 1)} at once"
    return f" + {size(kept[phase])} activations ({of}) = {size(total + kept[phase])}"


def _checkpointing(found: dict[str, Any]) -> Iterator[str]:
    """What activation checkpointing saves at the moment that needs most, and its price there."""
    if "again" not in found.get("gb", {}):
        return
    plain, again = found["gb"]["plain"], found["gb"]["again"]
    most, work = max(again, key=again.get), max(found["more_work"].values())
    left = f"{size(again[most])} of activations ({most}) instead of {size(max(plain.values()))}"
    but = f"; {', '.join(found['keeps_everything'])} keeps everything" if found["keeps_everything"] else ""
    verb = "leaves" if found["used"] else "would leave"
    yield f"  recompute   checkpoint_activations: true {verb} {left}, for at most {work:.0%} more FLOPs a phase{but}"


def render(plan: dict[str, Any]) -> str:
    """The plan for people."""
    from sdtrain.engine.cost import advice
    from sdtrain.engine.scale import render_scale
    from sdtrain.outlook import render_forecast

    data, memory = plan["data"], plan["memory_gb_per_rank"]
    ranks = ", ".join(map(str, plan["valid_world_sizes"]))
    classes = f", conditional, {data['classes']} classes" if data["classes"] else ""
    lines = [
        f"plan of {plan['name']}  (config {plan['config_hash'][:12]}, data {data['hash'][:12]})",
        f"  data        {data['what']}",
        f"              {data['samples']} samples in {data['shards']} shards, {data['epochs']:.1f} epochs{classes}",
        f"  time        {plan['steps']} steps, a tick is {plan['steps_per_tick']} = {plan['images_per_tick']} images",
        f"  forecast    {render_forecast(plan['forecast'], plan['name'])}",
        f"  ranks       {plan['ghosts']} ghosts: run on {ranks} ranks, same curve",
    ]
    for s in plan["stages"] if len(plan["stages"]) > 1 else ():
        lines.append(f"  stage       {s['name']} until {s['end_img']} images, trains {', '.join(s['trains'])}")
    for name, n in plan["networks"].items():
        counts = f"{n['parameters'] / 1e6:9.3f} M parameters, {n['trainable'] / 1e6:9.3f} M trained"
        lines.append(f"  {name:<11} {counts}  {n['role']}")
    lines += [
        f"  memory      {size(memory['weights'])} weights + {size(memory['gradients'])} gradients "
        f"+ {size(memory['optimizer'])} optimizer{_activations(plan)} a rank",
        *_checkpointing(plan["checkpointing"]),
        *([f"  compiled    {plan['compiled']}"] if plan["compiled"] else []),
        f"  engine      {advice(plan['engine'], max(plan['activations_gb'].values(), default=0.0))}",
        f"  disk        {size(plan['checkpoint_gb'])} a checkpoint, {size(plan['disk_gb'])} at most; "
        f"written from a copy in host memory, dealt over ranks",
    ]
    lines += [f"  scale       {line}" for line in (render_scale(plan["scale"], plan["name"]) if plan["scale"] else ())]
    lines += [f"  weights     {name}: {' '.join(where.values())}" for name, where in plan["weights"].items()]
    for role, start in plan["init"].items():
        notes = [f"{key} {value}" for key, value in start.get("differs", {}).items()]
        where = " ".join(str(value) for key, value in start.items() if key != "differs")
        lines.append(f"  init        {role}: {where}{'; unlike the file: ' + ', '.join(notes) if notes else ''}")
    lines += [f"  MISSING     {problem}" for problem in plan["weights_missing"]]
    lines += [f"  off         {', '.join(plan['switched_off'])}: not computed"] if plan["switched_off"] else []
    lines += [f"  WARNING     {sentence}" for sentence in plan["warnings"]]
    return "\n".join(lines)
