#!/bin/sh
# Makes $VENV and installs the versions pinned in $CONSTRAINTS. Says in one line what is missing from the system,
# and installs it where it may (root, apt-get). Called by the Makefile.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
CONSTRAINTS=${CONSTRAINTS:-constraints.txt}

fail() { echo "install: $1" >&2; exit 1; }

# need PACKAGE...: install system packages, or say how.
need() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "install: installing $* with apt-get" >&2
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null && return
    fi
    fail "missing from this system: $*; install with: sudo apt-get install $*"
}

[ -f "$CONSTRAINTS" ] ||
    fail "there is no file $CONSTRAINTS; CONSTRAINTS is one of: $(echo constraints*.txt)"

if [ "${1:-}" = --freeze ]; then
    {
        sed -n '/^#/p' "$CONSTRAINTS"
        # A CUDA build of torch pins its NVIDIA libraries itself.
        "$VENV/bin/python" -m pip freeze --exclude-editable |
            sed -e 's/^\(torch==[0-9.]*\).*/\1/' -e '/^nvidia-ml-py==/b' -e '/^nvidia-/d' -e '/^cuda-/d'
    } > constraints.new
    mv constraints.new "$CONSTRAINTS"
    exit
fi

command -v "$PYTHON" >/dev/null || need python3 python3-venv
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or later is needed, and $PYTHON is $("$PYTHON" -V 2>&1); name another with: make PYTHON=python3.12"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || need python3-venv

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || fail "cannot make $VENV with $PYTHON -m venv"
echo "install: installing the versions of $CONSTRAINTS into $VENV (a minute or two)" >&2
"$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-warn-conflicts -c "$CONSTRAINTS" -e '.[dev]' ||
    fail "pip could not install the pinned versions (its message is above); is a package registry reachable?"
"$VENV/bin/python" -c 'import torch' || need libstdc++6 libgomp1
# Only the PDF needs Pango: without it everything else works, and `report build` says what is missing.
"$VENV/bin/python" -c 'import weasyprint' 2>/dev/null ||
    (need libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0) || echo "install: continuing without PDF output" >&2
