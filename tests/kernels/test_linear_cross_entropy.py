"""The fused loss equals cross entropy over the whole logits, in values and gradients."""

import pytest
import torch
from fireflyds_kernels import force, linear_cross_entropy
from fireflyds_kernels.linear_cross_entropy import chunked, gradients, reference
from packed import TOLERANCES, assert_near
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


def test_logits_of_rows_without_a_label_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    whole = chunked._logits
    monkeypatch.setattr(
        chunked, "_logits", lambda *arguments: made.append(whole(*arguments).shape) or whole(*arguments)
    )
    hidden, weight = torch.randn(4000, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    labels = torch.full((4000,), -100)
    labels[:3] = 5
    linear_cross_entropy(hidden, weight, labels).backward()
    assert made == [(3, 1000)]


def _inputs(rows: int, dtype: torch.dtype = torch.float64, vocab: int = 97, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_many_chunks_are_one(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = _inputs(200)
    upstream = torch.randn(200, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0, dtype=torch.float64)
    found = []
    for size in (1 << 27, 97 * 16 * 8):
        monkeypatch.setitem(chunked.WHOLE_BYTES, "cpu", size)
        monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", size)
        monkeypatch.setattr(gradients, "_SLICE_ELEMENTS", 16 * 40)
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight), upstream)))
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tokens_are_weighted(reduction: str) -> None:
    hidden, weight, labels = _inputs(60)
    weights = torch.rand(60, dtype=torch.float64)
    ours = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction=reduction).sum()
    kept = labels != -100
    theirs = (reference.token_losses(hidden[kept], weight, labels[kept]) * weights[kept]).sum()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_head_may_train_its_new_rows_alone(reduction: str) -> None:
    hidden, weight, labels = _inputs(60)
    old, new = weight.detach()[:80].clone(), weight.detach()[80:].clone().requires_grad_()
    ours = linear_cross_entropy(hidden, (old, new), labels, reduction=reduction).sum()
    theirs = linear_cross_entropy(hidden, weight, labels).sum()
    torch.testing.assert_close(ours, theirs)
    ours.backward(retain_graph=True)
    assert old.grad is None
    torch.testing.assert_close(new.grad, torch.autograd.grad(theirs, weight, retain_graph=True)[0][80:])
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(theirs, hidden)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_types_stay_near_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = _inputs(300, dtype, vocab=1000)
    kept = labels != -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    theirs = reference.token_losses(exact[0][kept], exact[1], labels[kept]).sum()
    ours = linear_cross_entropy(hidden, weight, labels)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, exact), strict=True):
        assert a.dtype is dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


def test_float16_gradients_survive_a_mean_over_many_tokens_and_a_loss_scale() -> None:
    """Flat logits at V = 55,296: a mean over the tokens taken before the gradients are formed leaves only zeros."""
    vocab, rows = 55_296, 64
    hidden = (torch.randn(rows, 16) * 0.01).half().requires_grad_()
    weight = (torch.randn(vocab, 16) * 0.01).half().requires_grad_()
    labels = torch.randint(0, vocab, (rows,))
    scale = 2.0**12
    loss = linear_cross_entropy(hidden, weight, labels) * (scale / 4096)
    got = [g.double() / scale for g in torch.autograd.grad(loss, (hidden, weight))]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(reference.token_losses(exact[0], exact[1], labels).sum() / 4096, exact)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() < 5e-3 * b.norm()
    others = torch.ones(vocab, dtype=torch.bool)
    others[labels] = False
    assert (got[1][others] - wanted[1][others]).norm() < 0.05 * wanted[1][others].norm()


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    hidden, weight, labels = _inputs(50)
    frozen = weight.detach()
    loss = linear_cross_entropy(hidden, frozen, labels)
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden)[0],
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)[0],
    )
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_wrong_arguments_are_named() -> None:
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
    exact = [x.detach().double().requires_grad_() for x in leaves]
    bias = torch.linspace(-1, 1, vocab, device=device) if extras else None
    weights = torch.linspace(0, 2, 60, device=device) if extras else None
    with force(linear_cross_entropy="reference"):
        wanted = linear_cross_entropy(
            *exact, labels, bias=None if bias is None else bias.double(), token_weights=weights
        )
    with force(linear_cross_entropy="triton"):
        found = linear_cross_entropy(*leaves, labels, bias=bias, token_weights=weights)
        each = linear_cross_entropy(*leaves, labels, bias=bias, token_weights=weights, reduction="none")
    assert_near(found, wanted, TOLERANCES[dtype])
    assert_near(each.sum(), wanted, TOLERANCES[dtype])
    theirs = torch.autograd.grad(wanted, exact)
    for output in (found, each.sum()):
        for a, b in zip(torch.autograd.grad(output, leaves), theirs, strict=True):
            assert_near(a, b, 2 * TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_losses_beside_the_sum_change_neither_it_nor_gradients(name, dtype, weighted, device, monkeypatch) -> None:
    monkeypatch.setitem(chunked.WHOLE_BYTES, device.type, 97 * 16 * dtype.itemsize)
    monkeypatch.setitem(chunked.CHUNK_BYTES, device.type, 97 * 16 * dtype.itemsize)
    hidden, weight, labels = (x.detach().to(device) for x in _inputs(60, dtype))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    # As large as a loss scale: the float16 path divides by the largest and multiplies again.
    weights = torch.linspace(0, 2.0**14, 60, device=device) if weighted else None
    with force(linear_cross_entropy=name):
        plain = linear_cross_entropy(hidden, weight, labels, token_weights=weights)
        total, each = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction="both")
        wanted = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction="none")
    assert torch.equal(total, plain)
    for a, b in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        assert torch.equal(a, b)
    assert not each.requires_grad
    assert each.dtype is torch.float32
    assert (each[labels == -100] == 0).all()
    assert (each[labels != -100][1:] > 0).all()
    torch.testing.assert_close(each, wanted.detach())
    torch.testing.assert_close(each.double().sum(), total.detach().double(), rtol=1e-5, atol=0)


