"""The fused loss equals cross entropy over the whole logits, in values and gradients."""

import pytest
import torch
from fireflyds_kernels import force, linear_cross_entropy
from fireflyds_kernels.linear_cross_entropy import chunked, gradients, reference
from packed import TOLERANCES, assert_near
from torch.nn.functional import cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 1300])
@pytest.mark.parametrize("labelled_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_cross_entropy_forward_and_backward(rows: int, labelled_share: float, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(97, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(97, generator=generator, dtype=torch.float64, requires_grad=True) if with_bias else None
    labels = torch.randint(0, 97, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= labelled_share] = -100
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    expected_loss = cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), labels, reduction="sum", ignore_index=-100
    )
    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-3, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected_loss, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    token_losses = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none")
    assert token_losses.shape == (rows,)
    assert (token_losses[labels == -100] == 0).all()
    torch.testing.assert_close(token_losses.sum(), loss, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none", "both"])
@pytest.mark.parametrize("implementation", ["chunked", "triton", "reference"])
def test_capped_logits_equal_cross_entropy_over_them(reduction, implementation, monkeypatch, device) -> None:
    monkeypatch.setitem(chunked.WHOLE_BYTES, "cpu", 30 * 97 * 4)
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 30 * 97 * 4)
    hidden, weight, labels = (x.detach().to(device) for x in _inputs(200, torch.float32))
    weight *= 3  # logits far beyond the cap
    leaves = [hidden.requires_grad_(), weight[:60].clone().requires_grad_(), weight[60:].clone().requires_grad_()]
    logits = torch.tanh(torch.nn.functional.linear(leaves[0], torch.cat(leaves[1:])) / 2.5) * 2.5
    expected = cross_entropy(logits, labels, reduction="none" if reduction == "none" else "sum", ignore_index=-100)
    upstream = torch.linspace(0.5, 2, 200, device=device) if reduction == "none" else torch.tensor(3.0, device=device)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    with force(implementation):
        loss = linear_cross_entropy(leaves[0], leaves[1:], labels, reduction=reduction, softcap=2.5)
        loss = loss[0] if reduction == "both" else loss
        gradients = torch.autograd.grad(loss, leaves, upstream)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="softcap=2.5"):
        linear_cross_entropy(leaves[0], weight, labels, bias=torch.zeros(97), softcap=2.5)


def test_logits_are_computed_only_for_labelled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_shapes: list[torch.Size] = []
    compute_logits = chunked._logits
    monkeypatch.setattr(
        chunked,
        "_logits",
        lambda *arguments: logits_shapes.append(compute_logits(*arguments).shape) or compute_logits(*arguments),
    )
    hidden, weight = torch.randn(4000, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels = torch.full((4000,), -100)
    labels[:3] = 5
    linear_cross_entropy(hidden, weight, labels).backward()
    assert logits_shapes == [(3, 1000)]


def _inputs(rows: int, dtype: torch.dtype = torch.float64, vocab: int = 97, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_results_do_not_depend_on_the_number_of_chunks(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = _inputs(200)
    upstream = torch.randn(200, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0, dtype=torch.float64)
    results = []
    for size in (1 << 27, 97 * 16 * 8):
        monkeypatch.setitem(chunked.WHOLE_BYTES, "cpu", size)
        monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", size)
        monkeypatch.setattr(gradients, "_SLICE_ELEMENTS", 16 * 40)
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight), upstream)))
    for unchunked, chunked_result in zip(*results, strict=True):
        torch.testing.assert_close(unchunked, chunked_result)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_token_weights_scale_loss_and_gradients(reduction: str) -> None:
    hidden, weight, labels = _inputs(60)
    weights = torch.rand(60, dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction=reduction).sum()
    labelled = labels != -100
    expected_loss = (reference.token_losses(hidden[labelled], weight, labels[labelled]) * weights[labelled]).sum()
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-6)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected_loss, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_the_new_rows_of_a_head_may_train(reduction: str) -> None:
    hidden, weight, labels = _inputs(60)
    old_rows, new_rows = weight.detach()[:80].clone(), weight.detach()[80:].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, (old_rows, new_rows), labels, reduction=reduction).sum()
    expected_loss = linear_cross_entropy(hidden, weight, labels).sum()
    torch.testing.assert_close(loss, expected_loss)
    loss.backward(retain_graph=True)
    assert old_rows.grad is None
    torch.testing.assert_close(new_rows.grad, torch.autograd.grad(expected_loss, weight, retain_graph=True)[0][80:])
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected_loss, hidden)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_within_tolerance_of_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = _inputs(300, dtype, vocab=1000)
    labelled = labels != -100
    float64_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected_loss = reference.token_losses(float64_inputs[0][labelled], float64_inputs[1], labels[labelled]).sum()
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-3, atol=0)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected_loss, float64_inputs), strict=True
    ):
        assert a.dtype is dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


