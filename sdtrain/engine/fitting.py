"""Whether a checkpoint that verifies is one that this run could have written.

Digests prove that a folder is whole, not who wrote it: numbers that are text or slots of another shape would otherwise
end in a traceback, or in a wrong step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST = 1 << 53  # images, steps
COUNTS = ("step", "seen_img", "skipped")
SLOTS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})  # of Adam, of plain descent
Wrong = str | None


def wrong_state(state: Mapping[str, Any], own: Mapping[str, Any], stages: Sequence[str], batch_size: int) -> Wrong:
    """Why `state` (of state.json) is not this run's, or None. `own`: the state of its method as it is now."""
    bad = [key for key in COUNTS if not is_count(state.get(key))]
    if bad:
        return f"{bad[0]} is no count"
    undone = state.get("undone", [])  # and the next: earlier versions have not written them
    if not is_count(state.get("skipped_in_a_row", 0)) or not isinstance(undone, list) or not all(map(is_text, undone)):
        return "skipped_in_a_row or undone has another form"
    if state["seen_img"] != state["step"] * batch_size:
        return f"{state['seen_img']} images are not {state['step']} steps of {batch_size}"
    if state.get("stage") not in stages:
        return "its stage is none of this run's"
    if not alike(own, state.get("method")):
        return "the state of the method has another form"
    meters = state.get("meters")
    if not isinstance(meters, dict) or list(meters) != [str(number) for number in range(len(meters))]:
        return "meters has another form"
    if not all(is_sums(sums) and sums.keys() == meters["0"].keys() for sums in meters.values()):
        return "meters has another form"
    return None if is_best(state.get("best")) else "best has another form"


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """Whether it becomes a float: a whole number in a file can be too large for one."""
    return isinstance(value, float) or isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST


def alike(own: object, given: object) -> bool:
    """Whether a plain value has the form of another: the same keys and lengths, numbers for numbers."""
    if isinstance(own, dict):
        return isinstance(given, dict) and own.keys() == given.keys() and all(alike(own[k], given[k]) for k in own)
    if isinstance(own, (list, tuple)):
        return isinstance(given, list) and len(given) == len(own) and all(map(alike, own, given))
    number = own is None or isinstance(own, (int, float)) and not isinstance(own, bool)  # None: measured later
    return own is given is None or (is_number(given) if number else type(own) is type(given))


def is_sums(value: object) -> bool:
    """Whether it is {name: [sum, count]}, as a meter has it."""
    if not isinstance(value, dict):
        return False
    pairs = [pair for pair in value.values() if isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))]
    return len(pairs) == len(value) and all(1 <= count < MOST for _, count in pairs)


def is_best(value: object) -> bool:
    """Whether it is {stage: {metric: number}}."""
    parts = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(part, dict) and all(map(is_number, part.values())) for part in parts)


def wrong_slots(names: Iterable[str]) -> Wrong:
    """Why these PARAMETER/SLOT are not what an optimizer holds of each parameter, or None."""
    slots: dict[str, set[str]] = {}
    for name in names:
        key, _, slot = name.rpartition("/")
        slots.setdefault(key, set()).add(slot)
    strange = next((key for key, found in slots.items() if found not in SLOTS), None)
    return None if strange is None else f"{strange[:80]} has other slots"
