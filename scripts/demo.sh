#!/usr/bin/env bash
# Sets up .venv, trains DIPO on Pendulum-v1 for a few minutes, and times a training step against the
# same step in eager PyTorch. Arguments go to `diffcore train`, such as: --total-steps 10000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

run=runs/demo-$(date +%Y%m%d-%H%M%S)
echo
echo "== DIPO on Pendulum-v1: returns start near -1200, a good policy reaches -150 =="
.venv/bin/diffcore train dipo --env Pendulum-v1 --diffusion-steps 20 --start-steps 1000 \
  --total-steps 5000 --eval-interval 1000 --log-interval 500 --run-dir "$run" "$@"
.venv/bin/diffcore plot "$run"

echo
echo "== One training step of this run, beside the same step in eager PyTorch =="
.venv/bin/python bench --only dipo_step --env Pendulum-v1 --steps 20 --seconds 10 --brief --no-compile \
  --no-save
