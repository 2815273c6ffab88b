#!/usr/bin/env bash
# Installs diffcore and its pinned dependencies into .venv, or again after a change of the sources.
#
#   scripts/setup.sh [EXTRA...]      extras of pyproject.toml, such as: test dev
#
# PYTHON names the interpreter to make .venv with (default python3, 3.10 or newer). A torch that is
# already in .venv stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv/bin/python
stamp=.venv/diffcore-installed
python=${PYTHON:-python3}
extras=$(IFS=,; echo "$*")

fail() {
  echo "setup: $*" >&2
  exit 1
}

# Nothing to do if these extras are installed and no source is newer.
sources=(csrc diffcore CMakeLists.txt pyproject.toml constraints.txt)
if [[ -e $stamp && $(<"$stamp") == "$extras" ]] &&
  [[ -z $(find "${sources[@]}" -newer "$stamp" -type f ! -name '*.pyc' ! -name '*.so' -print -quit) ]]; then
  exit 0
fi

if [[ ! -x $venv ]]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "needs Python 3.10 or newer; set PYTHON to one (tried: $python)"
  "$python" -m venv .venv || fail "no venv module (Debian, Ubuntu: apt install python3-venv)"
fi
command -v c++ g++ clang++ >/dev/null || fail "needs a C++17 compiler (GCC or Clang)"

pip() { "$venv" -m pip --disable-pip-version-check "$@"; }

# On Linux the default torch wheel carries CUDA, gigabytes of it: take the CPU build where there is
# one, first from where pip looks anyway. For another build, install torch into .venv beforehand.
if ! "$venv" -c 'import torch' 2>/dev/null; then
  torch=$(grep '^torch==' constraints.txt)
  echo "setup: installing $torch"
  pip install --quiet -c constraints.txt "$torch+cpu" 2>/dev/null ||
    pip install --quiet --retries 1 --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch" ||
    pip install --quiet -c constraints.txt "$torch"
fi

echo "setup: building diffcore and installing its dependencies (some minutes the first time)"
grep -v '^torch==' constraints.txt >.venv/constraints.txt
pip install --quiet -c .venv/constraints.txt ".${extras:+[$extras]}"
echo "$extras" >"$stamp"
(cd .venv && bin/python -c 'import diffcore; print(diffcore.show_config())')
