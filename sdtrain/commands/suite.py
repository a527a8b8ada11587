"""`sdtrain suite run | submit | status NAME`: the runs of a table in turn, with one teacher for all of them.

    runs/suites/NAME/
      teacher/                  trained once, an ordinary run
      ARM-seed0/, ARM-seed1/    ordinary runs
      report.md, report.png     what `sdtrain report` makes of the runs that have finished
      .lock                     held while a `suite run` or a run of it is at work; the name of that run

A configuration file lists the runs: see config/suite.py. Nothing else is remembered: a run whose newest start came to
its end as it is asked now has finished, and any other one is started, which goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.commands import report
from sdtrain.commands.relay import Relay
from sdtrain.commands.results import planned
from sdtrain.commands.suite_jobs import Job, submit
from sdtrain.config.words import nearest
from sdtrain.engine.positions import saved_img
from sdtrain.engine.starts import last_start
from sdtrain.engine.trackers import check_trackers
from sdtrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE, EXIT_USER_ERROR, ConfigError, RunError, UserError
from sdtrain.exits import tell
from sdtrain.main import check_folder, other_teachers

if TYPE_CHECKING:
    from sdtrain.config.suite import Member, Suite

EXAMPLE = """\
examples:
  sdtrain suite run sdakd_gcfsr --plan                  what would be trained, in which order
  sdtrain suite run sdakd_gcfsr --launcher "accelerate launch --config_file launch/node4.yaml"
  sdtrain suite run sdakd_gcfsr --only half --only half_naive_CC
  sdtrain suite submit sdakd_gcfsr --sbatch "--nodes=2 --time=12:00:00"
  sdtrain suite status sdakd_gcfsr

The same command goes on where it stopped. Suites lie in configs/suites; a file of yours does as well."""
LOCK = ".lock"
ENGINE = "engine"  # a run writes down the one it has used, and all train to the same weights
AFTER = dict.fromkeys((EXIT_REQUEUE, EXIT_INTERRUPTED), "the same command goes on there")
MEND = "its last words say why; the same command goes on there"
PROGRAM = Path(__file__).resolve().parents[1] / "main.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    actions = parser.add_subparsers(dest="action", metavar="run|submit|status", required=True)
    run = actions.add_parser("run", help="train what has not finished, then report")
    queue = actions.add_parser("submit", help="put what has not finished into Slurm's queue, a job a run")
    status = actions.add_parser("status", help="where each run stands")
    for action in (run, queue, status):
        add = action.add_argument
        add("suite", metavar="FILE|NAME", help="suite: a path, or a name in configs/suites")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key in every run; repeat")
        add("--out", metavar="DIR", help="folder of the runs (default: the suite's, else runs/suites/NAME)")
    for action in (run, queue):
        add = action.add_argument
        add("--only", action="append", default=[], metavar="ARM", help="this arm, and the teacher it needs; repeat")
        add("--plan", action="store_true", help="check everything, print the commands, touch nothing")
        add("--allow", action="append", default=[], metavar="KEY", help="go on although this key has changed")
    words = 'what starts sdtrain/main.py: "accelerate launch"'
    run.add_argument("--launcher", default=sys.executable, metavar="WORDS", help=words)
    queue.add_argument("--sbatch", default="", metavar="WORDS", help='more words for sbatch: "--nodes=2 --qos=long"')


def run(args: argparse.Namespace) -> int:
    """Returns the exit code of the first run that fails or stops; raises UserError before anything is trained."""
    from sdtrain.config.suite import read_suite

    suite = read_suite(args.suite, args.set, args.out)
    if args.action == "status":
        print(status(suite))
        return EXIT_OK
    members, more = chosen(suite, args.only), [word for key in args.allow for word in ("--allow", key)]
    if args.action == "submit":
        return put_into_queue(suite, members, args, more)
    command = [*words_of(args.launcher), str(PROGRAM)]
    commands = {member.out: [*command, *words(member), *more] for member in members}
    if args.plan:
        return show_plan(suite, members, commands, args.allow)
    for member in members:
        check(member, args.allow)
    with locked(suite) as lock:
        check_datasets(members)
        with Relay() as relay:
            code = train(suite, members, lambda member: start(relay, commands[member.out], lock, member))
    return code or tables(suite)


def put_into_queue(suite: Suite, members: Sequence[Member], args: argparse.Namespace, more: list[str]) -> int:
    """Put what has not finished into Slurm's queue. Raises UserError before any job is there."""
    left = [member for member in members if not finished(member)]
    for member in left:
        check(member, args.allow)
    jobs = [
        Job(f"{suite.name}-{member.out.name}", [*words(member), *more], member is suite.teacher, member.taught)
        for member in left
    ]
    return submit(jobs, words_of(args.sbatch, "--sbatch"), args.plan)


