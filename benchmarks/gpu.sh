#!/usr/bin/env bash
# The kernels' tests and benchmarks on the GPU at hand, in under nine minutes. Needs torch, triton and pytest;
# peers that lie as wheels in ./wheels are compared too. Results go to the folder given, or to benchmarks/results.
#
#     benchmarks/gpu.sh [folder]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-benchmarks/results}"
folder=$(realpath "${1:-benchmarks/results}")
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/kernels:$PWD/tests/support PYTHONUNBUFFERED=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "error: torch sees no GPU here"; exit 2; }
if compgen -G 'wheels/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$PWD/.peers" wheels/*.whl
  export PYTHONPATH=$PYTHONPATH:$PWD/.peers
fi
"$python" -c 'import fireflyds_kernels; print(fireflyds_kernels.describe())'
timeout 240 "$python" benchmarks/bench_kernels_gpu.py "$folder"
# The root's fixtures need all of fireflyds; what compiles for other GPUs is tested without one.
timeout 290 "$python" -m pytest tests/kernels -v -m 'not slow' --confcutdir=tests/kernels -p no:cacheprovider \
  --ignore=tests/kernels/test_compiled.py
