#!/usr/bin/env bash
# Lint and tests, a file at a time on every core; arguments go to pytest.
#   bash launch/test.sh [PYTEST ARGUMENTS]       PYTHON=python3.13 bash launch/test.sh
# On Linux the torch of the tests comes with CUDA unless pip is told of its CPU builds:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv test
python -m ruff check .
exec python -m pytest -n auto --maxprocesses=8 --dist loadfile "$@"
