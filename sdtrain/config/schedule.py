"""Numbers that change with images seen: learning rates, betas, penalty weights, probabilities, half-lives. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

POWERS = {None: 1, "k": 1_000, "M": 1_000_000}  # by the letter of a match, which may have none
AMOUNT = r"(\d+(?:\.\d+)?)"
POSITION = re.compile(rf"{AMOUNT}(%|(?:([kM])(?:i|img)?))?")


def parse_position(value: Any) -> Any:
    """A place on the clock as text: images ('0', '20Mi') or a share of the stage ('70%').

    Raises ValueError for anything else.
    """
    text = str(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""
    if POSITION.fullmatch(text) is None:
        raise ValueError("write images, such as 0 or 20Mi, or a share of the stage, such as 70%")
    return text


Position = Annotated[str, BeforeValidator(parse_position)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number that changes with the clock."""

    points: tuple[tuple[Position, float], ...]
    """Pairs of position and value in order; a position is images (20Mi) or a share of the stage (70%)."""
    curve: Literal["linear", "cosine", "steps"] = "linear"
    """Between two points: a straight line, half a cosine, or the earlier value. Outside of them: the nearest value."""


Scheduled = float | Schedule
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 - 0.5 * math.cos(math.pi * share),
    "steps": lambda share: 0.0,
}


def value_at(value: Scheduled, seen_img: int, stage_img: tuple[int, int] = (0, 0)) -> float:
    """The value after `seen_img` images, in a stage from `stage_img[0]` to `stage_img[1]`; a number stays itself."""
    if not isinstance(value, Schedule):
        return value
    known = [(position_img(place, stage_img), number) for place, number in value.points]
    before = [point for point in known if point[0] <= seen_img]
    if not before or len(before) == len(known):
        return (before[-1] if before else known[0])[1]
    (start, old), (end, new) = before[-1], known[len(before)]
    return old + CURVES[value.curve]((seen_img - start) / (end - start)) * (new - old)


def position_img(place: str, stage_img: tuple[int, int]) -> float:
    """Images from the start of the run at a position."""
    match = POSITION.fullmatch(place)
    assert match is not None  # the type Position lets nothing else through
    if match[2] == "%":
        return stage_img[0] + float(match[1]) / 100 * (stage_img[1] - stage_img[0])
    return float(match[1]) * POWERS[match[3]]


def out_of_order(value: Schedule) -> bool:
    """Whether the points of a schedule do not rise, or mix images and shares, or there are none."""
    places = [position_img(place, (0, 100)) for place, _ in value.points]
    units = {place.endswith("%") for place, _ in value.points if place not in ("0", "0%")}
    return not places or places != sorted(set(places)) or len(units) > 1