def test_float16_gradients_do_not_underflow_with_a_mean_and_a_loss_scale() -> None:
    """Flat logits at V = 55,296: a mean over the tokens taken before the gradients are formed leaves only zeros."""
    vocab, rows = 55_296, 64
    hidden = (torch.randn(rows, 16) * 0.01).half().requires_grad_()
    weight = (torch.randn(vocab, 16) * 0.01).half().requires_grad_()
    labels = torch.randint(0, vocab, (rows,))
    scale = 2.0**12
    loss = linear_cross_entropy(hidden, weight, labels) * (scale / 4096)
    gradients_of_loss = [g.double() / scale for g in torch.autograd.grad(loss, (hidden, weight))]
    float64_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected_gradients = torch.autograd.grad(
        reference.token_losses(float64_inputs[0], float64_inputs[1], labels).sum() / 4096, float64_inputs
    )
    for a, b in zip(gradients_of_loss, expected_gradients, strict=True):
        assert (a - b).norm() < 5e-3 * b.norm()
    other_rows = torch.ones(vocab, dtype=torch.bool)
    other_rows[labels] = False
    assert (gradients_of_loss[1][other_rows] - expected_gradients[1][other_rows]).norm() < 0.05 * expected_gradients[1][
        other_rows
    ].norm()


def test_no_gradient_is_computed_for_frozen_inputs() -> None:
    hidden, weight, labels = _inputs(50)
    frozen = weight.detach()
    loss = linear_cross_entropy(hidden, frozen, labels)
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden)[0],
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)[0],
    )
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_errors_name_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"hidden \[T, d\]"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 6), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction='mean'"):
        linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long), reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token_weights \[T\] expected with T=3"):
        linear_cross_entropy(
            torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long), token_weights=torch.ones(2)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 97, 5000])
