"""The loss in chunks of rows: plain PyTorch on any device, exact gradients, the logits of one chunk at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of logits that exist at once: 606 rows at V = 55,296, 134 MB in float32.
CHUNK_ELEMENTS = 1 << 25
# Probabilities of 1/V and below are subnormal in float16; this brings them back into its range.
_LIFT = 1024.0


def summed(
    hidden: Tensor, blocks: tuple[Tensor, ...], labels: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The sum of the losses of labelled rows, each times its `scale`."""
    result: Tensor = _Summed.apply(hidden, labels, bias, scale, *blocks)
    return result


def each(hidden: Tensor, blocks: tuple[Tensor, ...], labels: Tensor, bias: Tensor | None) -> Tensor:
    """The losses of labelled rows, `[n]`."""
    result: Tensor = _Each.apply(hidden, labels, bias, *blocks)
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    step = max(16, CHUNK_ELEMENTS // max(vocab_size, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _logits(hidden: Tensor, blocks: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """`[c, V]` in float32 or wider."""
    parts = [hidden @ block.T for block in blocks]
    logits = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(_wide(hidden.dtype))
    return logits if bias is None else logits.add_(bias)


class _Gradients:
    """Gradients of `Σ row_scale · loss`, added up chunk by chunk in float32."""

    def __init__(self, hidden: Tensor, blocks: tuple[Tensor, ...], bias: Tensor | None, wanted: list[bool]) -> None:
        wide = _wide(hidden.dtype)
        self._blocks, self._dtype = blocks, hidden.dtype
        self.hidden = hidden.new_zeros(hidden.shape, dtype=wide) if wanted[0] else None
        self.bias = bias.new_zeros(bias.shape, dtype=wide) if bias is not None and wanted[1] else None
        self.blocks = [
            block.new_zeros(block.shape, dtype=wide) if want else None
            for block, want in zip(blocks, wanted[2:], strict=True)
        ]
        self._lift = _LIFT if hidden.dtype is torch.float16 else 1.0

    def add(self, rows: slice, hidden: Tensor, labels: Tensor, probabilities: Tensor, row_scale: Tensor | None) -> None:
        """`probabilities` `[c, V]` are used up."""
        probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
        if row_scale is not None:
            probabilities.mul_(row_scale[:, None])
        if self.bias is not None:
            self.bias += probabilities.sum(0)
        if self._lift != 1:
            probabilities.mul_(self._lift)
        narrow, start = probabilities.to(self._dtype), 0
        for block, gradient in zip(self._blocks, self.blocks, strict=True):
            mine = narrow[:, start : start + len(block)]
            start += len(block)
            if self.hidden is not None:
                self.hidden[rows] += (mine @ block).to(self.hidden.dtype).div_(self._lift)
            if gradient is not None:
                _add_product(gradient, mine, hidden, 1 / self._lift)

    def times(self, upstream: Tensor, dtypes: list[torch.dtype]) -> list[Tensor | None]:
        """In the order hidden, bias, blocks, each in its tensor's own type."""
        found = [self.hidden, self.bias, *self.blocks]
        return [None if g is None else (g * upstream).to(dtype) for g, dtype in zip(found, dtypes, strict=True)]


def _add_product(gradient: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    if gradient.dtype == left.dtype:
        gradient.addmm_(left.T, right, alpha=factor)
    else:
        gradient.add_(left.T @ right, alpha=factor)


def _types(hidden: Tensor, bias: Tensor | None, blocks: tuple[Tensor, ...]) -> list[torch.dtype]:
    return [hidden.dtype, hidden.dtype if bias is None else bias.dtype, *(block.dtype for block in blocks)]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, labels: Tensor, bias: Tensor | None, scale: Tensor | None, *blocks: Tensor
    ) -> Tensor:
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *ctx.needs_input_grad[4:]]
        gradients = _Gradients(hidden, blocks, bias, wanted) if any(wanted) else None
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        for rows in _chunks(len(labels), sum(map(len, blocks))):
            logits, targets = _logits(hidden[rows], blocks, bias), labels[rows]
            highest = logits.amax(1, keepdim=True)
            target = logits.gather(1, targets[:, None])
            norm = logits.sub_(highest).exp_().sum(1, keepdim=True)
            losses = (norm.log() + highest - target)[:, 0]
            row_scale = None if scale is None else scale[rows]
            total += losses.sum() if row_scale is None else losses @ row_scale.to(losses.dtype)
            if gradients is not None:
                gradients.add(rows, hidden[rows], targets, logits.div_(norm), row_scale)
        ctx.gradients = gradients
        ctx.types = _types(hidden, bias, blocks)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, bias, *blocks = ctx.gradients.times(upstream, ctx.types)
        return (hidden, None, bias, None, *blocks)


class _Each(torch.autograd.Function):
    """One loss a row: what comes from above differs from row to row, so the logits are made again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, bias: Tensor | None, *blocks: Tensor) -> Tensor:  # type: ignore[override]
        losses = hidden.new_zeros(len(labels), dtype=_wide(hidden.dtype))
        norms = torch.empty_like(losses)
        for rows in _chunks(len(labels), sum(map(len, blocks))):
            logits = _logits(hidden[rows], blocks, bias)
            norms[rows] = logits.logsumexp(1)
            losses[rows] = norms[rows] - logits.gather(1, labels[rows, None])[:, 0]
        ctx.save_for_backward(hidden, labels, norms, *([] if bias is None else [bias]), *blocks)
        ctx.has_bias = bias is not None
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, labels, norms, *rest = ctx.saved_tensors
        bias, blocks = (rest[0], tuple(rest[1:])) if ctx.has_bias else (None, tuple(rest))
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *ctx.needs_input_grad[3:]]
        gradients = _Gradients(hidden, blocks, bias, wanted)
        for rows in _chunks(len(labels), sum(map(len, blocks))):
            probabilities = _logits(hidden[rows], blocks, bias).sub_(norms[rows, None]).exp_()
            gradients.add(rows, hidden[rows], labels[rows], probabilities, upstream[rows])
        found = gradients.times(upstream.new_ones(()), _types(hidden, bias, blocks))
        return (found[0], None, found[1], *found[2:])
