"""Packed attention equals attention over separate documents, in values and gradients, in every implementation."""

import sys
import types

import pytest
import torch
from fireflyds_kernels import CannotRunError, dispatch, force, packed_attention
from fireflyds_kernels.packed_attention import bucketed, flash
from fireflyds_kernels.requirements import DispatchKey
from packed import TOLERANCES, assert_near, attention_inputs, gradients_of, naive_attention


def _bucketed(q, k, v, cu_seqlens, *, max_seqlen, causal=True, scale=None, window=None, alibi_slopes=None):
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return bucketed.packed_attention(q, k, v, cu_seqlens, max_seqlen, causal, scale, window, alibi_slopes)


IMPLEMENTATIONS = {"chosen": packed_attention, "bucketed": _bucketed}


def _compare(
    attention, lengths, heads, kv_heads, dim, dtype=torch.float64, device="cpu", tolerance=None, **options
) -> None:
    q, k, v, cu_seqlens = attention_inputs(lengths, heads, kv_heads, dim, dtype, device)
    float64_inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    expected = naive_attention(*float64_inputs, cu_seqlens, **options)
    output = attention(q, k, v, cu_seqlens, max_seqlen=max(lengths), **options)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    assert_near(output, expected, tolerance, "output")
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    for name, a, b in zip(
        "qkv", gradients_of(output, (q, k, v), upstream), gradients_of(expected, float64_inputs, upstream), strict=True
    ):
        assert_near(a, b, 2 * tolerance, f"gradient of {name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [7, 1, 13, 2], [3] * 100, [300, 40]])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 8), (4, 1, 8), (4, 2, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_dense_masked_attention(implementation, lengths, heads, kv_heads, dim, causal, poisoned) -> None:
    _compare(IMPLEMENTATIONS[implementation], lengths, heads, kv_heads, dim, causal=causal, scale=0.3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 1, 3, 17, 290])
@pytest.mark.parametrize("slopes", [None, (0.5, 0.1, 0.02, 0.7)])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_and_alibi_equal_dense_masked_attention(implementation, window, slopes, causal, poisoned) -> None:
    slopes = None if slopes is None else torch.tensor(slopes)
    _compare(
        IMPLEMENTATIONS[implementation], [300, 1, 17, 40], 4, 2, 8, causal=causal, window=window, alibi_slopes=slopes
    )


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 17])
def test_soft_caps_and_sinks_equal_dense_attention(softcap, with_sinks, window, poisoned) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True) if with_sinks else None
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    with force(*([] if softcap or with_sinks else ["plain"])):
        _compare(packed_attention, [300, 1, 17, 40], 4, 2, 8, **options)
    if sinks is None:
        return
    q, k, v, cu_seqlens = attention_inputs([300, 1, 17, 40], 4, 2, 8)
    gradients = [
        torch.autograd.grad(attention(q, k, v, cu_seqlens, **options, **extras).square().sum(), sinks)[0]
        for attention, extras in ((packed_attention, {"max_seqlen": 300}), (naive_attention, {}))
    ]
    torch.testing.assert_close(*gradients)


def test_only_plain_attention_takes_soft_caps_and_sinks() -> None:
    for extra in ("softcap", "sinks"):
        key = DispatchKey("cuda", 90, torch.bfloat16, 128, **{extra: True})
        assert dispatch.runnable("packed_attention", key) == ["plain"]


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 16), (8, 12)])
def test_values_may_have_another_width_than_queries(dim, value_dim, poisoned) -> None:
    q, k, _, cu_seqlens = attention_inputs([30, 1, 17], 4, 4, dim)
    _, _, v, _ = attention_inputs([30, 1, 17], 4, 4, value_dim, seed=1)
    output = packed_attention(q, k, v, cu_seqlens, max_seqlen=30)
    expected = naive_attention(q, k, v, cu_seqlens)
    assert output.shape == (48, 4, value_dim)
    assert_near(output, expected, 1e-9)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (output, expected)), strict=True):
        assert_near(a, b, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_number_formats_and_head_sizes(dtype, dim, device, poisoned) -> None:
    for heads, kv_heads in ((8, 8), (4, 1), (8, 1)):
        _compare(packed_attention, [33, 1, 95], heads, kv_heads, dim, dtype, device)


def test_a_thousand_documents(device) -> None:
    lengths = [1 + i % 7 for i in range(1000)]
    _compare(packed_attention, lengths, 2, 1, 16, torch.float32, device)


def test_a_document_does_not_affect_other_documents() -> None:
    for attention in IMPLEMENTATIONS.values():
        q, k, v, cu_seqlens = attention_inputs([6, 9, 4], 2, 2, 8)
        output = attention(q, k, v, cu_seqlens, max_seqlen=9)
        changed_inputs = [x.detach().clone() for x in (q, k, v)]
        for x in changed_inputs:
            x[6:15] += 1
        changed_output = attention(*changed_inputs, cu_seqlens, max_seqlen=9)
        assert torch.equal(output[:6], changed_output[:6])
        assert torch.equal(output[15:], changed_output[15:])
        assert not torch.equal(output[6:15], changed_output[6:15])


def test_empty_inputs_are_accepted(device) -> None:
    empty = torch.empty(0, 2, 8, device=device, requires_grad=True)
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device=device)
    for name in ("triton", "reference") if device.type == "cpu" else ("triton",):
        with force(packed_attention=name):
            out = packed_attention(empty, empty, empty, cu_seqlens, max_seqlen=0)
        assert out.shape == (0, 2, 8)
        assert torch.autograd.grad(out.sum(), empty)[0].shape == (0, 2, 8)


