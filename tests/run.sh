#!/usr/bin/env bash
# Sets itself up (see common/environment.sh), then lints and tests; arguments go to pytest:
#   tests/run.sh
#   tests/run.sh -m slow -k launcher
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../common/environment.sh"

cd -- "$root"
thorough=yes environment requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # many small processes share the cores
"$python" -m ruff check
exec "$python" -m pytest -n 2 "$@"