@pytest.mark.parametrize("extras", [False, True])
def test_triton_equals_the_definition(dtype, vocab, extras, device, poisoned) -> None:
    leaves = [x.detach().to(device).requires_grad_() for x in _inputs(60, dtype, vocab)[:2]]
    labels = _inputs(60, dtype, vocab)[2].to(device)
    float64_leaves = [x.detach().double().requires_grad_() for x in leaves]
    bias = torch.linspace(-1, 1, vocab, device=device) if extras else None
    weights = torch.linspace(0, 2, 60, device=device) if extras else None
    with force(linear_cross_entropy="reference"):
        expected_loss = linear_cross_entropy(
            *float64_leaves, labels, bias=None if bias is None else bias.double(), token_weights=weights
        )
    with force(linear_cross_entropy="triton"):
        loss = linear_cross_entropy(*leaves, labels, bias=bias, token_weights=weights)
        token_losses = linear_cross_entropy(*leaves, labels, bias=bias, token_weights=weights, reduction="none")
    assert_near(loss, expected_loss, TOLERANCES[dtype])
    assert_near(token_losses.sum(), expected_loss, TOLERANCES[dtype])
    expected_gradients = torch.autograd.grad(expected_loss, float64_leaves)
    for output in (loss, token_losses.sum()):
        for a, b in zip(torch.autograd.grad(output, leaves), expected_gradients, strict=True):
            assert_near(a, b, 2 * TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_reduction_both_gives_the_sum_and_gradients_of_reduction_sum(
    name, dtype, weighted, device, monkeypatch
) -> None:
    monkeypatch.setitem(chunked.WHOLE_BYTES, device.type, 97 * 16 * dtype.itemsize)
    monkeypatch.setitem(chunked.CHUNK_BYTES, device.type, 97 * 16 * dtype.itemsize)
    hidden, weight, labels = (x.detach().to(device) for x in _inputs(60, dtype))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    # As large as a loss scale: the float16 path divides by the largest weight and multiplies afterwards.
    weights = torch.linspace(0, 2.0**14, 60, device=device) if weighted else None
    with force(linear_cross_entropy=name):
        expected_total = linear_cross_entropy(hidden, weight, labels, token_weights=weights)
        total, token_losses = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction="both")
        expected_token_losses = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction="none")
    assert torch.equal(total, expected_total)
    for a, b in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(expected_total, (hidden, weight)), strict=True
    ):
        assert torch.equal(a, b)
    assert not token_losses.requires_grad
    assert token_losses.dtype is torch.float32
    assert (token_losses[labels == -100] == 0).all()
    assert (token_losses[labels != -100][1:] > 0).all()
    torch.testing.assert_close(token_losses, expected_token_losses.detach())
    torch.testing.assert_close(token_losses.double().sum(), total.detach().double(), rtol=1e-5, atol=0)


def test_token_losses_of_reduction_both_equal_the_definition() -> None:
    hidden, weight, labels = _inputs(60)
    labelled = labels != -100
    for blocks in (weight, (weight[:80], weight[80:])):
        _, token_losses = linear_cross_entropy(hidden, blocks, labels, reduction="both", num_labels=int(labelled.sum()))
        torch.testing.assert_close(
            token_losses[labelled], reference.token_losses(hidden[labelled], weight, labels[labelled]).detach()
        )
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, reduction="both")[1], token_losses)
    unlabelled = linear_cross_entropy(hidden, weight, torch.full((60,), -100), reduction="both")
    assert unlabelled[0] == 0
    assert torch.equal(unlabelled[1], torch.zeros(60, dtype=torch.float64))


def test_torch_compile_accepts_reduction_both() -> None:
    hidden, weight, labels = _inputs(20)
    compiled = torch.compile(
        lambda h: linear_cross_entropy(h, weight, labels, reduction="both"), fullgraph=True, backend="aot_eager"
    )
    actual, expected = compiled(hidden), linear_cross_entropy(hidden, weight, labels, reduction="both")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(torch.autograd.grad(actual[0], hidden)[0], torch.autograd.grad(expected[0], hidden)[0])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_num_labels_does_not_change_loss_and_gradients(reduction: str) -> None:
    hidden, weight, labels = _inputs(60)
    num_labels = int((labels != -100).sum())
    expected_loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, num_labels=num_labels).sum()
    assert torch.equal(expected_loss, loss)
    for a, b in zip(
        torch.autograd.grad(expected_loss, (hidden, weight)), torch.autograd.grad(loss, (hidden, weight)), strict=True
    ):
        assert torch.equal(a, b)


def test_a_wrong_num_labels_and_a_label_out_of_range_are_refused() -> None:
    hidden, weight, labels = _inputs(20)
    count = int((labels != -100).sum())
    for wrong_count in (count - 1, count + 1):
        with pytest.raises(ValueError, match=f"num_labels={wrong_count}, but {count} rows have a label"):
            linear_cross_entropy(hidden, weight, labels, num_labels=wrong_count)
    labels[0] = 97
    with pytest.raises(ValueError, match="97 for V=97"):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_labels_give_no_loss_and_zero_gradients(reduction: str, tokens: int) -> None:
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((tokens,), -100), reduction=reduction).sum()
    assert loss == 0
    for leaf, gradient in zip((hidden, weight), torch.autograd.grad(loss, (hidden, weight)), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["chunked", "triton"])
