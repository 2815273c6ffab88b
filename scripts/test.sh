#!/usr/bin/env bash
# Sets up .venv and runs the tests on what is installed there. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test dev
# In as many processes as there are cores, up to four; python_tests/conftest.py shares the tests out.
exec .venv/bin/pytest --numprocesses auto --maxprocesses 4 "$@"
