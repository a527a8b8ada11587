"""Where the runs of a suite stand, from what they have written; imports neither torch nor numpy."""

from __future__ import annotations

import fcntl
import json
from typing import TYPE_CHECKING

from sdtrain.commands.results import planned
from sdtrain.engine.positions import saved_img
from sdtrain.engine.starts import last_start
from sdtrain.main import other_teachers

if TYPE_CHECKING:
    from sdtrain.config.suite import Member, Suite

LOCK = ".lock"
ENGINE = "engine"  # a run writes down the one it has used, and all train to the same weights


def held(fd: int, kind: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def working_on(suite: Suite) -> str:
    """The names of the runs at work, "" when there is none."""
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
    if member.out.name in working_on(suite).split(", "):
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
