#!/usr/bin/env bash
# Sets up .venv and runs the tests on what is installed there. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test dev
exec .venv/bin/pytest "$@"
