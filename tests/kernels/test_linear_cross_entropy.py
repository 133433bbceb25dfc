"""The fused loss equals cross entropy over the whole logits, in values and gradients."""

import pytest
import torch
from fireflyds_kernels import linear_cross_entropy
from torch.nn.functional import cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 1300])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_cross_entropy_forward_and_backward(rows: int, share: float, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(97, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(97, generator=generator, dtype=torch.float64, requires_grad=True) if with_bias else None
    labels = torch.randint(0, 97, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= share] = -100
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias)
    theirs = cross_entropy(torch.nn.functional.linear(hidden, weight, bias), labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-3, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    each = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none")
    assert each.shape == (rows,)
    assert (each[labels == -100] == 0).all()
    torch.testing.assert_close(each.sum(), ours, atol=1e-3, rtol=1e-6)


def test_logits_of_rows_without_a_label_never_exist() -> None:
    hidden = torch.randn(4000, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    labels = torch.full((4000,), -100)
    labels[:3] = 5
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
    assert max(saved) <= 8000  # the weight; whole logits would be 4,000,000


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"hidden \[T, d\]"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 6), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction='mean'"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long), reduction="mean")  # type: ignore[arg-type]
