"""A linear layer on a 4-bit weight equals unpacking it and multiplying."""

import pytest
import torch
from fireflyds_kernels import force, qlora_linear
from packed import TOLERANCES, assert_near
from torch.utils.checkpoint import checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")


def _layer(dtype, device, nested=True, kind="nf4"):
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        128, 192, bias=True, compute_dtype=dtype, compress_statistics=nested, quant_type=kind
    )
    a, b = torch.randn(8, 128, device=device) * 0.1, torch.randn(192, 8, device=device) * 0.1
    x = torch.randn(3, 10, 128, device=device).to(dtype)
    leaves = (x, a, b, torch.randn(192, device=device))
    return layer.to(device).weight, tuple(leaf.requires_grad_() for leaf in leaves)


def _run(base, leaves, name, **options):
    x, a, b, bias = leaves
    torch.manual_seed(1)
    with force(qlora_linear=name):
        out = qlora_linear(x, base, a, b, 0.5, bias, **options)
    return out, torch.autograd.grad(out.float().square().sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_definition(dtype, nested, kind, dropout, device) -> None:
    base, leaves = _layer(dtype, device, nested, kind)
    output, gradients = _run(base, leaves, "fused", dropout=dropout)
    expected, expected_gradients = _run(base, leaves, "reference", dropout=dropout)
    assert output.dtype is dtype
    assert_near(output, expected, TOLERANCES[dtype])
    for leaf, a, b in zip(leaves, gradients, expected_gradients, strict=True):
        assert a.dtype is leaf.dtype
        assert_near(a, b, 3 * TOLERANCES[dtype])


def _record_unpack_calls(monkeypatch):
    from fireflyds_kernels.qlora_linear import fused

    calls, unpack = [], fused._unpack
    monkeypatch.setattr(fused, "_unpack", lambda *arguments: calls.append(1) or unpack(*arguments))
    return calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_uses_the_weight_unpacked_by_recomputation(reentrant, device, monkeypatch) -> None:
    base, leaves = _layer(torch.float32, device)
    expected_output, expected_gradients = _run(base, leaves, "fused")
    calls = _record_unpack_calls(monkeypatch)
    x, a, b, bias = leaves

    def layer(x, a, b, bias):
        return qlora_linear(x, base, a, b, 0.5, bias, keep_weight=True)

    out = checkpoint(layer, x, a, b, bias, use_reentrant=reentrant)
    assert len(calls) == 1
    out.square().sum().backward()
    assert len(calls) == 2  # forward and recomputation; the backward pass unpacks nothing
    assert torch.equal(out, expected_output)
    for leaf, expected in zip(leaves, expected_gradients, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_without_checkpointing_no_unpacked_weight_is_kept(device, monkeypatch) -> None:
    base, leaves = _layer(torch.float32, device)
    calls, sizes = _record_unpack_calls(monkeypatch), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = qlora_linear(leaves[0], base, leaves[1], leaves[2], 0.5, leaves[3])
    assert max(sizes) < 128 * 192
    out.sum().backward()
    assert len(calls) == 2


def test_adapter_gradients_without_an_input_gradient(device) -> None:
    base, (x, a, b, _) = _layer(torch.float32, device)
    expected_gradients = torch.autograd.grad(qlora_linear(x, base, a, b, 0.5).sum(), (a, b))
    for g, expected in zip(
        torch.autograd.grad(qlora_linear(x.detach(), base, a, b, 0.5).sum(), (a, b)), expected_gradients, strict=True
    ):
        assert torch.equal(g, expected)


def test_torch_compile_falls_back_to_eager_with_equal_results(device) -> None:
    base, (x, a, b, bias) = _layer(torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: qlora_linear(x, base, a, b, 0.5, bias), backend="aot_eager")
    output, expected = compiled(x), qlora_linear(x, base, a, b, 0.5, bias)
    assert_near(output, expected, 1e-6)
    assert_near(torch.autograd.grad(output.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], 1e-6)


def test_errors_name_wrong_shapes(device) -> None:
    base, (x, a, b, bias) = _layer(torch.float32, device)
    with pytest.raises(ValueError, match="no quantised 4-bit weight"):
        qlora_linear(x, torch.zeros(192, 128), a, b, 0.5)
    with pytest.raises(ValueError, match=r"lora_b \[192, r\]"):
        qlora_linear(x, base, a, b.T, 0.5)
    with pytest.raises(ValueError, match=r"bias \[192\]"):
        qlora_linear(x, base, a, b, 0.5, bias[:5])
