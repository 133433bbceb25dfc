"""Gradients of the summed loss, accumulated chunk by chunk."""

import torch
from torch import Tensor

# Probabilities of 1/V and below are subnormal in float16; this factor scales them into its normal range.
_LIFT = 1024.0
# Elements of a slice of rows in which a head's gradient is accumulated, so that no second full-size copy exists.
_SLICE_ELEMENTS = 1 << 25


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Gradients:
    """Gradients of hidden `[T, d]`, bias `[V]` and the head's blocks `[Vi, d]`, from logits' gradients times `lift`.

    With one chunk a head's gradient is one matrix product; over several chunks it is accumulated in float32.
    """

    def __init__(
        self, hidden: Tensor, bias: Tensor | None, blocks: list[Tensor], needs_grad: list[bool], chunks: int
    ) -> None:
        self.lift = _LIFT if hidden.dtype is torch.float16 else 1.0
        self._needs_grad = needs_grad
        self._bias_dtype = hidden.dtype if bias is None else result_type(hidden.dtype, bias.dtype)
        dtype = result_type(hidden.dtype, hidden.dtype)
        self._hidden = (
            hidden.new_zeros(hidden.shape, dtype=dtype) if needs_grad[0] else hidden.new_empty(0, dtype=dtype)
        )
        self._bias = bias.new_zeros(bias.shape, dtype=wide(bias.dtype)) if bias is not None and needs_grad[1] else None
        dtypes = [result_type(hidden.dtype, block.dtype) for block in blocks]
        self._blocks = [
            _Block(block, dtype, chunks) if needed else None
            for block, dtype, needed in zip(blocks, dtypes, needs_grad[2:], strict=True)
        ]
        self._empty = [block.new_empty(0, dtype=dtype) for block, dtype in zip(blocks, dtypes, strict=True)]

    def add(self, rows: Tensor, hidden: Tensor, blocks: list[Tensor], dlogits: Tensor) -> None:
        """Adds a chunk. `rows` `[c]` are the indices of its `hidden` `[c, d]` in the batch, `dlogits` `[c, V]` the
        gradients of its logits."""
        if self._bias is not None:
            self._bias += dlogits.sum(0, dtype=self._bias.dtype).div_(self.lift)
        total, start = None, 0
        for block, gradient in zip(blocks, self._blocks, strict=True):
            block_dlogits = dlogits[:, start : start + len(block)]
            start += len(block)
            if gradient is not None:
                gradient.add(block_dlogits, hidden, 1 / self.lift)
            if self._needs_grad[0]:
                contribution = _product(block_dlogits, block, 1 / self.lift)
                total = contribution if total is None else total.to(wide(contribution.dtype)) + contribution
        if total is not None:
            self._hidden.index_copy_(0, rows, total.to(self._hidden.dtype))

    def finish(self) -> list[Tensor]:
        """The gradients of hidden, bias and blocks, in this order, each in its `result_type`; empty where none is
        needed."""
        bias = self._hidden.new_empty(0) if self._bias is None else self._bias
        bias = bias.to(self._bias_dtype)
        blocks = zip(self._blocks, self._empty, strict=True)
        return [self._hidden, bias, *(empty if block is None else block.finish() for block, empty in blocks)]


def result_type(hidden: torch.dtype, own: torch.dtype) -> torch.dtype:
    """The number format of a gradient before the loss scale is applied: float16 would underflow, so it is float32
    there."""
    return torch.float32 if hidden is torch.float16 else own


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """`left @ right` in their own type; for float16 in float32, multiplied by `factor`."""
    if left.dtype is not torch.float16:
        return left @ right
    if left.is_cuda:
        # Half-precision inputs, float32 sums and results, on the tensor cores.
        return torch.mm(left, right, out_dtype=torch.float32).mul_(factor)
    return (left.float() @ right.float()).mul_(factor)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Adds `left @ right`, times `factor` for float16, to `total`, which has the wide type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and left.dtype is torch.bfloat16 and "dtype_out" in torch.ops.aten.addmm.overloads():
        # The product is never rounded to bfloat16, nor held in memory beside the sum.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += _product(left, right, factor)


class _Block:
    """The gradient of one block of the head's rows."""

    def __init__(self, block: Tensor, dtype: torch.dtype, chunks: int) -> None:
        self._like, self._dtype, self._once = block, dtype, chunks <= 1
        # Sums that are the result themselves are slices of it: nothing is put together at the end.
        self._whole = block.new_empty(block.shape, dtype=dtype) if not self._once and dtype is wide(dtype) else None
        step = max(1, _SLICE_ELEMENTS // max(block.shape[1], 1))
        self._slices = [slice(start, min(start + step, len(block))) for start in range(0, len(block), step)]
        self._sums: list[Tensor | None] = [None] * len(self._slices)

    def add(self, dlogits: Tensor, hidden: Tensor, factor: float) -> None:
        if self._once:
            self._slices, self._sums = [slice(None)], [_product(dlogits.T, hidden, factor)]
            return
        for index, rows in enumerate(self._slices):
            slice_dlogits, total = dlogits[:, rows].T, self._sums[index]
            if total is None:
                first = _product(slice_dlogits, hidden, factor)
                self._sums[index] = (
                    first.to(wide(hidden.dtype)) if self._whole is None else self._whole[rows].copy_(first)
                )
            else:
                _accumulate(total, slice_dlogits, hidden, factor)

    def finish(self) -> Tensor:
        if not any(total is not None for total in self._sums):
            return self._like.new_zeros(self._like.shape, dtype=self._dtype)
        if self._whole is not None:
            return self._whole
        narrow = []
        # Each slice's float32 sum is freed as soon as it is rounded.
        for index, total in enumerate(self._sums):
            narrow.append(total.to(self._dtype))  # type: ignore[union-attr]
            self._sums[index] = total = None
        return narrow[0] if len(narrow) == 1 else torch.cat(narrow)
