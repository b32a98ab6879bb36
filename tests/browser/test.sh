#!/usr/bin/env bash
# The report's page in a real browser, Chromium, which is installed where it is missing (root,
# Debian). Arguments go to pytest.
set -euo pipefail
if ! command -v chromium >/dev/null; then
    apt-get update --quiet
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium
fi
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../launch/environment.sh" ".[dev]"
pytest -m browser tests/browser "$@"
