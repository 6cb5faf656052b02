#!/usr/bin/env bash
# The kernels and their binding under the address and undefined-behaviour sanitizers: csrc/sanitize.sh [python]
set -euo pipefail
python=$(command -v "${1:-python3}")
[[ $python = /* ]] || python=$PWD/$python
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cxx=${CXX:-c++}
sanitizers="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
include=$("$python" -c "from torch.utils.cpp_extension import include_paths; print(include_paths()[0])")

# a program of its own: the CPU kernels, and the CUDA kernels run on the CPU
cd "$root"
# shellcheck disable=SC2086
$cxx -std=c++17 $sanitizers -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp-simd -Wno-unknown-pragmas \
  -Itests/csrc/cuda_on_cpu -Icsrc -I"$include" -x c++ csrc/cuda.cu csrc/cpu.cpp tests/csrc/cuda_on_cpu/main.cpp -o "$build/kernels"
"$build/kernels"

# the extension in Python: a copy of the package, built with the sanitizers; one thread, for the checked allocator is slow
ADAM_GHOST_CUDA=0 ADAM_GHOST_CXXFLAGS="$sanitizers" LDFLAGS="-fsanitize=address,undefined" \
  "$python" setup.py -q build --build-base "$build" --build-lib "$build/package"
cd "$build"
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  OMP_NUM_THREADS=1 PYTHONPATH="$build/package" "$python" -m pytest -p no:cacheprovider --rootdir "$root" \
  "$root"/tests/optim/test_{variance_correction,adjoint}.py "$root/tests/csrc/test_reading.py" "$root/tests/scores/test_together.py" \
  -k "cpp and (dtypes or layouts or in_place or absent or small or nonfinite or untouched) or errors or reading or together"
