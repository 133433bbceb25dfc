"""RMSNorm, RoPE and SwiGLU equal their definitions, forward and backward, in Triton and in the reference."""

import pytest
import torch
from fireflyds_kernels import force, rms_norm, rope, swiglu
from packed import TOLERANCES, assert_near

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _leaves(shapes, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)


def _compare(kernel, inputs, tolerance) -> None:
    """Triton against the definition in float64."""
    float64_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    with force("triton"):
        output = kernel(*inputs)
    with force("reference"):
        expected = kernel(*float64_inputs)
    output, expected = (x if isinstance(x, tuple) else (x,) for x in (output, expected))
    upstream = [torch.randn(x.shape, dtype=torch.float64).to(x.device) for x in expected]
    for a, b in zip(output, expected, strict=True):
        assert_near(a, b, tolerance, "output")
    gradients = torch.autograd.grad(output, inputs, [u.to(x.dtype) for u, x in zip(upstream, output, strict=True)])
    expected_gradients = torch.autograd.grad(expected, float64_inputs, upstream)
    for i, (a, b) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert a.dtype is inputs[i].dtype
        assert_near(a, b, 2 * tolerance, f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 130), (1, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype, shape, with_residual, device, poisoned) -> None:
    x, residual, weight = _leaves([shape, shape, shape[-1:]], dtype, device)
    if with_residual:
        _compare(
            lambda x, residual, weight: rms_norm(x, weight, 1e-5, residual), (x, residual, weight), TOLERANCES[dtype]
        )
    else:
        _compare(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight), TOLERANCES[dtype])


def test_rms_norm_equals_torch_s() -> None:
    from torch.nn.functional import rms_norm as torch_rms_norm

    x, weight = _leaves([(4, 64), (64,)], torch.float32, "cpu")
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch_rms_norm(x, (64,), weight, 1e-5))
    normed, total = rms_norm(x, weight, 1e-5, residual=x)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(normed, torch_rms_norm(2 * x, (64,), weight, 1e-5))


def test_rms_norm_of_a_sum_with_itself(device) -> None:
    x, weight = _leaves([(4, 64), (64,)], torch.float32, device)
    with force("triton"):
        total = rms_norm(x, weight, 1e-5, residual=x)[1]
    assert torch.equal(total, x + x)


def test_a_frozen_norm_gives_the_same_input_gradient(device) -> None:
    x, weight = _leaves([(4, 64), (64,)], torch.float32, device)
    frozen = weight.detach()
    with force("triton"):
        gradient = torch.autograd.grad(rms_norm(x, frozen, 1e-5).sum(), x)[0]
        expected = torch.autograd.grad(rms_norm(x, weight, 1e-5).sum(), x)[0]
    assert torch.equal(gradient, expected)


def test_only_the_residual_sum_of_rms_norm_may_be_used(device) -> None:
    x, residual, weight = _leaves([(4, 64), (4, 64), (64,)], torch.float32, device)
    with force("triton"):
        gradients = torch.autograd.grad(rms_norm(x, weight, 1e-5, residual)[1].sum(), (x, residual))
    assert all(torch.equal(g, torch.ones_like(g)) for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary_dim"), [(2, 2, 8, 8), (3, 1, 80, 80), (4, 2, 16, 8)])
def test_rope(dtype, heads, kv_heads, dim, rotary_dim, device, poisoned) -> None:
    q, k = _leaves([(9, heads, dim), (9, kv_heads, dim)], dtype, device)
    angles = torch.rand(9, rotary_dim // 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).repeat(
        1, 2
    )
    cos, sin = (table.to(device) for table in (angles.cos(), angles.sin()))
    _compare(lambda q, k: rope(q, k, cos.to(q.dtype), sin.to(q.dtype)), (q, k), TOLERANCES[dtype])


def test_rope_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = _leaves([(9, 4, 16), (9, 2, 16)], torch.float32, "cpu")
    angles = torch.rand(9, 8).repeat(1, 2)
    expected = transformers.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None]
    )
    for a, b in zip(rope(q, k, angles.cos(), angles.sin()), expected, strict=True):
        assert torch.equal(a, b[0].transpose(0, 1))


def test_rope_accepts_views(device) -> None:
    qkv = torch.randn(9, 3, 2, 16, device=device)
    table = torch.randn(9, 8, device=device).repeat(1, 2)
    with force("triton"):
        outputs = rope(qkv[:, 0], qkv[:, 1], table.cos(), table.sin())
    with force("reference"):
        expected = rope(qkv[:, 0], qkv[:, 1], table.cos(), table.sin())
    for a, b in zip(outputs, expected, strict=True):
        assert_near(a, b, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 33), (3, 5, 500)])
def test_swiglu(dtype, shape, device, poisoned) -> None:
    _compare(swiglu, _leaves([shape, shape], dtype, device), TOLERANCES[dtype])


def test_empty_inputs_are_accepted(device) -> None:
    with force("triton"):
        assert swiglu(torch.empty(0, 4, device=device), torch.empty(0, 4, device=device)).shape == (0, 4)
        assert rms_norm(torch.empty(0, 4, device=device), torch.ones(4, device=device), 1e-5).shape == (0, 4)


def test_errors_name_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"weight \[d\] expected with d=4"):
        rms_norm(torch.zeros(3, 4), torch.zeros(5), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(torch.zeros(3, 4), torch.zeros(4), 1e-5, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="T=3"):
        rope(torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="one shape and type"):
        swiglu(torch.zeros(3), torch.zeros(4))
