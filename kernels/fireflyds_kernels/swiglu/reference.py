"""Reference implementation in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up
