"""The additive bias of a block of scores: mask and ALiBi."""

import torch
from torch import Tensor


def bias(
    rows: Tensor, columns: Tensor, causal: bool, window: int | None, slopes: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`[1 or H, rows, columns]` of 0 or −slope · |i − j| where token i attends to token j, and −∞ elsewhere."""
    distance = rows[:, None] - columns[None]
    masked = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        masked |= distance.abs() >= window
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.zeros((), dtype=wide, device=rows.device)
    if slopes is not None:
        values = slopes.to(wide)[:, None, None] * -distance.abs()
    return values.masked_fill(masked[None], float("-inf")).to(dtype)


def span(start: int, end: int, length: int, causal: bool, window: int | None) -> tuple[int, int]:
    """The range `[first, last)` of columns that rows `[start, end)` of a document of `length` tokens attend to."""
    reach = length if window is None else window
    return max(0, start - reach + 1), end if causal else min(length, end + reach - 1)
