"""`sdtrain suite run | submit | status NAME`: the runs of a table in turn, with one teacher for all of them.

    runs/suites/NAME/
      teacher/                  trained once, an ordinary run
      ARM-seed0/, ARM-seed1/    ordinary runs
      ARM-seed0.log             what it has said, with --jobs
      report.md, report.png     what `sdtrain report` makes of the runs that have finished
      .lock                     held while a `suite run` or a run of it is at work; the names of those runs

A configuration file lists the runs: see config/suite.py. Nothing else is remembered: a run whose newest start came to
its end as it is asked now has finished, and any other one is started, which goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.commands import report
from sdtrain.commands.relay import Relay
from sdtrain.commands.suite_jobs import Job, submit
from sdtrain.commands.suite_slots import Slot, divided
from sdtrain.commands.suite_state import LOCK, finished, held, state, status, working_on
from sdtrain.commands.suite_turns import AtWork, train
from sdtrain.config.words import nearest
from sdtrain.engine.trackers import check_trackers
from sdtrain.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, RunError, UserError
from sdtrain.exits import tell
from sdtrain.main import check_folder

if TYPE_CHECKING:
    from sdtrain.config.suite import Member, Suite

EXAMPLE = """\
examples:
  sdtrain suite run sdakd_gcfsr --plan                  what would be trained, in which order
  sdtrain suite run sdakd_gcfsr --launcher "accelerate launch --config_file launch/node4.yaml"
  sdtrain suite run sdakd_gcfsr --only half --only half_naive_CC
  sdtrain suite run small_sdgan --jobs 2                two runs at once, each with half of the cores and GPUs
  sdtrain suite run sdakd_gcfsr --jobs 2 --launcher "torchrun --standalone --nproc_per_node 4"    of 8 GPUs
  sdtrain suite submit sdakd_gcfsr --sbatch "--nodes=2 --time=12:00:00"
  sdtrain suite status sdakd_gcfsr

The same command goes on where it stopped. Suites lie in configs/suites; a file of yours does as well."""
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
    words = "runs at once, each with its share of this machine's cores and GPUs (default: 1, with all of them)"
    run.add_argument("--jobs", type=int, default=1, metavar="N", help=words)
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
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs} trains nothing: how many runs at once, 1 or more")
    command = [*words_of(args.launcher), str(PROGRAM)]
    commands = {member.out: [*command, *words(member), *more] for member in members}
    if args.plan:
        return show_plan(suite, members, commands, args.allow)
    for member in members:
        check(member, args.allow)
    with locked(suite) as lock:
        check_datasets(members)
        slots = divided(args.jobs) if args.jobs > 1 else [Slot()]
        with Relay() as relay:
            at_work = AtWork(relay, lock)
            code = train(suite, members, slots, lambda member, slot: at_work.start(commands[member.out], member, slot))
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
            raise RunError(f"{suite.out} is at work, on {working_on(suite)}: wait for its end, or stop it")
        yield fd
    finally:
        os.close(fd)


def tables(suite: Suite) -> int:
    """The report of the runs that have finished."""
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    runs = [str(member.out) for member in suite.members if finished(member)]
    return report.run(parser.parse_args([*runs, "--out", str(suite.out / "report.md")]))
