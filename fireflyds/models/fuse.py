"""The packed forward pass of one loaded instance: our attention over boundaries, our loss through the head."""

import types
from typing import Any

import torch
from fireflyds_kernels import linear_cross_entropy, packed_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "fireflyds"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[1, H, T, D]` in, `[1, T, H, D]` out."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scaling)[None], None


# Boundaries say all there is to mask; a 2-D or 4-D mask never exists.
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


class _LossHead(nn.Linear):
    """The model's own head, which also gives the loss. Called as a module, so that ZeRO-3 gathers its weight."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum") -> Tensor:
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, labels, bias=self.bias, reduction=reduction)  # type: ignore[arg-type]


def fuse(model: Any) -> Any:
    """Give this instance the packed forward pass; the class and other instances stay as they are.

    Afterwards `model(input_ids, labels, position_ids, cu_seqlens, max_seqlen)` returns the sum of the token
    losses (or, with `reduction="none"`, `[T]` of them).
    """
    model.set_attn_implementation(ATTENTION)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError(f"the head of {type(model).__name__} is a {type(head).__name__}, not a Linear")
    head.__class__ = _LossHead
    model.forward = types.MethodType(_forward, model)
    return model


def _forward(
    self: Any,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    reduction: str = "sum",
) -> Tensor:
    hidden = self.get_decoder()(
        input_ids=input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, use_cache=False
    ).last_hidden_state
    loss: Tensor = self.get_output_embeddings()(hidden[0], labels[0], reduction)
    return loss


def device_batch(batch: Any, device: torch.device) -> dict[str, Any]:
    """The arguments of the packed forward pass, on the model's device."""
    tensors = ("input_ids", "labels", "position_ids", "cu_seqlens")
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in tensors}
    return moved | {"max_seqlen": batch.max_seqlen}
