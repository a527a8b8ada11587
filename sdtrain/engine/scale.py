"""What a run would take on ranks that are not there (`--plan --world-size N`): arithmetic over its table of networks.

A step of N ranks, each with 1 / N of the images, where `cost.py` says what a phase sends:

    sec/kimg(N) = S / N + 1000 / batch_size * sent_gb(N) / bandwidth

S is measured: seconds per 1000 images of one rank, or those of W ranks times W. Sending is taken not to overlap with
computing, as under `summation: exact`; `fast` hides part of it. The network's latency is not in it: it comes on top,
once a collective, and grows with log2 N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.engine.cost import SHARED, Table, memory_gb, sent_gb
from sdtrain.engine.positions import positions
from sdtrain.engine.starts import last_start
from sdtrain.outlook import forecast

NODE = 8  # ranks of one machine, which hsdp shares a copy among unless told
Phases = Mapping[str, tuple[tuple[str, ...], float]]  # player -> its networks, its phases a step


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What somebody wants to know and has stated."""

    ranks: int
    bandwidth: float | None = None
    """[GB/s] What a rank sends while all of them do."""
    disk: float | None = None
    """[GB/s] What a checkpoint is written with."""
    speed: float | None = None
    """[seconds per 1000 images] On one rank."""


def sent_in_step(networks: Table, phases: Phases, engine: str, num_ranks: int, exact: bool, share: int) -> float:
    """GB that a rank sends: over players, phases a step times those of a phase (`cost.sent_gb`).

    With P parameters of 4 bytes, g = 8 bytes a gradient under `summation: exact` and 4 else, and r(n) = (n - 1) / n:

        ddp    2 g P r(N)               zero1  2 g P r(N) + 12 P r(N)      zero2  2 g P r(N) + 8 P r(N)
        fsdp2  g P r(N) + 12 P r(N)     hsdp   (g P + 12 P) r(n) + 2 (g P / n) r(N / n), n = `share` ranks a copy

    Averages cost nothing: each rank moves what it holds. (What fsdp2 gathers for them is in its 12 P.)
    """
    total = 0.0
    for nets, count in phases.values():
        one = sent_gb(networks, nets, engine, share if engine == "hsdp" else num_ranks, exact)
        if engine == "hsdp":
            gradients = sum(networks[net]["weights_gb"] for net in nets) * (2 if exact else 1)
            copies = num_ranks / share
            one += 2 * gradients / share * (copies - 1) / copies
        total += count * one
    return total


def predicted(speed: float, num_ranks: int, batch_size: int, sent: float, bandwidth: float) -> float:
    """Seconds per 1000 images: S / N + 1000 / batch_size * sent [GB] / bandwidth [GB/s]."""
    return speed / num_ranks + 1000 / batch_size * sent / bandwidth


