"""Norm, rotation and gate equal their definitions, forward and backward, in the definition and in Triton."""

import pytest
import torch
from fireflyds_kernels import force, rms_norm, rope, swiglu
from packed import TOLERANCES, assert_near

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _leaves(shapes, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)


def _same(run, inputs, tolerance) -> None:
    """Triton against the definition in float64."""
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    with force("triton"):
        found = run(*inputs)
    with force("reference"):
        wanted = run(*exact)
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (found, wanted))
    upstream = [torch.randn(x.shape, dtype=torch.float64).to(x.device) for x in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, tolerance, "output")
    ours = torch.autograd.grad(found, inputs, [u.to(x.dtype) for u, x in zip(upstream, found, strict=True)])
    theirs = torch.autograd.grad(wanted, exact, upstream)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype is inputs[i].dtype
        assert_near(a, b, 2 * tolerance, f"gradient {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 130), (1, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype, shape, with_residual, device, poisoned) -> None:
    x, residual, weight = _leaves([shape, shape, shape[-1:]], dtype, device)
    if with_residual:
        _same(lambda x, residual, weight: rms_norm(x, weight, 1e-5, residual), (x, residual, weight), TOLERANCES[dtype])
    else:
        _same(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight), TOLERANCES[dtype])


def test_rms_norm_is_what_llama_computes() -> None:
    from torch.nn.functional import rms_norm as torchs

    x, weight = _leaves([(4, 64), (64,)], torch.float32, "cpu")
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torchs(x, (64,), weight, 1e-5))
    normed, total = rms_norm(x, weight, 1e-5, residual=x)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(normed, torchs(2 * x, (64,), weight, 1e-5))


def test_rms_norm_of_a_sum_with_itself(device) -> None:
    x, weight = _leaves([(4, 64), (64,)], torch.float32, device)
    with force("triton"):
        total = rms_norm(x, weight, 1e-5, residual=x)[1]
    assert torch.equal(total, x + x)


def test_a_frozen_norm_costs_no_gradient(device) -> None:
    x, weight = _leaves([(4, 64), (64,)], torch.float32, device)
    frozen = weight.detach()
    with force("triton"):
        found = torch.autograd.grad(rms_norm(x, frozen, 1e-5).sum(), x)[0]
        wanted = torch.autograd.grad(rms_norm(x, weight, 1e-5).sum(), x)[0]
    assert torch.equal(found, wanted)


def test_only_the_sum_of_a_norm_may_be_used(device) -> None:
    x, residual, weight = _leaves([(4, 64), (4, 64), (64,)], torch.float32, device)
    with force("triton"):
        found = torch.autograd.grad(rms_norm(x, weight, 1e-5, residual)[1].sum(), (x, residual))
    assert all(torch.equal(g, torch.ones_like(g)) for g in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "turned"), [(2, 2, 8, 8), (3, 1, 80, 80), (4, 2, 16, 8)])
def test_rope(dtype, heads, kv_heads, dim, turned, device, poisoned) -> None:
    q, k = _leaves([(9, heads, dim), (9, kv_heads, dim)], dtype, device)
    angles = torch.rand(9, turned // 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).repeat(1, 2)
    cos, sin = (table.to(device) for table in (angles.cos(), angles.sin()))
    _same(lambda q, k: rope(q, k, cos.to(q.dtype), sin.to(q.dtype)), (q, k), TOLERANCES[dtype])


def test_rope_is_what_transformers_computes() -> None:
    transformers = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = _leaves([(9, 4, 16), (9, 2, 16)], torch.float32, "cpu")
    angles = torch.rand(9, 8).repeat(1, 2)
    wanted = transformers.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None]
    )
    for a, b in zip(rope(q, k, angles.cos(), angles.sin()), wanted, strict=True):
        assert torch.equal(a, b[0].transpose(0, 1))


def test_rope_takes_views(device) -> None:
    fused = torch.randn(9, 3, 2, 16, device=device)
    table = torch.randn(9, 8, device=device).repeat(1, 2)
    with force("triton"):
        found = rope(fused[:, 0], fused[:, 1], table.cos(), table.sin())
    with force("reference"):
        wanted = rope(fused[:, 0], fused[:, 1], table.cos(), table.sin())
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 33), (3, 5, 500)])
def test_swiglu(dtype, shape, device, poisoned) -> None:
    _same(swiglu, _leaves([shape, shape], dtype, device), TOLERANCES[dtype])


def test_nothing_is_no_error(device) -> None:
    with force("triton"):
        assert swiglu(torch.empty(0, 4, device=device), torch.empty(0, 4, device=device)).shape == (0, 4)
        assert rms_norm(torch.empty(0, 4, device=device), torch.ones(4, device=device), 1e-5).shape == (0, 4)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight \[d\] expected with d=4"):
        rms_norm(torch.zeros(3, 4), torch.zeros(5), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(torch.zeros(3, 4), torch.zeros(4), 1e-5, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="T=3"):
        rope(torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="one shape and type"):
        swiglu(torch.zeros(3), torch.zeros(4))