def test_empty_documents_are_skipped() -> None:
    for attention in IMPLEMENTATIONS.values():
        q, k, v, _ = attention_inputs([4, 3], 2, 2, 8)
        boundaries_with_empty_documents, boundaries = torch.tensor([0, 0, 4, 4, 7, 7]), torch.tensor([0, 4, 7])
        torch.testing.assert_close(
            attention(q, k, v, boundaries_with_empty_documents.int(), max_seqlen=4),
            attention(q, k, v, boundaries.int(), max_seqlen=4),
            rtol=0,
            atol=1e-12,
        )


def test_boundaries_changed_in_place_are_not_cached() -> None:
    q, k, v, cu_seqlens = attention_inputs([4, 4], 2, 2, 8)
    _bucketed(q, k, v, cu_seqlens, max_seqlen=4)
    cu_seqlens.copy_(torch.tensor([0, 1, 8]))
    torch.testing.assert_close(_bucketed(q, k, v, cu_seqlens, max_seqlen=7), naive_attention(q, k, v, cu_seqlens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(5, 3, 8)}, "no multiple"),
        ({"cu": torch.tensor([0, 5])}, "int32"),
        ({"q": torch.zeros(5, 8)}, "expected"),
        ({"window": 0}, "window=0"),
        ({"alibi_slopes": torch.zeros(3)}, r"\[H\] with H=4"),
        ({"q": torch.zeros(5, 4, 8).half()}, "one number format"),
    ],
)
def test_errors_name_wrong_shapes(changes, message) -> None:
    valid_inputs = {"q": torch.zeros(5, 4, 8), "k": torch.zeros(5, 2, 8), "cu": torch.tensor([0, 5], dtype=torch.int32)}
    inputs = valid_inputs | {key: value for key, value in changes.items() if key in valid_inputs}
    options = {key: value for key, value in changes.items() if key not in valid_inputs}
    with pytest.raises(ValueError, match=message):
        packed_attention(inputs["q"], inputs["k"], inputs["k"], inputs["cu"], max_seqlen=5, **options)


