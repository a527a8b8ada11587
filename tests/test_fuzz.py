"""Damaged and hostile files end in an answer or in one sentence. Without this a file from a stranger could end a
command in a traceback, keep it busy for ever, take the memory of the machine, or run something.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from conftest import run_python
from fuzz.harness import Inputs, run_class

from sdtrain.errors import ConfigError

LINE = re.compile(r"^(.+?) +(\d+) +(\d+) +(\d+) +([\d.]+) +(\d+)$", re.MULTILINE)


def fuzz(*words: str, timeout: float = 600) -> dict[str, tuple[int, int, int]]:
    """(tried, held, failed) of every class; each failure is part of the message of a failing test."""
    done = run_python("tests/fuzz", *words, timeout=timeout)
    table = {found[1]: (int(found[2]), int(found[3]), int(found[4])) for found in LINE.finditer(done.stdout)}
    assert done.returncode == 0, done.stdout + done.stderr
    return table


def test_a_few_hundred_inputs_of_all_classes_end_in_an_answer_or_a_sentence() -> None:
    table = fuzz("--seed", "0", "--count", "300")
    assert table["all"][0] >= 300
    assert all(tried == held for tried, held, _ in table.values())


@pytest.mark.slow
def test_thousands_of_inputs_of_all_classes_end_in_an_answer_or_a_sentence() -> None:
    assert fuzz("--seed", "1", "--count", "6000", timeout=7200)["all"][2] == 0


# The runner itself


def number(chance: Random, folder: Path) -> Path:
    path = folder / "number"
    path.write_text(str(chance.random()))
    return path


def failing(use: Callable[[Path], object], count: int = 3, **limits: float) -> dict[int, str]:
    """What the runner says of a reader that misbehaves on the second of its inputs."""
    second = str(Random("0 bad 1").random())

    def reader(path: Path) -> None:
        if path.read_text() == second:
            use(path)

    result = run_class("bad", Inputs(number, reader, **limits), range(count), seed=0)  # type: ignore[arg-type]
    assert result.tried == count
    return result.failed


def refuse(path: Path) -> None:
    raise ConfigError(f"{path} is refused; give another")


def raise_key_error(path: Path) -> None:
    _ = {}["files"]  # type: ignore[var-annotated]


def compute(path: Path) -> None:
    while True:
        pass


def keep_memory(path: Path) -> None:
    with mmap.mmap(-1, 1 << 30) as memory:  # never what the allocator has left from earlier tests
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1


def write_beside(path: Path) -> None:
    Path("canary").touch()


def start_a_shell(path: Path) -> None:
    try:
        subprocess.run("true", shell=True)
    except OSError:
        pass  # however quietly


def connect(path: Path) -> None:
    socket.create_connection(("example.org", 80), timeout=1)


BAD = {
    "KeyError: 'files'": (raise_key_error, {}),
    "more than 0.5 s of computing": (compute, {"seconds": 0.5}),
    "no answer within 0.6 s": (lambda path: time.sleep(60), {"seconds": 0.1}),
    "memory grew by 10": (keep_memory, {"memory_mb": 800}),
    "memory grows by more than 400 MB": (lambda path: [b"x" * (1 << 24) for _ in range(10_000)], {"memory_mb": 200}),
    "ended by SIGSEGV": (lambda path: ctypes.string_at(0), {}),
    "ended with code 0": (lambda path: os._exit(0), {}),
    "exit 1": (lambda path: exit(1), {}),
    "a UserError of 100": (lambda path: refuse(path / ("x" * 100_000)), {}),
    "outside its folder": (write_beside, {}),
    "the canary was removed": (lambda path: Path("../canary").unlink(), {}),
    "reached for a shell": (start_a_shell, {}),
    "reached for the address of example.org": (connect, {}),
}


@pytest.mark.parametrize("said", BAD)
def test_a_reader_that_misbehaves_is_reported_with_the_number_of_its_input(said: str) -> None:
    use, limits = BAD[said]
    found = failing(use, **limits)
    assert list(found) == [1] and said in found[1], found


def test_a_reader_that_answers_or_refuses_holds() -> None:
    assert failing(refuse) == {} and failing(lambda path: None) == {}


def test_the_same_seed_makes_the_same_inputs_and_a_failing_one_is_kept(tmp_path: Path) -> None:
    run_class("bad", Inputs(number, raise_key_error), range(2), seed=0, keep=tmp_path)
    kept = [(tmp_path / f"bad-{n}" / "number").read_text() for n in range(2)]
    assert kept == [str(Random(f"0 bad {n}").random()) for n in range(2)]
