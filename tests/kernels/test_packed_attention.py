"""Packed attention equals attention over each document alone, in values and gradients."""

import pytest
import torch
from fireflyds_kernels import packed_attention


def _inputs(lengths: list[int], heads: int, kv_heads: int, dim: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    shapes = ((total, heads, dim), (total, kv_heads, dim), (total, kv_heads, dim))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, cu


def _naive(q, k, v, cu, causal: bool, scale: float):
    """One dense masked softmax over everything."""
    total, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    document = torch.bucketize(torch.arange(total), cu[1:-1].long(), right=True)
    allowed = document[:, None] == document[None]
    if causal:
        allowed &= torch.arange(total)[:, None] >= torch.arange(total)[None]
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [7, 1, 13, 2], [3] * 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 8), (4, 1, 8), (4, 2, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_dense_masked_attention_forward_and_backward(lengths, heads, kv_heads, dim, causal) -> None:
    q, k, v, cu = _inputs(lengths, heads, kv_heads, dim)
    ours = packed_attention(q, k, v, cu, max_seqlen=max(lengths), causal=causal, scale=0.3)
    theirs = _naive(q, k, v, cu, causal, 0.3)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_changing_one_document_changes_no_other() -> None:
    q, k, v, cu = _inputs([6, 9, 4], 2, 2, 8)
    before = packed_attention(q, k, v, cu, max_seqlen=9)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[6:15] += 1
    after = packed_attention(*changed, cu, max_seqlen=9)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[15:], after[15:])
    assert not torch.equal(before[6:15], after[6:15])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": torch.zeros(5, 3, 8)}, "no multiple"), ({"cu": torch.tensor([0, 5])}, "int32"), ({"q": torch.zeros(5, 8)}, "expected"),
     ({"max_seqlen": 4}, "max_seqlen=4")],
)  # fmt: skip
def test_wrong_shapes_are_named(change, message) -> None:
    good = {
        "q": torch.zeros(5, 4, 8),
        "k": torch.zeros(5, 2, 8),
        "cu": torch.tensor([0, 5], dtype=torch.int32),
        "max_seqlen": 5,
    } | change
    with pytest.raises(ValueError, match=message):
        packed_attention(good["q"], good["k"], good["k"], good["cu"], max_seqlen=good["max_seqlen"])
