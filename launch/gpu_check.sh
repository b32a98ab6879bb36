#!/usr/bin/env bash
# The first minutes on a new GPU machine: does a GPU train as the CPU does, and how fast?
#   bash launch/gpu_check.sh [FILE]        # under 8 minutes; all figures go to FILE (gpu_check.json)
# Exits with status 1 if a comparison fails. GPU_CHECK_PYTHON names a Python with the packages; without it
# .venv is created. GPU_CHECK_ONLY=TEXT runs the checks whose names contain TEXT.
set -euo pipefail
file="$(realpath -- "${1:-gpu_check.json}")"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
[[ "${GPU_CHECK_PYTHON:-}" ]] || source launch/environment.sh "."
# Also where the package is not installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${GPU_CHECK_PYTHON:-python}" launch/gpu_check.py "$file"