def words_of(text: str, switch: str = "--launcher") -> list[str]:
    """The words of a switch. Raises ConfigError where they are none of a shell, or no launcher."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{switch} {text}: {error}; write it as in a shell") from None
    if not found and switch == "--launcher":
        raise ConfigError('--launcher is empty: write it as "accelerate launch --config_file FILE"')
    return found


def chosen(suite: Suite, only: Sequence[str]) -> list[Member]:
    """The runs to train, in order. Raises ConfigError for an arm that is not there."""
    arms = list(dict.fromkeys(member.arm for member in suite.members))
    for arm in only:
        if arm not in arms:
            raise ConfigError(f"--only {arm}: {suite.name} has {', '.join(arms)}{nearest(arm, arms)}")
    kept = [member for member in suite.arms if not only or member.arm in only]
    teacher = suite.teacher
    needed = teacher is not None and (teacher.arm in only or any(member.taught for member in kept))
    return [*([teacher] if teacher and needed else []), *kept]


def check(member: Member, allow: list[str]) -> None:
    """What needs no data. Raises UserError for a folder with another run in it, for weights or trackers not there."""
    from sdtrain.plan import check_weights_needed

    check_trackers(member.config)
    check_folder(member.config, member.out, allow)
    check_weights_needed(member.config)


def show_plan(suite: Suite, members: Sequence[Member], commands: Mapping[Path, list[str]], allow: list[str]) -> int:
    """Print the commands; what would stop a run is said first, each problem once, and gives the exit code."""
    problems: dict[str, None] = {}
    for member in members:
        try:
            check(member, allow)
        except UserError as problem:
            problems[str(problem)] = None
    for sentence in problems:
        tell(sentence)
    for member in members:
        print(f"{member.out.name}: {state(suite, member)}\n  {shlex.join(commands[member.out])}")
    return EXIT_USER_ERROR if problems else EXIT_OK


def check_datasets(members: Sequence[Member]) -> None:
    """Raises UserError for data that some run could not use; each arm is looked at for one seed."""
    from sdtrain.plan import check_data

    for member in {member.arm: member for member in members}.values():
        check_data(member.config)


def words(member: Member) -> list[str]:
    """What follows the program in the command that trains it."""
    overrides = [word for override in member.overrides for word in ("--set", override)]
    return ["--cfg", member.cfg, "--out", str(member.out), *overrides]


def train(suite: Suite, members: Sequence[Member], start: Callable[[Member], int]) -> int:
    """Train what has not finished, in order. Returns the code of the first run that does not finish, else 0."""
    for number, member in enumerate(members, 1):
        done = finished(member)
        print(f"[{number}/{len(members)}] {member.out}{': has finished' if done else ''}", flush=True)
        code = EXIT_OK if done else start(member)
        if code:
            rest = f"{sum(map(finished, members))} of {len(members)} runs have finished"
            tell(f"suite {suite.name}: {member.out.name} ended with code {code}; {rest}; {AFTER.get(code, MEND)}")
            return code
    return EXIT_OK


def start(relay: Relay, command: list[str], lock: int, member: Member) -> int:
    """The exit code of a run. Raises RunError when it says 0 and has not finished."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, member.out.name.encode(), 0)
    code = relay.run(command, lock)
    if code == EXIT_OK and not finished(member):
        raise RunError(f"{member.out}: {shlex.join(command[:3])} ... ended well without training; see --launcher")
    return code


@contextmanager
def locked(suite: Suite) -> Iterator[int]:
    """Hold the folder of the suite; the descriptor is for the runs. Raises RunError where it is held or unwritable."""
    try:
        for folder in (suite.out, *([suite.teacher.out] if suite.teacher else [])):
            folder.mkdir(parents=True, exist_ok=True)  # arms look for the teacher's before it is trained
        fd = os.open(suite.out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise RunError(f"{suite.out} cannot be written ({error.strerror}); choose another folder with --out") from None
    try:
        if not held(fd, fcntl.LOCK_EX):
            raise RunError(f"{suite.out} is at work: {working_on(suite)} has not ended; wait for it, or stop it")
        yield fd
    finally:
        os.close(fd)


def held(fd: int, kind: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def working_on(suite: Suite) -> str:
    """The name of the run at work, "" when there is none."""
    try:
        with open(suite.out / LOCK) as file:
            return "" if held(file.fileno(), fcntl.LOCK_SH) else file.read()
    except OSError:
        return ""


def finished(member: Member) -> bool:
    """Whether the newest start of the run came to its end, asked as it is now and with the teacher that there is."""
    from sdtrain.config.compare import differences, read_tree, to_tree

    written = member.out / "config.yaml"
    if "finished" not in last_start(member.out) or not written.is_file():
        return False
    changed = (d for d in differences(read_tree(written), to_tree(member.config)) if d.key != ENGINE)
    return not any(changed) and not any(other_teachers(member.config, member.out))


def state(suite: Suite, member: Member) -> str:
    """Where a run stands, in words."""
    if finished(member):
        return "finished"
    total = f" of {all_img:,}" if (all_img := planned(member.out)[0]) else ""
    where = f"at {saved_img(member.out):,}{total} images"
    if working_on(suite) == member.out.name:
        return f"running, saved {where}"
    if "finished" in last_start(member.out):
        return "finished, asked otherwise"
    if (member.out / "config.yaml").exists():
        return f"stopped {where}"
    return "waits for teacher" if member.taught and suite.teacher and not finished(suite.teacher) else "not started"


def best_of(member: Member) -> str:
    """The metric that has chosen the weights in best/, "-" before there are any."""
    key = getattr(member.config, "validation", member.config.metrics).select_by
    try:
        found = json.loads((member.out / "best" / "metrics.json").read_bytes())
        return f"{key} {found[key]:.5g} at {found['seen_img']:,}"
    except (OSError, ValueError, LookupError, TypeError):
        return "-"


def status(suite: Suite) -> str:
    """A table: arm, seed, state, best metric."""
    lines = [["arm", "seed", "state", "best"]]
    lines += [[m.arm, str(m.config.seed), state(suite, m), best_of(m)] for m in suite.members]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def tables(suite: Suite) -> int:
    """The report of the runs that have finished."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    runs = [str(member.out) for member in suite.members if finished(member)]
    return report.run(parser.parse_args([*runs, "--out", str(suite.out / "report.md")]))