def test_errors_name_inconsistent_boundaries() -> None:
    q, cu_seqlens = torch.zeros(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen=4"):
        packed_attention(q, q, q, cu_seqlens, max_seqlen=4)
    with pytest.raises(ValueError, match="for T=5"):
        packed_attention(q, q, q, cu_seqlens - 1, max_seqlen=5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 16), (4, 1, 24)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("alibi", [False, True])
def test_triton_equals_dense_masked_attention(heads, kv_heads, dim, causal, window, alibi, device, poisoned) -> None:
    slopes = torch.linspace(0.1, 0.6, heads, device=device) if alibi else None
    for lengths in ([1], [70, 1, 40, 3], [90]):
        with force(packed_attention="triton"):
            _compare(
                packed_attention,
                lengths,
                heads,
                kv_heads,
                dim,
                torch.float32,
                device,
                causal=causal,
                window=window,
                alibi_slopes=slopes,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_triton_in_half_precision(dtype, dim, device, poisoned) -> None:
    with force(packed_attention="triton"):
        _compare(packed_attention, [37, 1, 26], 2, 1, dim, dtype, device)


def test_triton_accepts_any_strides_except_the_last(device) -> None:
    qkv = torch.randn(40, 3, 2, 16, device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 25, 40], dtype=torch.int32, device=device)
    q, k, v = qkv.unbind(1)
    with force(packed_attention="triton"):
        output = packed_attention(q, k, v, cu_seqlens, max_seqlen=25)
    expected = naive_attention(q, k, v, cu_seqlens)
    assert_near(output, expected, 1e-5)
    upstream = torch.randn_like(expected)
    assert_near(gradients_of(output, (qkv,), upstream)[0], gradients_of(expected, (qkv,), upstream)[0], 1e-5)


@pytest.fixture
def flash_attn(monkeypatch):
    """Replaces flash-attn 2.8 by naive attention with the same signature; returns the arguments of its calls."""
    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append((max_seqlen_q, max_seqlen_k, causal, window_size))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert dropout_p == 0.0
        left, right = window_size
        assert not (causal and right > 0)
        window = None if left < 0 else left + 1
        return naive_attention(
            q, k, v, cu_seqlens_q, causal=causal, scale=softmax_scale, window=window, alibi_slopes=alibi_slopes
        )

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("alibi", [False, True])
def test_flash_attn_is_called_with_its_signature(flash_attn, causal, window, alibi) -> None:
    slopes = torch.tensor([0.5, 0.1]) if alibi else None

    def run(q, k, v, cu_seqlens, *, max_seqlen, **options):
        return flash.flash_attn_2(q, k, v, cu_seqlens, max_seqlen, causal, 0.3, window, slopes)

    _compare(run, [7, 1, 12], 2, 1, 8, causal=causal, scale=0.3, window=window, alibi_slopes=slopes)
    expected_window = (-1, -1) if window is None else (3, 0 if causal else 3)
    assert flash_attn == [(12, 12, causal, expected_window)]


def _varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1]
    return naive_attention(query, key, value, cu_seq_q, causal=is_causal)


def _varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1]
    return _windowed(query, key, value, cu_seq_q, scale, window_size)


def _varlen_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return _windowed(query, key, value, cu_seq_q, scale, window_size)


def _windowed(q, k, v, cu_seqlens, scale, window_size):
    left, right = window_size
    return naive_attention(q, k, v, cu_seqlens, causal=right == 0, scale=scale, window=None if left < 0 else left + 1)


@pytest.mark.parametrize("version", [_varlen_2_10, _varlen_2_11, _varlen_2_12])
@pytest.mark.parametrize("causal", [True, False])
def test_torch_varlen_is_called_with_the_signature_of_each_version(version, causal, monkeypatch) -> None:
    import inspect

    monkeypatch.setattr(flash, "_varlen", lambda: (version, frozenset(inspect.signature(version).parameters)))
    assert flash.varlen_has_window() == (version is not _varlen_2_10)

    def run(q, k, v, cu_seqlens, *, max_seqlen, **_):
        return flash.torch_varlen(q, k, v, cu_seqlens, max_seqlen, causal, 0.3, window, None)

    for window in (None, 4) if flash.varlen_has_window() else (None,):
        _compare(run, [7, 1, 12], 4, 2, 8, causal=causal, scale=0.3, window=window)


def test_the_installed_torch_has_a_known_varlen_signature() -> None:
    _, parameters = flash._varlen()
    assert {"cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= parameters
    assert parameters & {"is_causal", "window_size"}


def test_efficient_attention_has_the_expected_signature_shapes_and_gradient() -> None:
    """It has no CPU kernel; the `meta` device checks its signature and shapes."""
    from fireflyds_kernels.packed_attention import efficient

    q, k, v = (torch.empty(9, heads, 16, device="meta", dtype=torch.float16, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.empty(3, device="meta", dtype=torch.int32)
    out = efficient.packed_attention(q, k, v, cu_seqlens, 5, True, 0.25, None, None)
    assert out.shape == (9, 4, 16)
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert any("EfficientAttention" in name for name in names)


def test_a_forced_implementation_that_cannot_run_is_refused() -> None:
    q, cu_seqlens = torch.zeros(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    with force(packed_attention="efficient"), pytest.raises(CannotRunError, match="needs an NVIDIA GPU.*reference"):
        packed_attention(q, q, q, cu_seqlens, max_seqlen=5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 100}, {"alibi": True}])
def test_every_implementation_on_this_gpu(dtype, dim, options) -> None:
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.linspace(0.01, 0.5, 8, device="cuda")
    capability = dispatch.capability_of(torch.device("cuda"))
    key = dispatch.DispatchKey("cuda", capability, dtype, dim, "window" in options, "alibi_slopes" in options)
    runnable = dispatch.runnable("packed_attention", key)
    assert "bucketed" in runnable
    for implementation in runnable:
        with force(packed_attention=implementation):
            _compare(packed_attention, [700, 1, 333, 64], 8, 2, dim, dtype, "cuda", **options)
