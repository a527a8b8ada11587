#!/usr/bin/env bash
# Set up an environment and run everything that checks this repository: ruff, mypy, pytest. Needs Python, pip and git only.
#
#   bash launch/test.sh                    all but the slow proofs
#   bash launch/test.sh --slow             only the slow proofs (minutes each)
#   bash launch/test.sh tests/test_X.py    anything else goes to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"
setup_venv test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # ranks and workers share the cores

selection="not slow"
spread=(--numprocesses 2 --dist loadfile)  # most tests wait for one process of their own
if [ "${1:-}" = "--slow" ]; then
    selection="slow"
    spread=()
    shift
fi

status=0
say "ruff"
python -m ruff check . || status=1
say "mypy"
python -m mypy || status=1
say "pytest"
python -m pytest -m "$selection" "${spread[@]}" "$@" || status=1
exit "$status"