def for_more(batch_size: int, ghost_batch: int) -> str:
    """What lifts the largest world size."""
    ghosts = batch_size // ghost_batch
    said = f"{ghosts} ranks at most: one ghost each (batch_size {batch_size} / ghost_batch {ghost_batch}). For more, "
    said += f"raise batch_size (to {2 * batch_size} for {2 * ghosts} ranks) and choose the learning rate anew"
    if ghost_batch == 1:
        return said
    half = next(n for n in range(ghost_batch // 2, 0, -1) if ghost_batch % n == 0)
    more = batch_size // half
    return f"{said}, or lower ghost_batch (to {half} for {more} ranks), which changes batch statistics: another curve"


def scaled(
    asked: Asked,
    config: Any,
    networks: Table,
    stages: Any,
    phases: Phases,
    activations_gb: float,
    out: Path | None,
    exact: bool,
) -> dict[str, Any]:
    """For the plan, in GB and seconds; `out` is a run folder whose speed and disk are known, if there is one.

    `exact`: gradients are added up in float64.
    """
    n, used = asked.ranks, config.engine or "ddp"
    share = min(config.shard_ranks or NODE, n)
    share = share if n % share == 0 else n
    speed = known_speed(asked, out)
    disk = asked.disk or written_gb_per_sec(out)
    checkpoint = sum(net["checkpoint_gb"] for net in networks.values())
    sent = {e: sent_in_step(networks, phases, e, n, exact, share) for e in SHARED}
    held = {e: memory_gb(networks, stages, e, share if e == "hsdp" else n, config.shard_teacher) for e in SHARED}
    times = {}
    if speed and (asked.bandwidth or n == 1):
        one, rate = speed["sec_per_kimg"], asked.bandwidth or 1.0
        times = {e: predicted(one, n, config.batch_size, sent[e], rate) for e in SHARED}
    return {
        "ranks": n,
        "engine": used,
        "ghosts_per_rank": config.num_ghosts // n,
        "samples_per_rank": config.batch_size // n,
        "ranks_per_copy": {"hsdp": share},
        "memory_gb_per_rank": {e: gb + activations_gb for e, gb in held.items()},
        "activations_known": activations_gb > 0,
        "sent_gb_per_step": sent,
        "collectives_per_step": 2 + sum(3 * count for _, count in phases.values()),
        "bandwidth_gb_per_sec": asked.bandwidth,
        "measured": speed,
        "sec_per_kimg": times,
        "checkpoint_gb": checkpoint,
        "disk_gb_per_sec": disk,
        "checkpoint_sec": checkpoint / disk if disk else None,
        "largest_world_size": config.num_ghosts,
        "for_more": for_more(config.batch_size, config.ghost_batch),
    }


def known_speed(asked: Asked, out: Path | None) -> dict[str, Any]:
    """Seconds per 1000 images of one rank, stated or of a run folder's newest ticks; {} where there is neither."""
    if asked.speed:
        return {"sec_per_kimg": asked.speed, "from": "--speed"}
    ticks = forecast(out, {})
    if out is None or not ticks:
        return {}
    started = last_start(out).get("world_size", 1)
    ranks = started if isinstance(started, int) and started > 0 else 1
    return {"sec_per_kimg": ticks["sec_per_kimg"] * ranks, "from": f"{out} on {ranks} rank{'s' * (ranks > 1)}"}


def written_gb_per_sec(out: Path | None) -> float | None:
    """How fast the newest checkpoint of a run folder was written: all but its first file, by the times of its files."""
    folders = positions(out / "checkpoints") if out else []
    files = [(path.stat().st_mtime, path.stat().st_size) for path in folders[-1].iterdir()] if folders else []
    files.sort()
    took = files[-1][0] - files[0][0] if files else 0.0
    return sum(size for _, size in files[1:]) / 1e9 / took if took > 0.01 else None


def render_scale(found: Mapping[str, Any], name: str) -> list[str]:
    """Lines of the plan."""
    n, ghosts, samples = found["ranks"], found["ghosts_per_rank"], found["samples_per_rank"]
    lines = [
        f"on {n} rank{'s' * (n > 1)}: {samples} images ({ghosts} ghost{'s' * (ghosts > 1)}) a rank and step; "
        f"{found['collectives_per_step']:.3g} collectives a step, 2 more a tick",
        f"{'engine':<8}{'memory a rank':>16}{'sent a step':>16}{'s/kimg':>12}{'of ideal':>10}",
    ]
    for engine, gb in found["memory_gb_per_rank"].items():
        time = found["sec_per_kimg"].get(engine)
        ideal = found["measured"]["sec_per_kimg"] / n / time if time else 0.0
        told = f"{time:>12.4g}{ideal:>10.0%}" if time else f"{'?':>12}{'?':>10}"
        mark = "  used" if engine == found["engine"] else ""
        lines.append(f"{engine:<8}{_gb(gb):>16}{_gb(found['sent_gb_per_step'][engine]):>16}{told}{mark}")
    lines[1] += "" if found["activations_known"] else "  (without activations)"
    return [*lines, _speed(found, name), _disk(found), found["for_more"]]


def _gb(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.3g} MB"


def _speed(found: Mapping[str, Any], name: str) -> str:
    known, bandwidth = found["measured"], found["bandwidth_gb_per_sec"]
    if not known:
        return f"s/kimg needs a measured speed: --speed of one rank (`sdtrain bench --cfg {name}`), or --out of a run"
    told = f"s/kimg from {known['sec_per_kimg']:.4g} on one rank ({known['from']})"
    if not found["sec_per_kimg"]:
        return f"{told}: {known['sec_per_kimg'] / found['ranks']:.4g} without sending; say --bandwidth GB/s for that"
    return f"{told} and {bandwidth or 0:g} GB/s that a rank sends, without overlap and latency"


def _disk(found: Mapping[str, Any]) -> str:
    gb, rate = found["checkpoint_gb"], found["disk_gb_per_sec"]
    took = f"in {found['checkpoint_sec']:.3g} s at {rate:.3g} GB/s" if rate else "say --disk GB/s for its time"
    return f"a checkpoint is {_gb(gb)} for any number of ranks, {took}"
