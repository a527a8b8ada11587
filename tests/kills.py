"""Kill and stop real runs at random moments, start them again, and compare with a run that nobody touched.

    python tests/kills.py [--kills 30] [--signals 20] [--seed 0] [--victim rank|launcher|group|each]
    python tests/kills.py --in-a-row [--kills 30] [--victim rank]

SIGKILL hits one rank, the launcher (torchrun), the whole group, or these in turn (each); then the same command is given
again, and weights, optimizers and rows must be those of an undisturbed run, bit for bit. With --in-a-row it is one long
run that is killed so often, and started again each time, until it is left alone at last. A signal
(SIGTERM or SIGUSR1, to one rank or all, from half a second after the start on) must end the run within 30 seconds with
75 and a complete checkpoint, and that run must end the same way too. Prints a line each; exits 1 when one has failed.

Ranks of groups and single ranks are forked from this process, which has loaded torch already, so that a whole run takes
seconds; those of a launcher are started by it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

REPO = Path(__file__).resolve().parents[1]
END, RANKS, OBEYED_SEC = 32, 2, 30.0
VICTIMS = ["group", "rank", "launcher"]
LISTENING_SEC = 0.5  # before, Python itself is still starting, and a signal ends it


@dataclasses.dataclass
class Attempt:
    """A start of the run: the processes to aim at, and how it has ended."""

    launcher: subprocess.Popen[str] | None
    pids: list[int]
    codes: dict[int, int]
    out: str = ""

    def wait(self, limit_sec: float = 300.0) -> bool:
        """Until all have ended. A launcher kills what is left when a rank dies; here this process does."""
        deadline = time.monotonic() + limit_sec
        if self.launcher is not None:
            self.out = self.launcher.communicate(timeout=limit_sec)[0]
            self.codes[0] = self.launcher.returncode
        while self.launcher is None and len(self.codes) < len(self.pids):
            self.reap()
            if any(code not in (0, 75) for code in self.codes.values()) or time.monotonic() > deadline:
                for pid in self.left():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return time.monotonic() < deadline

    def left(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self.codes]

    def reap(self) -> None:
        for pid in self.left():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)

    def running(self) -> bool:
        self.reap()
        return bool(self.left())


class Place:
    """Shards, a configuration and run folders."""

    def __init__(self, folder: Path, end: int = END, eval_img: int = 16) -> None:
        self.folder, self.end = folder, end
        tiny.make_shards(folder / "shards", samples=24)
        clock = {"batch_size": 8, "total_img": end, "log_img": 8, "save_img": 8, "eval_img": eval_img, "sample_img": 16}
        metrics = {"names": ["rfid"], "num_fake": 64, "seeds": 1, "tap": 64, "select_by": "rfid", "batch_size": 2}
        config = tiny.tiny_config(folder / "shards", **clock, metrics=metrics, tracker="tensorboard")
        tiny.write_config(folder / "tiny.yaml", config)

    def forked(self, out: str, ranks: int = RANKS) -> Attempt:
        job = {"args": ["--cfg", str(self.folder / "tiny.yaml"), "--out", str(self.folder / out)], "plain": True}
        port = tiny.free_port()
        pids = []
        for rank in range(ranks):
            env = tiny.rank_environment(rank, ranks, port)
            log = self.folder / f"{out}.{rank}.log"
            log.with_suffix(".told").unlink(missing_ok=True)
            pids.append(tiny.started({**job, "env": env}, log, rank))
        return Attempt(None, pids, {})

    def launched(self, out: str) -> Attempt:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
        command = [sys.executable, *launch, str(REPO / "sdtrain" / "main.py"), "--cfg", str(self.folder / "tiny.yaml")]
        command += ["--out", str(self.folder / out), "--set", "eval_img=0"]  # its Inception takes half a minute
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        popen = subprocess.Popen(command, env=env, start_new_session=True, cwd=REPO, **pipes)
        return Attempt(popen, [], {})

    def started(self, kind: str, out: str) -> Attempt:
        return self.launched(out) if kind == "launcher" else self.forked(out)

    def differs(self, out: str, reference: str) -> str:
        """What of a finished run is not as in the reference, or nothing."""
        one, other = (tiny.tensors(self.folder / name, self.end) for name in (reference, out))
        apart = tiny.unequal(one, other)
        if apart:
            return f"{len(apart)} of {len(one)} tensors differ"
        same = tiny.rows(self.folder / reference) == tiny.rows(self.folder / out)
        return "" if same else "rows of metrics.jsonl differ"

    def log(self, out: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{out}.*.log")))


def members(session: int) -> list[int]:
    """Processes of a session, whoever their parent is now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def strike(place: Place, kind: str, out: str, after: float, chance: random.Random) -> str:
    """Start, and kill after a while; what went wrong with ending, or nothing."""
    attempt = place.started(kind, out)
    time.sleep(after)
    if attempt.launcher is not None:
        session = attempt.launcher.pid
        attempt.launcher.kill()
        attempt.launcher.communicate()
        deadline = time.monotonic() + 60
        while (left := members(session)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return f"{len(left)} ranks outlived their launcher by a minute" if left else ""
    attempt.reap()
    targets = attempt.left()
    for pid in targets if kind == "group" else [chance.choice(targets)] if targets else []:
        os.kill(pid, signal.SIGKILL)
    attempt.wait()
    return ""


def finished(place: Place, kind: str, out: str) -> str:
    """Start, and leave it alone; how it differs from an undisturbed run, or nothing."""
    again = place.started(kind, out)
    again.wait()
    if set(again.codes.values()) != {0}:
        return f"the next start ended with {sorted(again.codes.values())}: {(again.out or place.log(out))[-400:]}"
    return place.differs(out, "launched" if kind == "launcher" else "whole")


def killed(place: Place, kind: str, out: str, after: float, chance: random.Random) -> str:
    """Kill once, start again; what went wrong, or nothing."""
    return strike(place, kind, out, after, chance) or finished(place, kind, out)


def in_a_row(place: Place, kinds: list[str], kills: int, chance: random.Random) -> str:
    """Kill one run again and again; what went wrong, or nothing."""
    reference = "launched" if kinds[-1] == "launcher" else "whole"
    whole = measure(lambda: place.started(kinds[-1], reference))
    startup = measure(lambda: place.started(kinds[-1], reference))  # there is nothing left to do
    span = startup + 2 * max(whole - startup, 0.0) / kills
    print(f"{place.end // 8} undisturbed steps take {whole:.1f} s, {startup:.1f} s of it to start", flush=True)
    for number in range(kills):
        kind, after = kinds[number % len(kinds)], chance.random() * span
        problem = strike(place, kind, "row", after, chance)
        at = max((int(path.name[4:]) for path in (place.folder / "row" / "checkpoints").glob("img_*")), default=0)
        print(f"SIGKILL {number:2d} {kind:9} after {after:5.2f} s, at step {at // 8}: {problem or 'ended'}", flush=True)
        if problem:
            return problem
    return finished(place, kinds[-1], "row")


def told(place: Place, out: str, after: float, chance: random.Random) -> str:
    """Signal once, start again; what went wrong, or nothing."""
    attempt = place.forked(out)
    time.sleep(after)
    targets = attempt.pids if chance.random() < 0.5 else [chance.choice(attempt.pids)]
    sent, began = chance.choice([signal.SIGTERM, signal.SIGUSR1]), time.monotonic()
    was_running = attempt.running()
    for pid in set(targets) & set(attempt.left()):
        os.kill(pid, sent)
    attempt.wait(OBEYED_SEC + 30)
    took, codes = time.monotonic() - began, set(attempt.codes.values())
    finished = codes == {0}  # the signal came when nothing was left to stop
    if was_running and not finished:
        if codes != {75} or took > OBEYED_SEC:
            return f"ended with {sorted(codes)} after {took:.1f} s: {place.log(out)[-400:]}"
        if not list((place.folder / out / "checkpoints").glob("img_*/complete.json")):
            return "no checkpoint was kept"
    again = place.forked(out)
    again.wait()
    if set(again.codes.values()) != {0}:
        return f"the next start ended with {sorted(again.codes.values())}: {place.log(out)[-400:]}"
    return place.differs(out, "whole")


def measure(start: Callable[[], Attempt]) -> float:
    """Seconds of an undisturbed run."""
    began = time.monotonic()
    attempt = start()
    attempt.wait()
    assert set(attempt.codes.values()) == {0}, (attempt.codes, attempt.out)
    return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victim", choices=[*VICTIMS, "each"], default="each", help="whom SIGKILL hits")
    parser.add_argument("--in-a-row", action="store_true", help="one run, killed again and again")
    args = parser.parse_args()
    tiny.warm_up()
    chance, failed, kinds = random.Random(args.seed), 0, VICTIMS if args.victim == "each" else [args.victim]
    with tempfile.TemporaryDirectory() as folder:
        if args.in_a_row:
            problem = in_a_row(Place(Path(folder), 32 * args.kills, 0), list(kinds), args.kills, chance)
            print(f"{args.kills} kills in a row: {problem or 'bit-equal'}", flush=True)
            return int(bool(problem))
        place = Place(Path(folder))
        whole = measure(lambda: place.forked("whole"))
        launched = measure(lambda: place.launched("launched")) if "launcher" in kinds and args.kills else 0.0
        print(f"an undisturbed run takes {whole:.1f} s, under torchrun {launched:.1f} s", flush=True)
        for number in range(args.kills):
            kind = kinds[number % len(kinds)]
            after = chance.random() * (launched if kind == "launcher" else whole)
            problem = killed(place, kind, f"kill{number}", after, chance)
            failed += bool(problem)
            print(f"SIGKILL {number:2d} {kind:9} after {after:5.2f} s: {problem or 'bit-equal'}", flush=True)
        print(f"kills: {args.kills - failed} of {args.kills} bit-equal", flush=True)
        bad = 0
        for number in range(args.signals):
            after = LISTENING_SEC + chance.random() * (whole - LISTENING_SEC)
            problem = told(place, f"told{number}", after, chance)
            bad += bool(problem)
            print(f"signal  {number:2d} after {after:5.2f} s: {problem or 'obeyed, and bit-equal'}", flush=True)
        print(f"signals: {args.signals - bad} of {args.signals} obeyed within {OBEYED_SEC:g} s", flush=True)
    return int(bool(failed or bad))


if __name__ == "__main__":
    sys.exit(main())