def test_the_losses_beside_the_sum_are_those_of_the_definition() -> None:
    hidden, weight, labels = _inputs(60)
    kept = labels != -100
    for blocks in (weight, (weight[:80], weight[80:])):
        _, each = linear_cross_entropy(hidden, blocks, labels, reduction="both", num_labels=int(kept.sum()))
        torch.testing.assert_close(each[kept], reference.token_losses(hidden[kept], weight, labels[kept]).detach())
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, reduction="both")[1], each)
    nothing = linear_cross_entropy(hidden, weight, torch.full((60,), -100), reduction="both")
    assert nothing[0] == 0
    assert torch.equal(nothing[1], torch.zeros(60, dtype=torch.float64))


def test_torch_compile_takes_the_losses_beside_the_sum() -> None:
    hidden, weight, labels = _inputs(20)
    compiled = torch.compile(
        lambda h: linear_cross_entropy(h, weight, labels, reduction="both"), fullgraph=True, backend="aot_eager"
    )
    found, wanted = compiled(hidden), linear_cross_entropy(hidden, weight, labels, reduction="both")
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(torch.autograd.grad(found[0], hidden)[0], torch.autograd.grad(wanted[0], hidden)[0])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_known_count_changes_nothing(reduction: str) -> None:
    hidden, weight, labels = _inputs(60)
    count = int((labels != -100).sum())
    plain = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    known = linear_cross_entropy(hidden, weight, labels, reduction=reduction, num_labels=count).sum()
    assert torch.equal(plain, known)
    for a, b in zip(
        torch.autograd.grad(plain, (hidden, weight)), torch.autograd.grad(known, (hidden, weight)), strict=True
    ):
        assert torch.equal(a, b)


def test_a_wrong_count_and_a_label_outside_are_named() -> None:
    hidden, weight, labels = _inputs(20)
    count = int((labels != -100).sum())
    for wrong in (count - 1, count + 1):
        with pytest.raises(ValueError, match=f"num_labels={wrong}, but {count} rows have a label"):
            linear_cross_entropy(hidden, weight, labels, num_labels=wrong)
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
def test_float16_takes_a_loss_scale_and_large_weights(reduction: str, name: str, device) -> None:
    """2^16 over 64 tokens, as DeepSpeed scales, and token weights of 100: nothing overflows, nothing is lost."""
    hidden, weight, labels = (x.to(device) for x in _inputs(64, torch.float16, vocab=3000, seed=3))
    hidden, weight = ((x.detach() * 0.1).requires_grad_() for x in (hidden, weight))
    weights = torch.linspace(1, 100, 64, device=device)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    kept = labels != -100
    wanted = (reference.token_losses(exact[0][kept], exact[1], labels[kept]) * weights[kept]).sum() * 2.0**10
    with force(linear_cross_entropy=name):
        found = linear_cross_entropy(hidden, weight, labels, token_weights=weights, reduction=reduction).sum() * 2.0**10
    scale = 2.0**-10  # what is compared fits float16
    for a, b in zip(
        torch.autograd.grad(found * scale, (hidden, weight)), torch.autograd.grad(wanted * scale, exact), strict=True
    ):
        assert_near(a, b, 2e-3)
        rare = b.abs() < b.abs().quantile(0.5)
        assert_near(a[rare], b[rare], 5e-3)


def test_a_frequent_label_does_not_overflow_float16() -> None:
    """500 rows of one label: their head row's gradient times 1,024 is beyond float16."""
    hidden = torch.full((500, 16), 2.0, dtype=torch.float16, requires_grad=True)
    weight = (torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * 0.01).half().requires_grad_()
    labels = torch.full((500,), 7)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(reference.token_losses(*exact, labels).sum(), exact)
    for a, b in zip(
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight)), wanted, strict=True
    ):
        assert_near(a, b, 3e-3)


def test_a_float32_head_keeps_its_type_beside_narrow_rows() -> None:
    hidden, weight, labels = _inputs(60, torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    loss = linear_cross_entropy(hidden, master, labels)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels))
    assert torch.autograd.grad(loss, master)[0].dtype is torch.float32


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_may_be_asked_for_twice(factor: float) -> None:
    hidden, weight, labels = _inputs(30)
    loss = linear_cross_entropy(hidden, weight, labels) * factor
    weight.grad = None
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, 2 * once)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.35, 1.0])
def test_a_large_head_on_this_gpu(dtype, share) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(3001, 512, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(55_296, 512, generator=generator, device="cuda") * 0.05).to(dtype).requires_grad_()
    labels = torch.randint(0, 55_296, (3001,), generator=generator, device="cuda")
    labels[torch.rand(3001, generator=generator, device="cuda") > share] = -100
    kept = labels != -100
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    wanted = reference.token_losses(exact[0][kept], exact[1], labels[kept]).sum()
    theirs = torch.autograd.grad(wanted, exact)
    for name in ("triton", "chunked"):
        with force(linear_cross_entropy=name):
            found = linear_cross_entropy(hidden, weight, labels)
        assert_near(found, wanted, 1e-3)
        for a, b in zip(torch.autograd.grad(found, (hidden, weight)), theirs, strict=True):
            assert_near(a, b, 1.5e-2)
