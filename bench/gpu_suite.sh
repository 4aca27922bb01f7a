#!/usr/bin/env bash
# Proves and measures a build on a GPU, in sections that bench/PLAN.md puts into calls of ten minutes.
# Needs torch 2.11 or newer for CUDA and numpy; `test` also pytest and hypothesis; no network. Where the
# library is not built here, it comes from the folder that bench/pack_gpu_suite.py makes.
#
#   bench/gpu_suite.sh SECTION ...
#     ladder     every part by itself, from the driver up: what is wrong, and where to look
#     calibrate  what this card gives: tensor cores, L2, device memory, latencies, cuBLAS
#     trace      cycles of the parts of a tile against the prediction
#     tune       settings of the products, checked and timed; writes rows of gemm_tuned.h
#     test       the contract on the device          sanitize   a slice of it under compute-sanitizer
#     bench      the routing ops                     experts    the products and the layer beside peers
#     train      training steps on CPU and GPU       build      compile here (minutes)
#   QUICK=1            few shapes in the benches and the tuner
#   PACK=folder        what to use beside what is installed (default: gpu_pack, where it exists)
#   OUT=folder         where JSON and logs go, line by line (default: build/gpu_suite)
#   ARCHS=90a-real     what `build` builds for
#   MOEKERNELS_CUTLASS=1  also CUTLASS's grouped GEMM, held to the contract and measured beside ours
#
# The exit code is 0 where every section went well, 1 where one failed, 2 where no GPU was there to prove anything on.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
export PACK=${PACK:-gpu_pack}
OUT=${OUT:-build/gpu_suite}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
export OUT
all="build ladder calibrate trace tune test sanitize bench experts train"
[ $# -gt 0 ] || { echo "gpu_suite: give sections, in the order of bench/PLAN.md: $all" >&2; exit 2; }
for name in "$@"; do
  [[ " $all " == *" $name "* ]] || { echo "gpu_suite: no section is called $name; give some of: $all" >&2; exit 2; }
done
failed=0

if [ -f "$PACK/built.tar.xz" ]; then
  echo "gpu_suite: moekernels/*.so are those of $PACK/built.tar.xz"
  tar -xJf "$PACK/built.tar.xz" || exit 1
fi
if [ ! -d build/gpu_site ] && compgen -G "$PACK/*.whl" >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/gpu_site "$PACK"/*.whl ||
    exit 1
fi
if [ -f "$PACK/sonic.tar.xz" ] && [ ! -f build/gpu_site/.sonic ]; then
  mkdir -p build/gpu_site && tar -xJf "$PACK/sonic.tar.xz" -C build/gpu_site && touch build/gpu_site/.sonic || exit 1
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
  "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$OUT/tests.xml" python_tests/cuda/test_cuda_*.py \
    python_tests/cuda/test_cutlass.py
}

# One slice of the cases under each tool: the emulator has seen the others.
sanitize() {
  local sanitizer tool
  sanitizer=$(command -v compute-sanitizer) || sanitizer=/usr/local/cuda/bin/compute-sanitizer
  [ -x "$sanitizer" ] || { echo "compute-sanitizer is not installed here"; return 1; }
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -x -m gpu -p no:cacheprovider python_tests/cuda/test_cuda_device.py \
      -k "test_values_and_gradients and (ordinary or segments or groups-bias or weight)" || return 1
  done
}

ladder() { "$PYTHON" bench/ladder/climb.py --pack "$PACK" --out "$OUT/ladder.jsonl"; }
calibrate() { "$PYTHON" bench/calibrate.py --pack "$PACK" --out "$OUT/calibrate.jsonl"; }
trace() { MOEKERNELS_LIBRARY=$PWD/moekernels/_C_trace.so "$PYTHON" bench/trace_tiles.py --out "$OUT/trace.jsonl"; }
tune() { "$PYTHON" bench/tune.py ${QUICK:+--quick} --out "$OUT/tune.jsonl" --rows "$OUT/gemm_tuned_rows.txt"; }
bench() { "$PYTHON" bench/bench_cuda.py ${QUICK:+--quick} --json "$OUT/bench.json"; }
experts() { # DeepGEMM compiles when it is called
  command -v nvcc >/dev/null || export DG_JIT_USE_NVRTC=1
  "$PYTHON" bench/bench_cuda_experts.py ${QUICK:+--quick} --json "$OUT/experts.json"
}
train() { "$PYTHON" bench/gpu_train.py "$OUT"; }
export -f build run_tests sanitize ladder calibrate trace tune bench experts train

: >"$OUT/sections.txt"
rm -f "$OUT"/{bench,experts,train,gpu_suite}.json "$OUT/tests.xml" "$OUT"/*.jsonl # what an earlier run left proves nothing
monitor=
if [ -z "$no_gpu" ] && command -v nvidia-smi >/dev/null; then # clocks and power beside everything
  nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active \
    --format=csv,noheader,nounits -lms 100 >"$OUT/clocks.csv" 2>/dev/null &
  monitor=$!
fi
declare -A limits=([build]=240 [ladder]=240 [calibrate]=60 [trace]=60 [tune]=220 [test]=240 [sanitize]=120 [bench]=120
  [experts]=300 [train]=120)
for name in "$@"; do
  run=$name
  [ "$name" != test ] || run=run_tests
  section "$name" "${limits[$name]}" "$run"
done
[ -z "$monitor" ] || kill "$monitor"
"$PYTHON" bench/gpu_report.py "$OUT" || failed=1
exit $failed
