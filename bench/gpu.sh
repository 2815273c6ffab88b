#!/usr/bin/env bash
# Everything there is to do on a machine with a GPU, in one command of less than ten minutes,
# offline: builds the kernels, tests them on the GPU, looks for bad memory accesses and races, and
# times every op against eager PyTorch, torch.compile and a captured CUDA graph. Ends with a table
# and with a JSON file in bench/results.
#
#   bench/gpu.sh              needs torch and triton for CUDA, nvcc, cmake, pybind11 and pytest
#   bench/gpu.sh --dry-run    the same without a GPU, on tiny sizes: shows that it works, no numbers
#   bench/gpu.sh --no-tests   builds and times only
#
# PYTHON names the interpreter (default: python3). Each part's output goes to build/gpu/*.log too.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python=${PYTHON:-python3}
out=build/gpu
dry_run="" tests=1 report_limit=240
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --no-tests) tests="" ;;
    *)
      sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
done
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

fail() {
  echo "gpu.sh: $*" >&2
  exit 1
}

# A part's name, its limit in seconds and its command; goes on after a failure, which the end
# reports. All parts together end within ten minutes, of which `reserved` seconds are for later parts;
# one for which less than 20 s are left is skipped.
failed=()
reserved=$report_limit
part() {
  local name=$1 limit=$2 left=$((590 - reserved - SECONDS)) started=$SECONDS status
  shift 2
  if ((left < 20)); then
    echo "gpu.sh: $name is skipped: too little time is left" >&2
    failed+=("$name (skipped)")
    return 1
  fi
  ((limit > left)) && limit=$left
  echo
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/${name// /-}.log"
  status=${PIPESTATUS[0]}
  ((status == 124 || status == 137)) && echo "gpu.sh: $name took longer than $limit s" >&2
  ((status)) && failed+=("$name")
  echo "== $name: $((SECONDS - started)) s, $( ((status)) && echo "exit status $status" || echo ok)"
  return "$status"
}

"$python" -c 'import torch' || fail "$python has no torch; PYTHON names another interpreter"
if [[ -z $dry_run ]]; then
  "$python" -c '
import sys, torch
if not torch.cuda.is_available():
    built = torch.version.cuda or torch.version.hip or "the CPU alone"
    sys.exit(f"torch {torch.__version__} (built for {built}) sees no GPU")
major, minor = torch.cuda.get_device_capability()
capability = f"compute capability {major}.{minor}"
print(torch.cuda.get_device_name(), capability, "torch", torch.__version__)
if major < 8:
    sys.exit("the kernels need compute capability 8.0 or newer")
' || fail "nothing to do here; bench/gpu.sh --dry-run shows that all of it works"
fi

# -- build -----------------------------------------------------------------------------------------

build() {
  local generator=() cuda=() cmake=cmake
  command -v cmake >/dev/null || cmake="$python -m cmake"
  command -v ninja >/dev/null && generator=(-G Ninja)
  if [[ -n $dry_run ]]; then
    cuda=(-DDIFFCORE_CUDA=off)
  else # this GPU's machine code alone: minutes less
    cuda=(-DDIFFCORE_CUDA=on "-DCMAKE_CUDA_ARCHITECTURES=$("$python" -c '
import torch
print("%d%d-real" % torch.cuda.get_device_capability())')")
  fi
  # shellcheck disable=SC2086
  $cmake -S . -B "$out/build" "${generator[@]}" "${cuda[@]}" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    $cmake --build "$out/build" --parallel &&
    find "$out/build" -name '_c*.so' -exec install {} diffcore/ \;
}
export -f build
export python out dry_run
part build 280 bash -c build || fail "the kernels weren't built"
"$python" -c 'import diffcore; print(diffcore.show_config())' || fail "diffcore can't be imported"

# -- test ------------------------------------------------------------------------------------------

if [[ -n $tests ]]; then
  pytest=("$python" -m pytest -q --maxfail=20 -p no:cacheprovider)
  if [[ -z $dry_run ]]; then
    export DIFFCORE_TEST_DEVICE=cuda
    # Not the tests of the CPU that plays a GPU, and of compiling for others.
    part tests 150 "${pytest[@]}" python_tests/gpu --ignore=python_tests/gpu/test_cuda_emulator.py \
      --ignore=python_tests/gpu/test_triton_compile.py --ignore=python_tests/gpu/test_no_waiting.py \
      --ignore=python_tests/gpu/test_triton_configurations.py
    if command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck synccheck; do
        part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
          "$python" bench/gpu_report.py --small-calls
      done
    else
      echo "gpu.sh: compute-sanitizer isn't installed: no search for bad accesses and races" >&2
    fi
  else
    part tests 300 "${pytest[@]}" python_tests/gpu/test_cuda_rff.py
  fi
fi

# -- time ------------------------------------------------------------------------------------------

reserved=0
part report "$report_limit" env ${dry_run:+TRITON_INTERPRET=1} "$python" bench/gpu_report.py ${dry_run:+--dry-run}

echo
((${#failed[@]})) && fail "failed: ${failed[*]}"
echo "gpu.sh: all done in $SECONDS s"
