#!/bin/sh
# Sets itself up (see training/venv.py), then checks the style and runs the tests; arguments go to pytest:
#
#   tests/run.sh
#   tests/run.sh -m slow -k launcher
set -eu
cd -- "$(dirname -- "$0")/.."
python=$("${PYTHON:-python3}" training/venv.py requirements.txt tests/requirements.txt)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # many small processes share the cores
"$python" -m ruff check
"$python" -m ruff format --check
exec "$python" -m pytest -n 2 "$@"
