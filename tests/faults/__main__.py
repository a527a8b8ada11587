"""Reproduce the faults that a run has to survive, and print what was seen.

    python tests/faults                       all of them, slow proofs too, as the table of sdtrain/README.md
    python tests/faults --only 3,22           some
    python tests/faults --write               put what was seen into that table

Each row is a fault in real processes, the outcome that its tests demand, how long the slowest job lasted after it was
struck (time to save included; "-" where nothing runs on), and how long the tests took.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fault_table import FAULTS, Fault, row

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "sdtrain" / "README.md"


def reproduced(fault: Fault) -> str:
    """Run the tests of a fault; its row of the table."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seconds = Path(folder) / "seconds"
        env = {**os.environ, "FAULT_SECONDS": str(seconds), "OMP_NUM_THREADS": "1"}
        tests = [f"tests/{test}" for test in fault.tests]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *tests]
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
        lasted = [float(line) for line in seconds.read_text().split()] if seconds.exists() else []
    summary = re.findall(r"(\d+ (?:passed|failed|skipped|errors?))", done.stdout)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    ended = f"{max(lasted):.0f} s" if lasted else "-"
    return row(fault, ended, f"{', '.join(summary)} in {time.monotonic() - began:.0f} s")


def rewritten(page: str, rows: dict[int, str]) -> str:
    """The page with these rows in the place of those that it has."""
    lines = []
    for line in page.splitlines():
        number = re.match(r"\| (\d+) \|", line)
        lines.append(rows.get(int(number[1]), line) if number else line)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="N,N", help="numbers of faults")
    parser.add_argument("--write", action="store_true", help="put the rows into sdtrain/README.md")
    args = parser.parse_args()
    wanted = {int(number) for number in args.only.split(",") if number}
    rows = {}
    for fault in FAULTS:
        if not wanted or fault.number in wanted:
            rows[fault.number] = reproduced(fault)
            print(rows[fault.number], flush=True)
            if args.write:
                PAGE.write_text(rewritten(PAGE.read_text(), rows))
    return int(any(" failed" in line or " error" in line for line in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
