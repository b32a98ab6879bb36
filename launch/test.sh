#!/usr/bin/env bash
# Runs ruff, bash -n and mypy, then the tests, five files at a time. The tests that cause faults run before
# the others, next to mypy alone, because they depend on time. Arguments go to pytest, which then runs alone.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" ".[dev]"

ruff check .
ruff format --check .
mypy &
find . -name .venv -prune -o \( -name '*.sh' -o -name '*.sbatch' \) -print0 | xargs -0 -n 1 bash -n
some="not slow and not slurm and not browser"
python -m tests.stand_in >/dev/null || some="$some and not stand_in"
if (($#)); then wait "$!"; exec pytest -m "$some" "$@"; fi
pytest -m "$some" tests/test_faults.py
wait "$!"
pytest -m "$some" --ignore tests/test_faults.py -n 5 --dist loadfile
if ! without="$(python -m tests.stand_in)"; then
    echo "not run: tests/stand_in, which needs a stand-in for GPUs ($without)"
fi
