"""The kernels under torch.compile and under both kinds of gradient checkpointing."""

import pytest
import torch
from fireflyds_kernels import force, linear_cross_entropy, packed_attention, rms_norm, rope, swiglu
from packed import assert_near
from torch.utils.checkpoint import checkpoint


def _layer(x, norm, w, cu_seqlens, table):
    """A layer and a loss that use every kernel."""
    tokens = x.shape[0]
    q, k, v = (x @ w[0]).view(tokens, 3, 2, 8).unbind(1)
    q, k = rope(q, k, table.cos(), table.sin())
    attended = packed_attention(q, k, v, cu_seqlens, max_seqlen=29).flatten(1)
    normed, total = rms_norm(attended, norm, 1e-6, residual=x)
    return total + swiglu(normed @ w[1], normed)


def _loss(x, norm, w, head, labels, cu_seqlens, table, run_layer):
    hidden = run_layer(_layer, x, norm, w, cu_seqlens, table)
    return (
        linear_cross_entropy(hidden, head, labels)
        + linear_cross_entropy(hidden, (head[:20], head[20:]), labels, reduction="none").sum()
    )


@pytest.fixture
def inputs(device):
    torch.manual_seed(0)
    leaves = (torch.randn(40, 16), torch.ones(16), torch.randn(2, 16, 48) * 0.2, torch.randn(50, 16))
    x, norm, w, head = (leaf.to(device).requires_grad_() for leaf in leaves)
    labels = torch.randint(0, 50, (40,), device=device)
    labels[::3] = -100
    cu_seqlens = torch.tensor([0, 10, 11, 40], dtype=torch.int32, device=device)
    table = torch.randn(40, 4, device=device).repeat(1, 2)
    return (x, norm, w, head), (labels, cu_seqlens, table)


def _call(function, *arguments):
    return function(*arguments)


def _layer_weights(w):
    return w[0], w[1][:, :16]


def _run(leaves, other_inputs, run_layer=_call, wrap=lambda loss_function: loss_function):
    x, norm, w, head = leaves
    function = wrap(lambda x, norm, a, b, head, *other_inputs: _loss(x, norm, (a, b), head, *other_inputs, run_layer))
    loss = function(x, norm, *_layer_weights(w), head, *other_inputs)
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("kind", ["chosen", "triton"])
def test_torch_compile_captures_all_kernels_in_one_graph(inputs, kind) -> None:
    """In one graph, with fake tensors, forward and backward."""
    with force(*(["triton"] if kind == "triton" else [])):
        expected_loss, expected_gradients = _run(*inputs)
        torch._dynamo.reset()
        loss, gradients = _run(*inputs, wrap=lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
    assert_near(loss, expected_loss, 1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(inputs, reentrant) -> None:
    expected_loss, expected_gradients = _run(*inputs)

    def run_layer(function, *arguments):
        return checkpoint(function, *arguments, use_reentrant=reentrant)

    x, norm, w, head = inputs[0]
    a, b = _layer_weights(w)

    def layer(x, norm, a, b, cu_seqlens, table):
        return _layer(x, norm, (a, b), cu_seqlens, table)

    labels, cu_seqlens, table = inputs[1]
    hidden = run_layer(layer, x, norm, a, b, cu_seqlens, table)
    loss = (
        linear_cross_entropy(hidden, head, labels)
        + linear_cross_entropy(hidden, (head[:20], head[20:]), labels, reduction="none").sum()
    )
    assert torch.equal(loss, expected_loss)
    loss.backward()
    for leaf, expected in zip(inputs[0], expected_gradients, strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    "operator",
    [
        "packed_attention_reference",
        "packed_attention_triton",
        "rms_norm",
        "rms_norm_residual",
        "rope",
        "swiglu",
        "linear_cross_entropy_sum",
        "linear_cross_entropy_each",
    ],
)
def test_registered_operators_pass_opcheck(inputs, operator) -> None:
    import importlib

    for module in ("packed_attention.triton", "rms_norm.triton", "rope.triton", "swiglu.triton"):
        importlib.import_module(f"fireflyds_kernels.{module}")
    (x, norm, _, head), (labels, cu_seqlens, table) = inputs
    if operator == "packed_attention_reference":  # runs on the CPU
        x, cu_seqlens = x.cpu(), cu_seqlens.cpu()
    q = torch.randn(40, 2, 8, device=x.device, requires_grad=True)
    arguments = {
        "packed_attention_reference": (q, q, q, cu_seqlens, 29, True, 0.3, None, None),
        "packed_attention_triton": (q, q, q, cu_seqlens, True, 0.3, None, None),
        "rms_norm": (x, norm, 1e-6),
        "rms_norm_residual": (x, x.detach().clone().requires_grad_(), norm, 1e-6),
        "rope": (q, q.detach().clone().requires_grad_(), table, table, 1.0),
        "swiglu": (x, x.detach().clone().requires_grad_()),
        "linear_cross_entropy_sum": (x, [head], labels, None, None, -100, None, [True, False, True], False, True, 0.0),
        "linear_cross_entropy_each": (x, [head], labels, None, -100, None, False, 0.0),
    }[operator]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.fireflyds, operator), arguments, test_utils=checks)
