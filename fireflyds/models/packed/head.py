"""What the head of a packed model computes from the last hidden states. It is called as a module, so that ZeRO-3 gathers its
weight; each function here is given to the model's forward pass as `compute`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What belongs to the hidden states `[T, d]` of a packed row.

    `labels`, int64 `[T]`: the target of each position, -100 where there is none. `num_labels`: how many have one, where
    the host knows it. `cu_seqlens`, int32 `[n + 1]`: the documents' boundaries.
    """

    labels: Tensor
    num_labels: int | None
    cu_seqlens: Tensor


HeadFunction = Callable[[nn.Module, Tensor, HeadInputs], Any]


def loss_sum(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> Tensor:
    """The sum of the token losses, a scalar."""
    return head(hidden, inputs.labels, "sum", inputs.num_labels)  # type: ignore[no-any-return]


def token_losses(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> Tensor:
    """The loss of every position `[T]`, 0 where there is no target."""
    return head(hidden, inputs.labels, "none", inputs.num_labels)  # type: ignore[no-any-return]


def loss_sum_and_token_losses(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Both, at the price of the sum: the token losses carry no gradient."""
    return head(hidden, inputs.labels, "both", inputs.num_labels)  # type: ignore[no-any-return]


def next_token_logits(head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> Tensor:
    """Logits `[n, V]` of the token that follows each document."""
    return head(hidden[inputs.cu_seqlens[1:].long() - 1])  # type: ignore[no-any-return]
