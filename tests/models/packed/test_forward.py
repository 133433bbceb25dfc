"""The packed forward pass equals the model's own, document by document, in loss, gradients and training."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from fireflyds_kernels import dispatch
from torch import nn

from fireflyds import registry
from fireflyds.config import TrainableRows, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.models import tuning
from fireflyds.models.packed import fused_modules, head
from fireflyds.models.packed.equivalence import compare_implementations
from fireflyds.models.packed.forward import fuse
from fireflyds.testing.models import loss_of_documents, packed_inputs, random_documents, tiny_model

FAMILIES = "fireflyds.models.families"
LLAMA = {"num_key_value_heads": 2}
# Every family, and every branch of the functions that compute it.
MODELS = {
    "llama": ("llama", LLAMA),
    "llama tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "internlm as llama": ("llama", {"attention_bias": True}),
    "llama with NTK": (
        "llama",
        LLAMA
        | {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama with gelu": ("llama", LLAMA | {"hidden_act": "gelu"}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2 with windows": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 5}),
    "mistral without a window": ("mistral", LLAMA | {"sliding_window": None}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "bloom of 6 heads": ("bloom", {"n_head": 6, "n_layer": 2, "hidden_size": 24}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon with ALiBi": ("falcon", {"alibi": True, "multi_query": False}),
    "falcon of groups": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    # No family of ours: transformers' attention interface and our loss.
    "gemma": ("gemma", LLAMA | {"head_dim": 8}),
    "gpt-neox": ("gpt_neox", {}),
}


def test_every_family_has_a_case() -> None:
    assert set(registry.names(FAMILIES)) <= {model_type for model_type, _ in MODELS.values()}


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_equal_separate_documents(name: str) -> None:
    model_type, changes = MODELS[name]
    reference_model, model = tiny_model(model_type, **changes), fuse(tiny_model(model_type, **changes))
    expected = loss_of_documents(reference_model, random_documents())
    expected.backward()
    batch = packed_inputs(random_documents())
    loss = model(**batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(model.named_parameters(), reference_model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(model(**batch, compute=head.token_losses).sum(), loss)
    expected_logits = torch.cat([reference_model(ids[None]).logits[:, -1] for ids in random_documents()])
    torch.testing.assert_close(model(**batch, compute=head.next_token_logits), expected_logits, rtol=1e-4, atol=1e-5)
    total, token_losses = model(**batch, compute=head.loss_sum_and_token_losses)
    assert torch.equal(total, loss)
    torch.testing.assert_close(token_losses, model(**batch, compute=head.token_losses).detach())
    torch.testing.assert_close(model(**batch, num_labels=sum(len(ids) - 1 for ids in random_documents())), loss)


@pytest.mark.parametrize("changes", [{"multi_query": False}, {"multi_query": True}, {"num_attention_heads": 6}])
def test_falcons_alibi_is_rounded_as_in_transformers(changes: dict) -> None:
    """Slope times position is rounded to 8 bits there: beyond 256 tokens, and for slopes that are no powers of two."""
    settings = {"alibi": True, "hidden_size": 24, "max_position_embeddings": 512} | changes
    model = tiny_model("falcon", **settings)
    lengths = [7, 400, 30]
    results = list(compare_implementations(model, lengths, seed=0))
    assert results
    assert all(result.proven for result in results), results


@pytest.mark.parametrize("family", registry.names(FAMILIES))
def test_twenty_steps_of_training_end_at_the_same_weights(family: str) -> None:
    """Losses within 1e-4 of each other and weights within 2e-4 of their size, float32, SGD with momentum."""
    changes = next(changes for model_type, changes in MODELS.values() if model_type == family)
    reference_model, fused_model = tiny_model(family, **changes), fuse(tiny_model(family, **changes))
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in (reference_model, fused_model)
    ]
    first_loss = last_loss = None
    for number in range(20):
        documents = random_documents(seed=number % 4)
        losses = [loss_of_documents(reference_model, documents) / 19, fused_model(**packed_inputs(documents)) / 19]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert abs(losses[0].item() - losses[1].item()) < 1e-4, number
        first_loss, last_loss = first_loss or losses[1].item(), losses[1].item()
    assert last_loss < first_loss - 0.3
    for a, b in zip(fused_model.parameters(), reference_model.parameters(), strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("family", registry.names(FAMILIES))
def test_modules_of_the_family_table_run_on_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = registry.load(FAMILIES, family).FAMILY.fused
    changes = next(changes for model_type, changes in MODELS.values() if model_type == family)
    model = fuse(tiny_model(family, **changes))
    replaced_forwards = {type(m).__name__: m.forward.__func__.__name__ for m in model.modules() if "forward" in vars(m)}
    replaced_forwards.pop(type(model).__name__)
    assert replaced_forwards == dict(table)
    selected_kernels: list[str] = []
    select = dispatch._select
    monkeypatch.setattr(
        dispatch, "_select", lambda kernel, *arguments: selected_kernels.append(kernel) or select(kernel, *arguments)
    )
    model(**packed_inputs(random_documents()))
    kernels = {"norm": "rms_norm", "gated_mlp": "swiglu", "rotary_attention": "rope", "mistral_attention": "rope"}
    expected_kernels = {kernels[function] for function in table.values() if function in kernels}
    assert expected_kernels | {"packed_attention", "linear_cross_entropy"} <= set(selected_kernels)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, reentrant: bool) -> None:
    changes = next(changes for model_type, changes in MODELS.values() if model_type == family)
    reference_model, checkpointed_model = (
        fuse(tiny_model(family, **changes)).train(),
        fuse(tiny_model(family, **changes)).train(),
    )
    for model in (reference_model, checkpointed_model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    checkpointed_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed_model.enable_input_require_grads()
    reference_model(**packed_inputs(random_documents())).backward()
    checkpointed_model(**packed_inputs(random_documents())).backward()
    for (name, a), (_, b) in zip(
        checkpointed_model.named_parameters(), reference_model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_two_forward_passes_may_precede_the_backward_passes() -> None:
    """Recomputation uses the boundaries of the batch it recomputes."""
    reference_model, checkpointed_model = (fuse(tiny_model("llama", **LLAMA)).train() for _ in range(2))
    checkpointed_model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = packed_inputs(random_documents((7, 5))), packed_inputs(random_documents((5, 7)))
    for model in (reference_model, checkpointed_model):
        losses = [model(**batch) for batch in batches]
        losses[0].backward()
        losses[1].backward()
    for a, b in zip(checkpointed_model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_positions_are_not_searched_for_document_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would compute them again, with a device synchronisation."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: pytest.fail("called"))
    for name in ("llama", "qwen2 with windows", "mistral", "bloom", "falcon"):
        fuse(tiny_model(MODELS[name][0], **MODELS[name][1]))(**packed_inputs(random_documents()))


def test_torch_compile_accepts_a_fused_model() -> None:
    model, batch = fuse(tiny_model("llama", **LLAMA)), packed_inputs(random_documents())
    expected_loss = model(**batch)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**batch), expected_loss)


def _qlora(checkpointing: bool, dropout: float = 0.0):
    config = TuningConfig(
        method=TuningMethod.qlora, embeddings=TrainableRows.frozen, head=TrainableRows.frozen, r=4, dropout=dropout
    )
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, **LLAMA)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            layer = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            layer.load_state_dict({"weight": module.weight})
            model.model.set_submodule(name, layer.to("cpu"))
    # Set when a quantised model is loaded; PEFT selects its 4-bit layer by it.
    model.is_loaded_in_4bit = True
    tuning.apply_tuning(model, registry.load(FAMILIES, "llama").FAMILY, config, None, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)), std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_a_four_bit_base_equal_peft(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    original = fused_modules.qlora_linear
    monkeypatch.setattr(
        fused_modules,
        "qlora_linear",
        lambda *a, **options: calls.append(options["keep_weight"]) or original(*a, **options),
    )
    peft_model, fused_model = _qlora(False), fuse(_qlora(checkpointing))
    expected_loss = loss_of_documents(peft_model, random_documents())
    expected_loss.backward()
    loss = fused_model(**packed_inputs(random_documents()))
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert calls == [checkpointing] * 14 * (2 if checkpointing else 1)
    trained_parameters = [(n, p) for n, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trained_parameters) == 28
    for name, parameter in trained_parameters:
        torch.testing.assert_close(fused_model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_adapter_dropout_follows_the_mode_of_its_module() -> None:
    model = fuse(_qlora(False, dropout=0.5))
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(1, 5, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_disabled_adapter_gives_the_output_of_the_base_layer() -> None:
    model = fuse(_qlora(False))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 5, 64)
    adapter_output = layer(x)
    layer.enable_adapters(False)
    base_output = layer(x)
    torch.testing.assert_close(base_output, layer.base_layer(x))
    assert not torch.allclose(adapter_output, base_output)


def test_other_instances_of_the_class_are_not_fused() -> None:
    fuse(tiny_model("llama", **LLAMA))
    other_model = tiny_model("llama", **LLAMA)
    assert other_model(torch.randint(0, 50, (1, 5))).logits.shape == (1, 5, 50)
    assert not [module for module in other_model.modules() if "forward" in vars(module) or hasattr(module, "packing")]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("codegen", {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 8}, "model=codegen: .*AttentionInterface"),
        ("llama", LLAMA | {"attention_dropout": 0.1}, "attention_dropout=0.1.*Set it to 0"),
    ],
)
def test_unsupported_models_are_refused(model_type: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fuse(tiny_model(model_type, **changes))


def test_a_fused_model_requires_document_boundaries() -> None:
    model = fuse(tiny_model("llama", **LLAMA))
    with pytest.raises(TypeError, match="boundaries"):
        model.model(input_ids=torch.zeros(1, 3, dtype=torch.long))
