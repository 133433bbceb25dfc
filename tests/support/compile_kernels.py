"""Compiles Triton kernels for GPUs that are not installed and prints their resource usage as JSON lines.

    python compile_kernels.py <capability> <head_dim,...|elementwise>

Run in a separate process: where the interpreter is enabled, Triton compiles nothing.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from fireflyds_kernels.linear_cross_entropy import triton as loss
from fireflyds_kernels.packed_attention import triton as attention
from fireflyds_kernels.rms_norm import triton as norm
from fireflyds_kernels.rope import triton as rotation
from fireflyds_kernels.swiglu import triton as gate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Pointers and numbers that are not of the tensors' own type; other numbers are int32.
TYPES = {
    "boundaries": "*i32",
    "labels_ptr": "*i64",
    "scale": "fp32",
    "eps": "fp32",
    "lift": "fp32",
    "sign": "fp32",
    **dict.fromkeys(("slopes", "lse_ptr", "delta_ptr", "scale_ptr", "bias_ptr", "losses_ptr", "dweight_ptr"), "*fp32"),
}


def compile_kernel(kernel: Any, dtype: torch.dtype, capability: int, constants: dict[str, Any]) -> dict[str, int]:
    """Registers, bytes of stack (spills), shared memory and tensor-core instructions of one kernel."""
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in constants
    }
    types = {}
    for name in kernel.arg_names:
        default_type = "*" + NAMES[dtype] if name.endswith("_ptr") else "i32"
        types[name] = "constexpr" if name in constants else TYPES.get(name, default_type)
    # As at run time for contiguous tensors: addresses and strides are multiples of 16.
    aligned = [
        i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*" or name.endswith(("stride", "_head"))
    ]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack, _, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr).groups()
    )
    products = len(re.findall(r"mma\.sync|wgmma\.mma_async", binary.asm["ptx"]))
    return {"registers": registers, "spilled": stack + local, "shared": binary.metadata.shared, "products": products}


def attention_kernels(capability: int, head_dim: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    usages = {}
    kernels = {
        "forward": attention.forward_kernel,
        "keys": attention.bwd_dkdv_kernel,
        "queries": attention.bwd_dq_kernel,
    }
    for name, kernel in kernels.items():
        for window, alibi in ((None, False), (64, True)):
            constants = attention.constants(4, 1, head_dim, dtype, True, window, alibi)
            constants |= attention.tiles(name, head_dim, dtype, capability).launch()
            usages[f"{name}{' with window and ALiBi' * alibi}"] = compile_kernel(kernel, dtype, capability, constants)
    return usages


def elementwise_kernels(capability: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    row = norm.launch(4096)
    return {
        "norm": compile_kernel(norm.forward_kernel, dtype, capability, {"RESIDUAL": True} | row),
        "norm backward": compile_kernel(
            norm.backward_kernel, dtype, capability, {"BESIDE": True, "WEIGHT": True} | row
        ),
        "rope": compile_kernel(rotation.rope_kernel, dtype, capability, rotation.constants(32, 8, 128, 128)),
        "swiglu": compile_kernel(gate.forward_kernel, dtype, capability, dict(gate.LAUNCH)),
        "swiglu backward": compile_kernel(gate.backward_kernel, dtype, capability, dict(gate.LAUNCH)),
        "loss": compile_kernel(
            loss.dlogits_kernel, dtype, capability, {"BIAS": False, "SCALE": True, "DLOGITS": True} | loss.LAUNCH
        ),
    }


def main(capability: int, kernels: str) -> None:
    if kernels == "elementwise":
        for dtype in (torch.float16, torch.bfloat16):
            print(json.dumps({f"{name} {dtype}": row for name, row in elementwise_kernels(capability, dtype).items()}))
        return
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    for head_dim in map(int, kernels.split(",")):
        print(
            json.dumps(
                {f"{name} D={head_dim}": row for name, row in attention_kernels(capability, head_dim, dtype).items()}
            )
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
