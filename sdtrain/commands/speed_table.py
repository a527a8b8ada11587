"""Table 3 of SDAKD from files of `sdtrain speed --json`, or from runs, which are then measured; without, torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdtrain.commands.material import Material, has_weights
from sdtrain.commands.papers import BACKBONES
from sdtrain.commands.results import HUGE
from sdtrain.commands.speed_rows import CONDITION, Asked, ratio, sizes_of, speed_up
from sdtrain.commands.tables import Table
from sdtrain.errors import UserError

WIDTH = {"gcfsr": "narrow", "rrdbnet": "num_feat", "srvgg": "num_feat"}
FULL = {"gcfsr": 1.0, "rrdbnet": 64, "srvgg": 64}
PUBLISHED = {
    "gcfsr": {"1": "1.00x", "1/2": "1.98x", "1/4": "3.43x", "1/8": "4.35x"},
    "rrdbnet": {"1": "1.00x", "1/2": "1.77x", "1/4": "1.96x", "1/8": "2.08x"},
}
TEXTS = ("name", "kind", "size", "precision", "backend", "clock")
NUMBERS = ("threads", "parameters", "flops")
SETUP = ("device", "torch", "batch")


@dataclass(frozen=True)
class Timed:
    """One network under one condition, in one call of `sdtrain speed`."""

    call: int
    case: dict[str, Any]
    condition: tuple[str, ...]


def table3(material: Material) -> list[Table]:
    """A table for each kind of network and condition. [] where nothing was measured and no run holds a student."""
    rows = [row for run in material.runs for row in run.speeds] + measured(material)
    timed = [one for call, row in enumerate(rows) for one in cases_of(call, row, material.notes)]
    tables = []
    for condition in dict.fromkeys(one.condition for one in timed):
        here = [one for one in timed if one.condition == condition]
        last = here[-1].call
        if here[0].call != last:
            said = f"{describe(condition)} was measured more than once: the last call counts"
            material.notes.append(f"Table 3 of SDAKD: {said}")
        if table := filled([one.case for one in here if one.call == last], condition, material.notes):
            tables.append(table)
    return tables


def measured(material: Material) -> list[dict[str, Any]]:
    """The runs of super-resolution timed in turn with their teachers, as a row of `sdtrain speed`."""
    runs = [run for run, config in material.configured if hasattr(config, "student") and any(has_weights(run.path))]
    if not runs:
        return []
    from sdtrain.commands.speed_cases import measure, subjects_of

    asked = Asked(sizes_of(material.args.size), passes=material.args.passes, device=material.args.device)
    different: dict[tuple[Any, ...], Any] = {}  # weights do not change the speed
    for run in runs:
        try:
            for one in subjects_of([run.path]):
                different.setdefault((one.network.kind, one.network.resolution, one.network.typed_options), one)
        except UserError as problem:
            material.notes.append(f"{run.name}: {problem}")
    return [measure(list(different.values()), asked, material.notes)] if different else []


def cases_of(call: int, row: dict[str, Any], notes: list[str]) -> Iterable[Timed]:
    """The cases of a row that are whole; the others are counted."""
    setup, cases = row.get("setup"), row.get("cases")
    if not isinstance(setup, dict) or not isinstance(cases, list):
        notes.append("Table 3 of SDAKD: a row of `sdtrain speed` is damaged, and left out")
        return
    whole = [case for case in cases if is_whole(case)]
    if len(whole) < len(cases):
        notes.append(f"Table 3 of SDAKD: {len(cases) - len(whole)} damaged cases of `sdtrain speed` are left out")
    for case in whole:
        where = (str(setup.get(key)) for key in SETUP)
        yield Timed(call, case, (case["kind"], *where, case["clock"], *(str(case[key]) for key in CONDITION)))


def is_whole(case: Any) -> bool:
    """Whether it is a case of a network whose width is known, with numbers where they belong."""
    if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in TEXTS):
        return False
    seconds, options = case.get("seconds"), case.get("options")
    if case["kind"] not in WIDTH or not isinstance(options, dict) or not isinstance(seconds, list) or len(seconds) < 2:
        return False
    values = [case.get(key) for key in NUMBERS] + seconds + [options.get(WIDTH[case["kind"]])]
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < HUGE for x in values)


def filled(cases: Sequence[dict[str, Any]], condition: tuple[str, ...], notes: list[str]) -> Table | None:
    """Rows by C, the share of the widest network's channels; None where there is nothing to compare with."""
    kind = condition[0]
    widest = max(cases, key=lambda case: case["options"][WIDTH[kind]])
    if len({width(case, widest) for case in cases}) < 2:
        notes.append(
            f"Table 3 of SDAKD: {describe(condition)} has one width, {widest['name']}: measure its teacher with it"
        )
        return None
    if widest["options"][WIDTH[kind]] < FULL[kind]:
        notes.append(
            f"Table 3 of SDAKD: the widest {BACKBONES[kind]} is {widest['name']} with {WIDTH[kind]} "
            f"{widest['options'][WIDTH[kind]]:g}, the paper's has {FULL[kind]:g}; C is the share of the former"
        )
    lines = []
    known = PUBLISHED.get(kind, {})
    for name, case in sorted(by_width(cases, widest, notes).items(), key=lambda item: -item[1]["flops"]):
        line = [
            name,
            case["name"],
            f"{1000 * statistics.median(case['seconds']):.3f}",
            f"{case['parameters'] / 1e6:.3f}",
        ]
        line += [f"{case['flops'] / 1e9:.3f}", ratio(widest["flops"], case["flops"]), f"{speed_up(case, widest):.2f}x"]
        lines.append([*line, known.get(name, "-")])
    lines += [[name, *"------", value] for name, value in known.items() if name not in {line[0] for line in lines}]
    said = f"Table 3 of SDAKD: speed-up by width, {describe(condition)}; medians over {len(widest['seconds'])} passes "
    said += "in turn. Published values are of another device."
    head = ["C", "Network", "ms", "M parameters", "GFLOP", "FLOPs ratio", "speed-up", "published"]
    return Table(said, head, lines, 2)


def by_width(cases: Sequence[dict[str, Any]], widest: dict[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    """One case for each width: the first, since weights do not change the speed."""
    found: dict[str, dict[str, Any]] = {}
    for case in [widest, *cases]:
        first = found.setdefault(width(case, widest), case)
        if first is not case and first["name"] != case["name"]:
            notes.append(f"Table 3 of SDAKD: {case['name']} is as wide as {first['name']}, which stands for both")
    return found


def width(case: dict[str, Any], widest: dict[str, Any]) -> str:
    """C as a fraction, and whether RRDBNet's growth channels have kept their width."""
    key = WIDTH[case["kind"]]
    share = Fraction(case["options"][key] / widest["options"][key]).limit_denominator(64)
    grown = [one["options"].get("num_grow_ch") for one in (case, widest)]
    if share < 1 and grown[0] == grown[1] and grown[0] is not None:
        return f"{share}, growth fixed"
    return str(share)


def describe(condition: tuple[str, ...]) -> str:
    kind, device, torch, batch, clock, size, precision, backend, threads = condition
    how = f"{precision}, {backend}, {threads} thread(s), batch {batch}, {clock}, torch {torch}"
    return f"{BACKBONES[kind]}, input {size}, {device}, {how}"
