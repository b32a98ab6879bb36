#!/usr/bin/env bash
# The tests of slurm/ on a real cluster that they boot in network namespaces of their own. Root on
# Debian: what is missing of Slurm is installed. Arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../launch/environment.sh" ".[dev]"
pytest -m slurm tests/slurm "$@"
