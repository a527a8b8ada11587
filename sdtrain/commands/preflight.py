"""`sdtrain doctor --ranks`: what only all ranks of a launcher together can find out, within a time limit.

Every rank puts what it is and what it lacks into a common store, the first one compares and tells all of them; then
they add up a number through gloo. A host that does not report, differs or cannot be reached is named.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sdtrain import __version__
from sdtrain.engine.ranks import has_gpu
from sdtrain.errors import EXIT_OK, EXIT_REQUEUE, ConfigError, MachineError, UserError
from sdtrain.files import why_unwritable

WORDS = {"code": "code", "python": "Python", "torch": "torch", "device": "device", "config": "configuration"}
MARGIN_SEC = 10.0
TIME_TO_MEET = 0.6  # of what is left for all, so that the outcome can be told
Report = dict[str, Any]


class BadNode(MachineError):
    """A host that cannot take part."""


def run(args: argparse.Namespace) -> int:
    """Returns 0 on all ranks or on none.

    Raises UserError for what is wrong on every rank, and MachineError for what is wrong on some hosts.
    """
    guard = threading.Timer(args.within + MARGIN_SEC, give_up)  # a library may wait for longer than it is told to
    guard.daemon = True
    guard.start()
    try:
        meet(Meeting(args.within), args)
    except MachineError:
        raise
    except RuntimeError as error:
        raise alone(f"has lost the others: {str(error).splitlines()[0]}") from error
    guard.cancel()
    return EXIT_OK


def meet(meeting: Meeting, args: argparse.Namespace) -> None:
    reports = meeting.exchange("report", report(args))
    meeting.agree(lambda: judge(meeting, reports))
    sums = meeting.exchange("sum", add_up(meeting))
    meeting.agree(lambda: judge_sums(meeting, sums))
    if meeting.rank == 0:
        print("\n".join(summary(reports, time.monotonic() - meeting.began)), flush=True)


def give_up() -> None:
    os.write(2, f"sdtrain: {me(rank_here())} still waits for the others: it is ended\n".encode())
    os._exit(EXIT_REQUEUE)


class Meeting:
    """The ranks that a launcher has announced, with a store in which they leave notes."""

    def __init__(self, limit_sec: float) -> None:
        env = os.environ
        self.began, self.limit_sec = time.monotonic(), limit_sec
        self.rank, self.world = rank_here(), int(env.get("WORLD_SIZE", "1"))
        self.hosts = env.get("SDTRAIN_HOSTS", "").split()
        self.ranks_a_host = int(env.get("LOCAL_WORLD_SIZE", "1"))
        self.verdicts = 0
        self.place = f"{env.get('MASTER_ADDR', 'localhost')}:{env.get('MASTER_PORT', '0')}"
        self.store = self._store() if self.world > 1 else dist.HashStore()

    def _store(self) -> Any:
        """Raises MachineError, naming this host, when the one of rank 0 cannot be reached."""
        address, port = self.place.rsplit(":", 1)
        mine = self.rank == 0 and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
        try:
            store = dist.TCPStore(address, int(port), None, mine, self.left(), wait_for_workers=False)
        except RuntimeError as error:
            told = f"cannot reach {self.place}, where rank 0 listens: {str(error).splitlines()[0]}"
            raise alone(f"{told}; look at the network of that host") from None
        return dist.PrefixStore("sdtrain doctor", store)

    def left(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(self.limit_sec - (time.monotonic() - self.began), 1.0))

    def exchange(self, what: str, mine: Report) -> list[Report]:
        """The notes of all ranks, on rank 0; elsewhere this one's alone."""
        self.store.set(f"{what} {self.rank}", json.dumps(mine))
        if self.rank:
            return [mine]
        keys = [f"{what} {rank}" for rank in range(self.world)]
        self._wait_for(keys)
        return [json.loads(self.store.get(key)) if self.store.check([key]) else {} for key in keys]

    def _wait_for(self, keys: Sequence[str]) -> None:
        deadline = time.monotonic() + self.left().total_seconds()
        while not self.store.check(list(keys)) and time.monotonic() < deadline:
            time.sleep(0.1)

    def agree(self, find: Callable[[], str | tuple[str, bool]]) -> None:
        """Rank 0 finds out what is wrong, all hear of it. Raises what `run` raises."""
        self.verdicts += 1
        key = f"verdict {self.verdicts}"
        if self.rank == 0:
            self.store.set(key, json.dumps(find()))
        self.store.wait([key], self.left() + datetime.timedelta(seconds=5))
        problem, everybody = json.loads(self.store.get(key))
        if problem:
            if self.rank == 0 and self.world > 1:
                time.sleep(1.0)  # it keeps the store from which the others are reading
            raise (ConfigError if everybody else BadNode)(problem)

    def name(self, rank: int) -> str:
        """Who a rank is that has not said so itself."""
        index = rank // self.ranks_a_host
        return f"rank {rank} on {self.hosts[index]}" if index < len(self.hosts) else f"rank {rank}"


def rank_here() -> int:
    return int(os.environ.get("RANK", "0"))


def alone(problem: str) -> BadNode:
    """What this rank has to say by itself: until ranks have met, only the first one's errors are printed."""
    told = f"{me(rank_here())} {problem}"
    if rank_here() and not dist.is_initialized():
        print(f"sdtrain: {told}", file=sys.stderr, flush=True)
    return BadNode(told)


