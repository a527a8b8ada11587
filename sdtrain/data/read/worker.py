"""A decoding process: `python -m sdtrain.data.read.worker`.

Started as a program of its own, not forked: it holds no torch, no CUDA context, no threads and none of the parent's
memory. Requests come on stdin (a JSON line, then int64 rows), pixels go to shared memory, answers are JSON lines on
stdout. It ends when stdin ends, so it never outlives the trainer; stop signals are left to the trainer.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from typing import BinaryIO

import numpy as np

from sdtrain.data.read.decoder import NUM_COLUMNS, Decoder
from sdtrain.data.read.images import hush
from sdtrain.errors import ShardChanged


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    setup = json.loads(requests.readline())
    memory = mmap.mmap(setup["fd"], setup["num_bytes"])
    buffer = np.frombuffer(memory, np.uint8)
    given = (setup[key] for key in ("shards", "sha256", "cache", "pad", "allow_pipe", "stamps"))
    decoder = Decoder(*given)
    while line := requests.readline():
        task = json.loads(line)
        rows = np.frombuffer(requests.read(task["num"] * NUM_COLUMNS * 8), np.int64).reshape(-1, NUM_COLUMNS)
        answer = {"ticket": task["ticket"], "first": task["first"]}
        try:
            answer["bad"] = decoder.run(rows, buffer)
        except ShardChanged as changed:
            answer["changed"] = str(changed)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    hush()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # stray prints of a library must not look like answers
    try:
        serve(sys.stdin.buffer, answers)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
