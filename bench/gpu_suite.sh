#!/usr/bin/env bash
# Proves a build on a GPU: builds, runs the contract on the device, sanitises a slice of it, measures. Needs CUDA 13,
# torch 2.11 or newer for CUDA, CMake and ninja, and no network; what else is missing comes from the folder that
# bench/pack_gpu_suite.py makes.
#
#   bench/gpu_suite.sh [build] [test] [sanitize] [bench] [experts] [train]     all six without arguments
#   QUICK=1            few shapes in the benches
#   PACK=folder        what to use beside what is installed (default: gpu_pack, where it exists)
#   OUT=folder         where the JSON and logs go (default: build/gpu_suite)
#   ARCHS=90a-real     what to build for
#   MOEKERNELS_CUTLASS=1  also CUTLASS's grouped GEMM, held to the contract and measured beside ours
#
# The exit code is 0 where every section went well, 1 where one failed, 2 where no GPU was there to prove anything on.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
PACK=${PACK:-gpu_pack}
OUT=${OUT:-build/gpu_suite}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
export OUT
all="build test sanitize bench experts train"
sections=" ${*:-$all} "
for name in $sections; do
  [[ " $all " == *" $name "* ]] || { echo "gpu_suite: no section is called $name; give some of: $all" >&2; exit 2; }
done
failed=0

if [ -d "$PACK" ] && [ ! -d build/gpu_site ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/gpu_site "$PACK"/*.whl ||
    exit 1
  for archive in "$PACK"/*.tar.xz; do
    [ ! -e "$archive" ] || tar -xJf "$archive" -C build/gpu_site || exit 1
  done
fi
export PYTHONPATH=$PWD:$PWD/build/gpu_site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1

no_gpu=$("$PYTHON" -c '
import torch
if not torch.cuda.is_available():
    print(f"torch {torch.__version__} sees no GPU" if torch.version.cuda else f"torch {torch.__version__} is a CPU build")
' 2>&1)

section() { # name, time limit in seconds, function
  local name=$1 limit=$2 begin=$SECONDS rc
  [[ $sections == *" $name "* ]] || return 0
  echo "== $name"
  if [ "$name" != build ] && [ -n "$no_gpu" ]; then
    echo "not run: $no_gpu" | tee "$OUT/$name.log"
    echo "$name rc=77 seconds=0" >>"$OUT/sections.txt"
    failed=2
    return 0
  fi
  timeout "$limit" bash -c "$3" 2>&1 | tee "$OUT/$name.log"
  rc=${PIPESTATUS[0]}
  echo "$name rc=$rc seconds=$((SECONDS - begin))" >>"$OUT/sections.txt"
  [ "$rc" = 0 ] || [ "$failed" = 2 ] || failed=1
}

build() {
  MOEKERNELS_CUDA=1 MOEKERNELS_EMULATED=1 MOEKERNELS_CUDA_ARCHS=${ARCHS:-90a-real} \
    "$PYTHON" setup.py -q build_ext --inplace
}

run_tests() {
  "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$OUT/tests.xml" python_tests/test_cuda_device.py \
    python_tests/test_cutlass.py
}

# One slice of the cases under each tool: the emulator has seen the others.
sanitize() {
  local sanitizer tool
  sanitizer=$(command -v compute-sanitizer) || sanitizer=/usr/local/cuda/bin/compute-sanitizer
  [ -x "$sanitizer" ] || { echo "compute-sanitizer is not installed here"; return 0; }
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -x -m gpu -p no:cacheprovider python_tests/test_cuda_device.py \
      -k "test_values_and_gradients and (ordinary or segments or groups-bias or weight)" || return 1
  done
}

bench() { "$PYTHON" bench/bench_cuda.py ${QUICK:+--quick} --json "$OUT/bench.json"; }
experts() { "$PYTHON" bench/bench_cuda_experts.py ${QUICK:+--quick} --json "$OUT/experts.json"; }
train() { "$PYTHON" bench/gpu_train.py "$OUT"; }
export -f build run_tests sanitize bench experts train

: >"$OUT/sections.txt"
rm -f "$OUT"/{bench,experts,train,gpu_suite}.json "$OUT/tests.xml" # what an earlier run left proves nothing of this one
section build 240 build
section test 240 run_tests
section sanitize 180 sanitize
section bench 240 bench
section experts 300 experts
section train 240 train
"$PYTHON" bench/gpu_report.py "$OUT" || failed=1
exit $failed
