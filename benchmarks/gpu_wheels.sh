#!/usr/bin/env bash
# Wheels for a machine with a GPU, Python 3.12, torch and transformers, and no network: what the smoke test and the
# benchmarks need besides goes to ./wheels, in the versions of .ci/constraints.txt, without what these need in turn.
# benchmarks/gpu.sh takes them along. Above LIMIT_MIB (60) together it refuses.
#
#     benchmarks/gpu_wheels.sh [cuda]        # of that machine's torch, 130 (CUDA 13.0) if not given
#
# bitsandbytes carries a library for every CUDA: only that one stays. DeepSpeed is built without its CUDA operators.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} cuda=${1:-130} limit=${LIMIT_MIB:-60}
packages=(
  accelerate annotated-types antlr4-python3-runtime bitsandbytes deepspeed einops hjson hydra-core iniconfig
  markdown-it-py mdurl msgpack omegaconf peft pluggy protobuf psutil py-cpuinfo pydantic pydantic_core pygments pytest
  rich safetensors sentencepiece typing-inspection zstandard
)
sources=" antlr4-python3-runtime deepspeed " # published as source alone, pure Python
rm -rf wheels.part wheels
mkdir wheels.part
platforms=()
for glibc in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform any)
for package in "${packages[@]}"; do
  pin=$(grep -i "^${package//[-_]/[-_]}==" .ci/constraints.txt) || pin=$package
  if [[ $sources == *" $package "* ]]; then
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels.part "$pin"
  else
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 "${platforms[@]}" --dest wheels.part "$pin"
  fi
done
"$python" - wheels.part "$cuda" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

folder, cuda = Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("bitsandbytes-*.whl")
with zipfile.ZipFile(wheel) as source:
    libraries = [name for name in source.namelist() if "libbitsandbytes_" in name]
    kept = [name for name in libraries if name.endswith((f"_cuda{cuda}.so", "_cpu.so"))]
    if len(kept) < 2:
        known = ", ".join(sorted(name.split("libbitsandbytes_")[1].removesuffix(".so") for name in libraries))
        sys.exit(f"error: cuda={cuda}: bitsandbytes has no library for it. Known: {known}")
    with zipfile.ZipFile(wheel.with_suffix(".part"), "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            if item.filename not in libraries or item.filename in kept:
                target.writestr(item, source.read(item))
wheel.with_suffix(".part").replace(wheel)
PYTHON
total=$(du -cb wheels.part/*.whl | tail -n 1 | cut -f1)
ls -lS wheels.part | awk 'NR > 1 { printf "%6.1f MiB  %s\n", $5 / 1048576, $9 }'
printf 'together %s MiB\n' "$(awk "BEGIN { printf \"%.1f\", $total / 1048576 }")"
if [ "$total" -gt $((limit * 1048576)) ]; then
  echo "error: more than $limit MiB; nothing was left in ./wheels"
  rm -rf wheels.part
  exit 1
fi
mv wheels.part wheels
