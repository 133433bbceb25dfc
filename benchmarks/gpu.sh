#!/usr/bin/env bash
# The benchmarks on the GPU at hand, in parts that each end inside their limit; together under 15 minutes:
#
#     benchmarks/gpu.sh [folder] [smoke|tests|kernels|full|qlora ...]
#
# smoke: the verbs under DeepSpeed and NCCL, with a kill and a resume (needs all packages of pyproject.toml). tests: the
# tests of the kernels, side by side (need torch, triton and pytest). kernels: their speed. full, qlora: training steps
# (need transformers and omegaconf too, qlora peft and bitsandbytes). Without a part: all of them, in this order.
# A part that fails or runs out of time does not end the others; what it measured stays. Wheels in ./wheels are taken
# along: peers are compared where they can be imported. Results go to the folder given, or to benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-benchmarks/results}"
folder=$(realpath "${1:-benchmarks/results}")
python=${PYTHON:-python3}
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(smoke tests kernels full qlora)
for part in "${parts[@]}"; do
  case $part in smoke | tests | kernels | full | qlora) ;; *) echo "error: part=$part: one of smoke, tests, kernels, full, qlora"; exit 2 ;; esac
done
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/tests/support PYTHONUNBUFFERED=1 DS_BUILD_OPS=0
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { echo "error: torch sees no GPU here"; exit 2; }
if compgen -G 'wheels/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$PWD/.peers" wheels/*.whl || echo "error: a wheel could not be installed"
  export PYTHONPATH=$PYTHONPATH:$PWD/.peers
fi
status=0
limit() { # seconds, command ...: goes on behind a command that fails or is too slow
  timeout --kill-after=5 "$@" || { local code=$?; echo "error: exit code $code of: ${*:2}"; status=1; }
}

pids=() names=()
start_tests() { # a part of the tests, beside the others
  timeout --kill-after=5 200 "$python" -m pytest -q -m 'not slow' --confcutdir=tests/kernels -p no:cacheprovider "$@" \
    >"$folder/tests_${#pids[@]}.log" 2>&1 &
  pids+=($!)
  names+=("$*")
}

run_tests() {
  # Hundreds of kernels are compiled: a process for each group, on the cores that a machine with a GPU has. The root's
  # fixtures need all of fireflyds; what compiles for other GPUs is tested without one.
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/fireflyds-triton}
  local attention=tests/kernels/test_packed_attention.py number
  start_tests $attention -k every_implementation
  start_tests $attention -k dense
  start_tests $attention -k 'number_formats or half_precision'
  start_tests $attention -k 'not (every_implementation or dense or number_formats or half_precision)'
  start_tests tests/kernels/test_linear_cross_entropy.py
  start_tests tests/kernels/test_elementwise.py tests/kernels/test_composition.py
  start_tests tests/kernels/test_dispatch.py tests/kernels/test_qlora_linear.py
  for number in "${!pids[@]}"; do
    wait "${pids[$number]}" || { echo "error: tests_$number.log: ${names[$number]}"; status=1; }
    tail -n 1 "$folder/tests_$number.log"
  done
  # One file: not every machine returns many.
  tail -n +1 "$folder"/tests_[0-9].log >"$folder/tests.log" && rm "$folder"/tests_[0-9].log
}

for part in "${parts[@]}"; do
  case $part in
    smoke) limit 100 "$python" benchmarks/gpu_smoke.py "$folder" --seconds 90 ;;
    tests) run_tests ;;
    kernels)
      limit 20 "$python" -c 'import fireflyds_kernels; print(fireflyds_kernels.describe())'
      limit 130 "$python" benchmarks/bench_kernels_gpu.py "$folder"
      ;;
    # Three or four contenders, one turn each: results are written after every turn.
    full | qlora) limit $([ "$part" = full ] && echo 160 || echo 180) "$python" benchmarks/bench_train_gpu.py "$folder" --only "$part" --rounds 1 ;;
  esac
done
exit $status