def me(rank: int) -> str:
    return f"rank {rank} on {os.uname().nodename}"


def report(args: argparse.Namespace) -> Report:
    """What this rank is, by the names of WORDS, and what it lacks."""
    facts = {"code": f"{__version__} ({code_digest()})", "python": platform.python_version()}
    facts["torch"] = torch.__version__
    problems, out = [], args.out
    try:
        out, facts["config"] = asked(args)
    except UserError as error:
        problems.append(str(error))
    problems.append(why_unwritable(out or Path("runs")))
    facts["device"], lacking = device()
    found = [problem for problem in (*problems, lacking) if problem]
    return {"who": me(rank_here()), "host": os.uname().nodename, "facts": facts, "problems": found, "out": str(out)}


def asked(args: argparse.Namespace) -> tuple[Path, str]:
    """Run folder, and name and digest of the configuration. Raises UserError."""
    from sdtrain.config.compare import config_hash
    from sdtrain.config.load import load_config

    if not args.cfg:
        return args.out or Path("runs"), "none"
    config = load_config(args.cfg, args.set, int(os.environ.get("WORLD_SIZE", "1")))
    return args.out or Path(f"runs/{config.name}"), f"{config.name} ({config_hash(config)[:12]})"


def code_digest() -> str:
    """Of every line of this package as this host sees it."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device() -> tuple[str, str]:
    """The kind of device that this rank would train on, and what is wrong with it."""
    if not has_gpu():
        return "cpu", ""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        return "cuda", f"its {number + 1}. rank has no GPU of its own: {count} are visible"
    try:
        good = int(torch.ones(8, device=f"cuda:{number}").sum()) == 8
        return "cuda", "" if good else f"GPU {number} adds up wrongly"
    except RuntimeError as error:
        return "cuda", f"GPU {number} does not work: {str(error).splitlines()[0]}"


def judge(meeting: Meeting, reports: Sequence[Report]) -> tuple[str, bool]:
    """What is wrong, "" if nothing is, and whether it is on all ranks alike."""
    absent = [meeting.name(rank) for rank, found in enumerate(reports) if not found]
    if absent:
        told = f"{listed(absent)} of {len(reports)} did not report within {meeting.limit_sec:g} s"
        return f"{told}: see what that host says above, or leave it out (sbatch --exclude=HOST)", False
    first = reports[0]["problems"]
    if first and all(found["problems"] == first for found in reports):
        return "; ".join(first), True
    hurt = [f"{found['who']}: {'; '.join(found['problems'])}" for found in reports if found["problems"]]
    return "; ".join(hurt) or unlike(reports), False


def unlike(reports: Sequence[Report]) -> str:
    """Who differs from the others, in what; of two equal halves rank 0's is taken for the rule."""
    told = []
    for what, word in WORDS.items():
        values = [found["facts"].get(what, "") for found in reports]
        count = Counter(values)
        usual = max(count, key=lambda value: (count[value], value == values[0]))
        pairs = zip(reports, values, strict=True)
        odd = [f"{found['who']} has {word} {value}" for found, value in pairs if value != usual]
        told += [f"{listed(odd)}, the others {usual}"] if odd else []
    return "; ".join(told)


def listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def add_up(meeting: Meeting) -> Report:
    """What comes of a sum through gloo, in time to be told: it may wait for others far longer than its timeout."""
    found: Report = {}
    thread = threading.Thread(target=lambda: found.update(add_up_with_gloo(meeting)), daemon=True)
    thread.start()
    thread.join(meeting.left().total_seconds() * TIME_TO_MEET)
    return dict(found) or {"problem": f"{me(meeting.rank)} still waits for the others"}


def add_up_with_gloo(meeting: Meeting) -> Report:
    """Meet through gloo, which finds addresses its own way, and add up the ranks."""
    if meeting.world == 1:
        return {"problem": ""}
    where: Any = {"store": dist.PrefixStore("gloo", meeting.store), "rank": meeting.rank, "world_size": meeting.world}
    try:
        dist.init_process_group("gloo", **where, timeout=meeting.left())
        total = torch.tensor([meeting.rank])
        dist.all_reduce(total)
    except RuntimeError as error:
        return {"problem": f"{me(meeting.rank)}: {str(error).splitlines()[0]}"}
    right = meeting.world * (meeting.world - 1) // 2
    return {"problem": "" if int(total) == right else f"{me(meeting.rank)} adds up {int(total)} in place of {right}"}


def judge_sums(meeting: Meeting, reports: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    silent = [f"{meeting.name(rank)} did not come back" for rank, found in enumerate(reports) if not found]
    failed = [found["problem"] for found in reports if found and found["problem"]]
    if not silent and not failed:
        return "", False
    mend = "name the network that joins the hosts: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, as `ip addr` lists it"
    return f"ranks report, but cannot add up a number together: {listed([*silent, *failed])}; {mend}", False


def summary(reports: Sequence[Report], took_sec: float) -> list[str]:
    hosts = list(dict.fromkeys(found["host"] for found in reports))
    facts = ", ".join(f"{word} {reports[0]['facts'].get(what)}" for what, word in WORDS.items())
    return [
        f"ok   ranks           {len(reports)} on {len(hosts)} host(s) met in {took_sec:.1f} s: {listed(hosts)}",
        f"ok   alike           {facts}",
        f"ok   disk            {reports[0]['out']} can be written by all",
    ]
