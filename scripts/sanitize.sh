#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the op tests on
# them, or what is given as arguments to pytest. Needs GCC, whose runtime libraries are loaded into Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh test dev

package=build/sanitize/package
.venv/bin/python -m pip install --quiet -c constraints.txt cmake ninja pybind11
.venv/bin/cmake -S . -B build/sanitize -G Ninja -DCMAKE_CXX_COMPILER=g++ \
  -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DPython_EXECUTABLE="$PWD/.venv/bin/python" \
  -Dpybind11_DIR="$(.venv/bin/python -m pybind11 --cmakedir)" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS="-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover"
.venv/bin/cmake --build build/sanitize
mkdir -p "$package"
rm -rf "$package/diffcore"
cp -r diffcore "$package"
cp build/sanitize/_core*.so "$package/diffcore"

# Python itself leaks at exit by design; torch.compile and child processes don't mix with a preload.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$PWD/$package
exec .venv/bin/pytest -k "not compile and not process" "${@:-python_tests/ops}"
