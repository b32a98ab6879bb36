#!/usr/bin/env bash
# Lint, types, syntax of the shell scripts, then the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" ".[dev]"

ruff check .
ruff format --check .
mypy
find . -name .venv -prune -o \( -name '*.sh' -o -name '*.sbatch' \) -print0 | xargs -0 -n 1 bash -n
pytest -m "not slow and not slurm and not browser" "$@"
