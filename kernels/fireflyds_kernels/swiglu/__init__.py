"""The gated activation of LLaMA's feed-forward layers."""

from torch import Tensor

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import Implementation
from fireflyds_kernels.requirements import always, requires_triton


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, with silu(x) = x · σ(x) (arXiv 2002.05202), for gate and up of equal shape.

    Raises:
        ValueError: shapes or types that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate {gate.dtype} {[*gate.shape]} and up {up.dtype} {[*up.shape]} must be of one shape and type"
        )
    result: Tensor = dispatch.select("swiglu", gate)(gate, up)
    return result


dispatch.Kernel(
    "swiglu",
    Implementation("triton", "fireflyds_kernels.swiglu.triton", "swiglu", requires_triton(60)),
    Implementation("reference", "fireflyds_kernels.swiglu.reference", "swiglu", always),
)
