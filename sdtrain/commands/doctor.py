"""`sdtrain doctor`: what this machine offers and lacks, one line a finding; exit code 2 if a run could not work.

With --ranks it is started as training is, one process a rank (preflight.py): exit code 75 when a host is to blame.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sdtrain import __version__
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from sdtrain.files import why_unwritable

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "lpips")
LITTLE_DISK_GB = 5
RENDEZVOUS_TIMEOUT_SEC = 120

# Two processes meet through gloo and add up their ranks: what every CPU run and every CUDA start-up needs.
RENDEZVOUS = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
assert dist.get_world_size() == 2 and total.item() == 3, (dist.get_world_size(), total)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of the group may abort a process in the interpreter's exit
"""

Finding = tuple[str, str, str]  # "ok", "note" or "bad"; what was looked at; what was found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", metavar="FILE|NAME", help="also check this configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of it")
    parser.add_argument("--world", type=int, metavar="N", help="number of ranks it shall run on")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where runs will be written (default: runs)")
    parser.add_argument("--quick", action="store_true", help="leave out what needs torch: devices and ranks")
    together = "what all ranks of a launcher have to find out together, on each of them, before training with --cfg"
    parser.add_argument("--ranks", action="store_true", help=together)
    parser.add_argument("--within", type=float, default=30, metavar="SEC", help="time for --ranks (default: 30)")
    for switch in ("--allow-pipe", "--restart", "--plan"):  # words of training, which job scripts hand to both
        parser.add_argument(switch, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--allow", action="append", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.ranks:
        from sdtrain.commands import preflight

        return preflight.run(args)
    verdicts = []
    for verdict, what, found in findings(args):
        verdicts.append(verdict)
        print(f"{verdict:5}{what:16}{found}", flush=True)
    bad = verdicts.count("bad")
    print(f"{bad} problem(s) would stop a run" if bad else "nothing here would stop a run")
    return EXIT_USER_ERROR if bad else EXIT_OK


def findings(args: argparse.Namespace) -> Iterator[Finding]:
    yield "ok", "sdtrain", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield from packages()
    yield disk(args.out or Path("runs"))
    yield from weights()
    if args.cfg:
        yield configuration(args.cfg, args.set, args.world)
    if not args.quick:
        yield devices()
        yield rendezvous()


def packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield "ok", name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield "bad", name, "not installed: pip install sdtrain's dependencies (pip install -e .)"


def disk(folder: Path) -> Finding:
    """Free space and the right to write, where `folder` is or will be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    if reason := why_unwritable(folder):
        return "bad", "disk", f"{reason}: choose another folder with --out"
    return "ok" if free_gb > LITTLE_DISK_GB else "note", "disk", f"{free_gb:.1f} GB free in {place}"


def weights() -> Iterator[Finding]:
    from sdtrain.weights import WEIGHTS, cache_folder

    present = [name for name, entry in WEIGHTS.items() if entry.place.is_file()]
    cached = [name for name in present if not WEIGHTS[name].packaged]
    yield "ok" if present else "note", "weights", f"in {cache_folder()}: {', '.join(cached) or 'none'}"
    if brought := [name for name in present if name not in cached]:
        yield "ok", "weights", f"from installed packages: {', '.join(brought)}"
    absent = [name for name in WEIGHTS if name not in present]
    if absent:
        yield "note", "weights", f"absent: {', '.join(absent)} (`sdtrain fetch-weights NAME` where there is a network)"


def configuration(name: str, overrides: list[str], world: int | None) -> Finding:
    from sdtrain.config.compare import config_hash
    from sdtrain.config.keys import valid_world_sizes
    from sdtrain.config.load import load_config

    try:
        config = load_config(name, overrides, world)
    except UserError as error:
        return "bad", "configuration", str(error)
    sizes = ", ".join(map(str, valid_world_sizes(config)))
    return "ok", "configuration", f"{config.name} ({config_hash(config)[:12]}), runs on {sizes} ranks"


def devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return "note", "devices", f"no CUDA device: training on the CPU, {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "ok", "devices", "; ".join(f"{device.name}, {device.total_memory / 1e9:.0f} GB" for device in names)


def rendezvous(timeout_sec: float = RENDEZVOUS_TIMEOUT_SEC) -> Finding:
    """Start two gloo ranks on this machine and let them add a number."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "meet.py")
        script.write_text(RENDEZVOUS)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        return _outcome(lambda: subprocess.run(launch, capture_output=True, text=True, timeout=timeout_sec))


def _outcome(start: Callable[[], subprocess.CompletedProcess[str]]) -> Finding:
    try:
        done = start()
    except subprocess.TimeoutExpired as error:
        return "bad", "ranks", f"2 ranks did not meet in {error.timeout:.0f} s: suspect the firewall or the host name"
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "no message")
        return "bad", "ranks", f"2 ranks failed to meet: {last.strip()}"
    return "ok", "ranks", "2 ranks met through gloo"
