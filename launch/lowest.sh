#!/usr/bin/env bash
# Make an environment with the LOWEST versions that pyproject.toml allows and run the tests of trust in it. Minutes.
#
#   bash launch/lowest.sh                    in .venv-lowest (or the folder named by SDTRAIN_VENV), which stays
#   bash launch/lowest.sh tests/test_X.py    other tests
set -euo pipefail
SDTRAIN_VENV="${SDTRAIN_VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-lowest}"
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

# One line `name==version` for every bound of pyproject.toml that holds for this Python.
lowest() {
    "$(find_python)" - <<'PYTHON'
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
from pip._vendor.packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
    wanted = Requirement(line)
    bounds = [part.version for part in wanted.specifier if part.operator == ">="]
    if bounds and (wanted.marker is None or wanted.marker.evaluate()):
        print(f"{wanted.name}=={bounds[0]}")
PYTHON
}

pins="$(mktemp)"
trap 'rm -f "$pins"' EXIT
lowest > "$pins"
export PIP_CONSTRAINT="$pins"
setup_venv test
unset PIP_CONSTRAINT
say "the lowest versions"
paste -sd ' ' "$pins"

if [ $# = 0 ]; then
    set -- tests/test_{trust,permissions,files,safe_pickle,import_export,weights,verify,pack_failures,config_files,report}.py
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
say "pytest"
python -m pytest -q -m "not slow" "$@"
