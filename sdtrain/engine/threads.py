"""How many threads a rank computes with: what the user asked for, else its share of the cores.

The number decides bits on a CPU: weight gradients of convolutions are sums that are split over threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdtrain.engine.launcher import started_by_launcher

Environment = Mapping[str, str]
ASKING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


def set_threads(env: Environment = os.environ) -> None:
    """Set those of this process, before it computes; what a person asked for stays."""
    import torch

    if not asked(env):
        torch.set_num_threads(share(env))


def asked(env: Environment) -> bool:
    """Whether a person chose: torchrun and accelerate set a value of their own (1) where nobody has."""
    if not any(env.get(name) for name in ASKING):
        return False
    if not started_by_launcher(env):
        return True
    parent = PROC / str(os.getppid())  # the launcher, with the environment that it was started in
    try:
        given, words = (parent / "environ").read_bytes().split(b"\0"), (parent / "cmdline").read_bytes()
    except OSError:
        return True
    chosen = any(entry.startswith(f"{name}=".encode()) for entry in given for name in ASKING)
    return chosen or b"num_cpu_threads_per_process" in words


def share(env: Environment) -> int:
    """The cores of this machine that one of its ranks can have."""
    return max(cores() // local_ranks(env), 1)


def local_ranks(env: Environment) -> int:
    given = env.get("LOCAL_WORLD_SIZE", "1")
    return max(int(given), 1) if given.isdigit() else 1


def warning(env: Environment = os.environ) -> str:
    """A sentence when the threads that were asked for are more than the cores, else ""."""
    given = next((env[name] for name in ASKING if env.get(name)), "").split(",")[0].strip()
    threads, ranks, available = int(given) if given.isdigit() else 0, local_ranks(env), cores()
    if threads * ranks <= available or threads == 1:
        return ""
    return (
        f"OMP_NUM_THREADS={threads} for {ranks} rank{'s' * (ranks > 1)} here is more than the {available} cores this "
        f"process may use: threads that wait for each other can be 20 times slower; leave it out, or take {share(env)}"
    )


def cores() -> int:
    """What this process may use: its affinity, cut by the quota of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([allowed, *(int(quota) for quota in _quotas())]), 1)


def _quotas() -> Iterator[float]:
    """Cores that a control group of this process, or one above it, grants (versions 2 and 1)."""
    for folder in _groups():
        try:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
            if float(quota) > 0:
                yield max(float(quota) / float(period), 1)
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue


def _groups() -> Iterator[Path]:
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:cpu:/"]:  # in a container the path may be that of the host: the root has the quota
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            group = CGROUPS.joinpath(*(["cpu"] if controllers else []), path.lstrip("/"))
            yield from [group, *(parent for parent in group.parents if parent.is_relative_to(CGROUPS))]
