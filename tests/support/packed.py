"""Inputs of packed documents, naive attention as the reference, and tolerances by number format."""

from itertools import accumulate

import torch
from torch import Tensor

# Of a result's norm, by number format; the interpreter truncates bfloat16 where hardware rounds.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def attention_inputs(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (
        torch.randn(total, number, dim, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    )
    return q, k, v, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One dense masked softmax over everything, in the inputs' number format."""
    total, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    positions = torch.arange(total, device=q.device)
    document = torch.bucketize(positions, cu_seqlens[1:-1].long(), right=True)
    distance = positions[:, None] - positions[None]
    mask = document[:, None] == document[None]
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    scores = torch.einsum("ihd,jhd->hij", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance.abs()
    exponentials = scores.masked_fill(~mask, float("-inf")).exp()
    total_weight = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total_weight = total_weight + sinks[:, None, None].exp()
    return torch.einsum("hij,jhd->ihd", exponentials / total_weight, v)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """‖actual − expected‖ ≤ tolerance · (‖expected‖ + √n), and all values are finite."""
    assert actual.shape == expected.shape, name
    assert torch.isfinite(actual).all(), f"{name}: values that are no numbers"
    distance = (actual.double() - expected.double()).norm().item()
    assert distance <= tolerance * (expected.double().norm().item() + expected.numel() ** 0.5), (
        f"{name}: {distance} apart"
    )


def gradients_of(output: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))
