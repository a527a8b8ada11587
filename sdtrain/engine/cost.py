"""What each engine costs a rank, in memory and in bytes sent: arithmetic over the table of networks of a plan.

With W bytes of trained weights (4 a parameter), O of optimizer (8), G of gradients while they are summed (4, and under
`summation: exact` 16 more), A of averages and frozen networks, and N ranks that share one copy, a rank holds at most

    ddp            W + A + G + O
    zero1, zero2   W + A + max(G, 3 W) + (O + W) / N    gradients handed over, its bucket, its own copy of its part
    fsdp2, hsdp    W + A + G + (O + W) / N        or W + G + (O + W + A) / N + A, gathered, with shard_teacher

Activations are the same under all of them. zero2 deals out gradients that it has been handed whole, so it differs from
zero1 between phases only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Table = Mapping[str, Mapping[str, Any]]
SHARED = ("ddp", "zero1", "zero2", "fsdp2", "hsdp")


def memory_gb(networks: Table, stages: Sequence[Mapping[str, Any]], engine: str, n: int, teacher: bool) -> float:
    """Of the stage that needs most, without activations; hsdp with n for the ranks that share a copy."""
    return max((_stage_gb(networks, stage["trains"], engine, n, teacher) for stage in stages), default=0.0)


def _stage_gb(networks: Table, trains: Sequence[str], engine: str, n: int, teacher: bool) -> float:
    parts = ("weights_gb", "gradients_gb", "optimizer_gb")
    W, G, adam = (sum(networks[name][part] for name in trains) for part in parts)
    A = sum(net["weights_gb"] for name, net in networks.items() if name not in trains)
    if engine == "ddp" or n == 1:
        return float(W + A + G + adam)
    if engine in ("zero1", "zero2"):
        return float(W + A + max(G, 3 * W) + (adam + W) / n)
    return float(W + A + G + (adam + W + (A if teacher else 0.0)) / n)


def sent_gb(networks: Table, trains: Sequence[str], engine: str, num_ranks: int, exact: bool) -> float:
    """By a rank in a step of one phase a player, in rings: (N - 1) / N of every tensor, twice where all get the sum."""
    W = sum(networks[name]["weights_gb"] for name in trains)
    total, ring = W * (2 if exact else 1), (num_ranks - 1) / num_ranks  # float64 sums
    if engine == "ddp":
        return float(2 * total * ring)
    if engine in ("zero1", "zero2"):
        return float((2 * total + (2 if engine == "zero1" else 1) * W + W) * ring)
    # gathered in every phase, G's also for D's and for its average
    return float((total + 3 * W) * ring)


def compared(
    networks: Table, stages: Sequence[Mapping[str, Any]], engine: str, num_ranks: int, exact: bool, teacher: bool
) -> dict[str, Any]:
    """For the plan: what is used, and what every engine would take on `num_ranks` ranks."""
    last = stages[-1]["trains"] if stages else []
    return {
        "used": engine,
        "ranks": num_ranks,
        "gb_per_rank": {e: memory_gb(networks, stages, e, num_ranks, teacher) for e in SHARED},
        "sent_gb_per_step": {e: sent_gb(networks, last, e, num_ranks, exact) for e in SHARED},
    }


def advice(found: Mapping[str, Any], activations_gb: float) -> str:
    """One line: the engine, what the best other one would save or cost, and whether that matters."""
    used, n, gb = found["used"], found["ranks"], found["gb_per_rank"]
    if n == 1:
        return f"{used}; one rank shares with nobody"
    best = min(gb, key=gb.get)
    saved, whole = gb[used] - gb[best], gb[used] + activations_gb
    if best == used or saved <= 0:
        return f"{used}, on {n} ranks none needs less"
    matters = saved > 0.2 * whole
    verdict = "worth it" if matters else "not worth it: activations bind" if activations_gb > gb[used] else "little"
    more = found["sent_gb_per_step"][best] / max(found["sent_gb_per_step"][used], 1e-12)
    cost = f"of {whole * 1000:.0f} MB a rank and send {more:.1f} times as much"
    return f"{used}; on {n} ranks {best} would save {saved * 1000:.1f} MB {cost} ({verdict})"
