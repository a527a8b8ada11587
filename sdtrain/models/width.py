"""How a fraction C of a network's channels becomes whole numbers. No torch: plans and config errors use it alone."""

from __future__ import annotations

from fractions import Fraction

from sdtrain.errors import ConfigError


def fraction(C: float | int | str) -> Fraction:
    """Read C (0.25, "1/4", "0.25") as an exact fraction in (0, 1]; ConfigError otherwise."""
    try:
        value = Fraction(C).limit_denominator(4096) if not isinstance(C, str) else Fraction(C)
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        raise ConfigError(f"C = {C!r} is not a number; write a fraction such as 1/4 or 0.25") from None
    if not 0 < value <= 1:
        raise ConfigError(f"C = {C} lies outside (0, 1]; a student keeps a part of its teacher's channels, e.g. 1/2")
    return value


def narrowed(name: str, channels: int, C: float | int | str) -> int:
    """int(channels * C); ConfigError when no channel is left, naming the option and the narrowest C that works."""
    width = int(channels * fraction(C))
    if width < 1:
        raise ConfigError(
            f"C = {C} leaves {name} without channels ({channels} * {C} is less than 1); use C >= 1/{channels}"
        )
    return width
