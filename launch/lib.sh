# Sourced by the set-up scripts: one virtual environment, made once and reused until pyproject.toml changes.
#
#   .venv/                  the environment (or the folder named by SDTRAIN_VENV)
#   .venv/installed-EXTRA   written last: digest of pyproject.toml and the Python that EXTRA was installed with

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${SDTRAIN_VENV:-$ROOT/.venv}"

say() { printf '== %s\n' "$*"; }

fail() { printf 'sdtrain: %s\n' "$*" >&2; exit 2; }

# The first Python that is new enough; PYTHON names one of your own.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer with venv was found (tried ${PYTHON:-python3, python3.10 to 3.13}): install one, or name one by PYTHON=/path/to/python"
}

# setup_venv EXTRA: leaves $VENV with sdtrain and the extra installed, and its bin first on PATH.
setup_venv() {
    local extra="$1" python wanted stamp
    python="$(find_python)" || exit 2
    stamp="$VENV/installed-$extra"
    wanted="$(cat "$ROOT/pyproject.toml" <("$python" -V) | cksum) $ROOT"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing sdtrain[$extra] into $VENV (minutes, once)"
        [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV" || fail "python -m venv $VENV failed: see above"
        # no bytecode beforehand: it doubles the time, and most of these modules are never imported
        "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input --prefer-binary --no-compile \
            --editable "$ROOT[$extra]" || fail "pip could not install the packages: see above; run the command again to continue"
        printf '%s\n' "$wanted" > "$stamp"
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    unset PYTHONPATH PYTHONHOME
}
