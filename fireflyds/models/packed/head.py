"""Functions of the head of a packed model: losses and logits from the last hidden states.

Each can be the `compute` argument of the fused model's forward pass. The head is called as a module, so that ZeRO-3
gathers its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """Targets and document boundaries of the hidden states `[T, d]` of a packed row.

    `labels`, int64 `[T]`: the target token of each position, -100 for none. `num_labels`: the number of positions with
    a target; None where only the device has it. `cu_seqlens`, int32 `[n + 1]`: the document boundaries.
    """

    labels: Tensor
    num_labels: int | None
    cu_seqlens: Tensor


HeadFunction = Callable[[nn.Module, Tensor, HeadInputs], Any]


def loss_sum(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> Tensor:
    """Returns the sum of the token losses, a scalar."""
    return head(hidden, inputs.labels, "sum", inputs.num_labels)  # type: ignore[no-any-return]


def token_losses(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> Tensor:
    """Returns the loss of every position `[T]`, 0 where there is no target."""
    return head(hidden, inputs.labels, "none", inputs.num_labels)  # type: ignore[no-any-return]


def loss_sum_and_token_losses(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Returns the sum of the token losses, and the loss of every position `[T]` without gradient, in one pass."""
    return head(hidden, inputs.labels, "both", inputs.num_labels)  # type: ignore[no-any-return]


def next_token_logits(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> Tensor:
    """Returns the logits `[n, V]` of the token after the last one of each document."""
    return head(hidden[inputs.cu_seqlens[1:].long() - 1])  # type: ignore[no-any-return]
