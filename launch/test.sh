#!/usr/bin/env bash
# Lint, types, syntax of the shell scripts, then the tests: two files at a time, and those that plant
# faults, which keep to a time, alone. Arguments go to pytest, one file at a time.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" ".[dev]"

ruff check .
ruff format --check .
mypy
find . -name .venv -prune -o \( -name '*.sh' -o -name '*.sbatch' \) -print0 | xargs -0 -n 1 bash -n
some="not slow and not slurm and not browser"
if (($#)); then exec pytest -m "$some" "$@"; fi
pytest -m "$some" tests/test_faults.py
pytest -m "$some" --ignore tests/test_faults.py -n 2 --dist loadfile