def test_float16_does_not_overflow_with_a_loss_scale_and_large_token_weights(reduction: str, name: str, device) -> None:
    """2^16 over 64 tokens, as DeepSpeed scales, and token weights of 100: nothing overflows, nothing is lost."""
    hidden, weight, labels = (x.to(device) for x in _inputs(64, torch.float16, vocab=3000, seed=3))
    hidden, weight = ((x.detach() * 0.1).requires_grad_() for x in (hidden, weight))
    weights = torch.linspace(1, 100, 64, device=device)
    float64_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    labelled = labels != -100
    expected_loss = (
        reference.token_losses(float64_inputs[0][labelled], float64_inputs[1], labels[labelled]) * weights[labelled]
    ).sum() * 2.0**10
    with force(linear_cross_entropy=name):
        loss = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction=reduction).sum() * 2.0**10
    scale = 2.0**-10  # what is compared fits float16
    for a, b in zip(
        torch.autograd.grad(loss * scale, (hidden, weight)),
        torch.autograd.grad(expected_loss * scale, float64_inputs),
        strict=True,
    ):
        assert_near(a, b, 2e-3)
        small_gradients = b.abs() < b.abs().quantile(0.5)
        assert_near(a[small_gradients], b[small_gradients], 5e-3)


def test_a_frequent_label_does_not_overflow_float16() -> None:
    """500 rows of one label: their head row's gradient times 1,024 is beyond float16."""
    hidden = torch.full((500, 16), 2.0, dtype=torch.float16, requires_grad=True)
    weight = (torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * 0.01).half().requires_grad_()
    labels = torch.full((500,), 7)
    float64_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected_gradients = torch.autograd.grad(reference.token_losses(*float64_inputs, labels).sum(), float64_inputs)
    for a, b in zip(
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight)),
        expected_gradients,
        strict=True,
    ):
        assert_near(a, b, 3e-3)


def test_a_float32_head_has_float32_gradients_with_bfloat16_inputs() -> None:
    hidden, weight, labels = _inputs(60, torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    loss = linear_cross_entropy(hidden, master, labels)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels))
    assert torch.autograd.grad(loss, master)[0].dtype is torch.float32


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_backward_may_run_twice(factor: float) -> None:
    hidden, weight, labels = _inputs(30)
    loss = linear_cross_entropy(hidden, weight, labels) * factor
    weight.grad = None
    loss.backward(retain_graph=True)
    weight_gradient = weight.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, 2 * weight_gradient)
    first_gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first_gradient, torch.autograd.grad(loss, weight)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labelled_share", [0.35, 1.0])
def test_a_large_head_on_this_gpu(dtype, labelled_share) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(3001, 512, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(55_296, 512, generator=generator, device="cuda") * 0.05).to(dtype).requires_grad_()
    labels = torch.randint(0, 55_296, (3001,), generator=generator, device="cuda")
    labels[torch.rand(3001, generator=generator, device="cuda") > labelled_share] = -100
    labelled = labels != -100
    float32_inputs = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected_loss = reference.token_losses(float32_inputs[0][labelled], float32_inputs[1], labels[labelled]).sum()
    expected_gradients = torch.autograd.grad(expected_loss, float32_inputs)
    for name in ("triton", "chunked"):
        with force(linear_cross_entropy=name):
            loss = linear_cross_entropy(hidden, weight, labels)
        assert_near(loss, expected_loss, 1e-3)
        for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), expected_gradients, strict=True):
            assert_near(a, b, 1.5e-2)
