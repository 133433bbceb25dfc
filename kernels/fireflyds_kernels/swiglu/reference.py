"""Reference implementation in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; gate, up and the result have one shape `[..., d]`."""
    return silu(gate) * up
