#!/usr/bin/env bash
# Everything that needs a GPU, unattended, in under nine minutes: builds the extension, runs the tests on the hardware, measures,
# and looks for memory errors and races. Writes JSON and logs to $OUT. A stage that fails or takes too long loses only itself.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/device}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

stage() {  # name, seconds, command
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  echo "$name: exit $status after $((SECONDS - started)) s" | tee -a "$OUT/stages.txt"
}

nvidia-smi >"$OUT/gpu.txt" 2>&1
stage build 100 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
stage doctor 10 "$PYTHON" -m adam_ghost doctor
KERNELS=(tests/kernels/test_{contract,wgrad_score,ghost_gram,embedding,norm}.py)
stage synced 40 "$PYTHON" -m bench.synced
# each variant of a kernel compiles anew: in parallel where pytest-xdist is there
PARALLEL=()
"$PYTHON" -c "import xdist" 2>/dev/null && PARALLEL=(-n 12)
stage tests 100 "$PYTHON" -m pytest -q -p no:cacheprovider "${PARALLEL[@]}" "${KERNELS[@]}" tests/optim/test_variance_correction.py tests/optim/test_adjoint.py \
  tests/scores/test_ops.py tests/scores/test_impl.py tests/csrc/test_reading.py
stage kernels 40 "$PYTHON" -m bench kernels --json "$OUT/kernels-gpu.json"
stage ops 20 "$PYTHON" -m bench ops --device cuda --json "$OUT/ops-gpu.json"
stage throughput 50 "$PYTHON" -m bench throughput --device cuda --gpt2 --rounds 15 --json "$OUT/throughput-gpu.json"
stage throughput-compiled 60 "$PYTHON" -m bench throughput --device cuda --gpt2 --compile --rounds 15 --json "$OUT/throughput-compiled-gpu.json"
stage fidelity 40 "$PYTHON" -m bench fidelity --device cuda --quick --json "$OUT/fidelity-gpu.json"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    stage "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider \
      "${KERNELS[@]}" -k "odd and float32"
  done
fi
cat "$OUT/stages.txt"
