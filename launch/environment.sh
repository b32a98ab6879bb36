# Sourced by the other scripts in this folder, with what pip should install: "." or ".[dev]". Changes to
# the repository root, creates and fills .venv if needed, and puts it on the PATH.
# PYTHON names the interpreter of a new .venv.
# shellcheck shell=bash

give_up() {
    echo "error: $1" >&2
    exit 69 # EX_UNAVAILABLE
}

make_venv() {
    local python="${PYTHON:-python3}" version
    local fix="install Python 3.11 or newer, or name it: PYTHON=/path/to/python3 bash $0"
    command -v "$python" >/dev/null || give_up "there is no '$python' on the PATH; $fix"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ||
        give_up "'$python' does not start; $fix"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        give_up "'$python' is Python $version, which is too old; $fix"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        give_up "Python $version has no venv module; on Debian: apt install python$version-venv"
    "$python" -m venv --clear .venv ||
        give_up "can't create .venv (reason above); fix that and run again"
}

install() {
    echo "installing into .venv: a few minutes and about 6 GB on the first run"
    trap 'exit 130' INT # pip answers Ctrl-C with an ordinary failure
    echo "$1" >.venv/installing
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable "$2" || {
        rm .venv/installing
        give_up "pip can't install the packages (reason above); fix that and run again"
    }
    mv .venv/installing .venv/installed
    trap - INT
}

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit
# pip prints its folder, which is another one if .venv is incomplete, was moved or has lost its Python.
runs_from="$(.venv/bin/pip --version 2>/dev/null || true)"
# The file "installing" remains if an installation was killed.
if [[ -e .venv/installing || "$runs_from" != *" from $(pwd -P)/.venv/"* ]]; then
    make_venv
fi
# What to install comes last in the key, so that an installation for ".[dev]" also counts as one for ".".
key="$(cat pyproject.toml constraints.txt | cksum) $1"
[[ "$(cat .venv/installed 2>/dev/null)" == "$key"* ]] || install "$key" "$1"
export PATH="$PWD/.venv/bin:$PATH"
