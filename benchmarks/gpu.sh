#!/usr/bin/env bash
# One part of the benchmarks on the GPU at hand, in under ten minutes each: the kernels with their tests (needs torch, triton
# and pytest), full-parameter steps, or QLoRA steps (need transformers and omegaconf too, QLoRA peft and bitsandbytes).
# What lies as wheels in ./wheels is taken along: peers are compared where they are there. Results go to the folder given,
# or to benchmarks/results.
#
#     benchmarks/gpu.sh [folder] [kernels|full|qlora]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-benchmarks/results}"
folder=$(realpath "${1:-benchmarks/results}")
python=${PYTHON:-python3}
part=${2:-kernels}
case $part in kernels | full | qlora) ;; *) echo "error: part=$part: one of kernels, full, qlora"; exit 2 ;; esac
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/tests/support PYTHONUNBUFFERED=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "error: torch sees no GPU here"; exit 2; }
if compgen -G 'wheels/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$PWD/.peers" wheels/*.whl
  export PYTHONPATH=$PYTHONPATH:$PWD/.peers
fi
"$python" -c 'import fireflyds_kernels; print(fireflyds_kernels.describe())'
if [ "$part" != kernels ]; then
  # Three or four contenders, two turns each: what was measured stands if the time is up.
  exec timeout 570 "$python" benchmarks/bench_train_gpu.py "$folder" --only "$part"
fi
timeout 240 "$python" benchmarks/bench_kernels_gpu.py "$folder"
# The root's fixtures need all of fireflyds; what compiles for other GPUs is tested without one.
timeout 290 "$python" -m pytest tests/kernels -v -m 'not slow' --confcutdir=tests/kernels -p no:cacheprovider \
  --ignore=tests/kernels/test_compiled.py
