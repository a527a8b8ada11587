"""What a class of inputs is: something that makes one from a seed, and something that reads it as a command does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple


class Inputs(NamedTuple):
    """One class of inputs and its reader."""

    make: Callable[[Random, Path], Path]
    """Writes one input into an empty folder and returns the path that is read; a function of the seed alone."""
    use: Callable[[Path], object]
    """Reads it as users do. Right are: any answer, or a UserError; wrong: any other exception, a signal, a limit."""
    seconds: float = 10.0
    """The most that one input may take."""
    memory_mb: int = 512
    """The most that reading one input may add to the memory of the process."""
