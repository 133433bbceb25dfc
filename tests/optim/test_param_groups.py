"""Parameter groups, the table of trained parameters, and combinations that are refused."""

import pytest
import torch

from fireflyds import app, registry
from fireflyds.config import Precision
from fireflyds.errors import UserError
from fireflyds.models import tuning
from fireflyds.models.neftune import add_embedding_noise
from fireflyds.models.packed.forward import fuse
from fireflyds.optim import param_groups
from fireflyds.optim.compatibility import check_compatibility, refuse_large_tensors
from fireflyds.optim.optimizers import gradient_clipping
from fireflyds.testing.models import packed_inputs, tiny_model


def _config(*overrides: str):
    return app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", *overrides])


def _groups(model_type: str, *overrides: str, **changes) -> dict[str, param_groups.ParamGroup]:
    config, family = _config(*overrides), registry.load("fireflyds.models.families", model_type).FAMILY
    model = tuning.apply_tuning(tiny_model(model_type, **changes), family, config.tuning, None, 0)
    return {group.name: group for group in param_groups.parameter_groups(model, config)}


def test_weight_decay_applies_to_matrices_and_to_vectors_only_if_configured() -> None:
    groups = _groups("falcon", "optim.weight_decay=0.1", alibi=False, bias=True, tie_word_embeddings=False)
    assert {name: group.weight_decay for name, group in groups.items()} == {
        "matrices": 0.1,
        "embeddings": 0.1,
        "head": 0.1,
        "norms": 0.0,
        "biases": 0.0,
    }
    assert {parameter.dim() for parameter in groups["matrices"].parameters} == {2}
    groups = _groups(
        "falcon",
        "optim.weight_decay=0.1",
        "optim.norms.weight_decay=0.2",
        "optim.biases.lr=0.5",
        alibi=False,
        bias=True,
    )
    assert (groups["norms"].weight_decay, groups["biases"].lr) == (0.2, 0.5)


def test_a_tied_head_belongs_to_the_embeddings_group() -> None:
    groups = _groups("llama", "optim.embeddings.lr=0.5", tie_word_embeddings=True)
    assert "head" not in groups
    assert [tuple(parameter.shape) for parameter in groups["embeddings"].parameters] == [(50, 32)]
    assert groups["embeddings"].lr == 0.5


def test_muon_applies_only_to_matrices_of_the_body() -> None:
    groups = _groups("llama", "optim=muon", "optim.muon_lr=0.03", tie_word_embeddings=False)
    assert {name: (group.as_matrices, group.lr) for name, group in groups.items()} == {
        "matrices": (True, 0.03),
        "embeddings": (False, 2e-4),
        "head": (False, 2e-4),
        "norms": (False, 2e-4),
    }


def test_every_trained_parameter_is_in_one_group() -> None:
    for overrides in (["tuning=full"], ["tuning=dora", "tuning.embeddings=all"], ["tuning=embeddings_and_norms"]):
        config, family = _config(*overrides), registry.load("fireflyds.models.families", "qwen2").FAMILY
        model = tuning.apply_tuning(tiny_model("qwen2", tie_word_embeddings=False), family, config.tuning, None, 0)
        parameter_ids = [id(p) for group in param_groups.parameter_groups(model, config) for p in group.parameters]
        assert sorted(parameter_ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_table_counts_bytes_of_weights_gradients_masters_and_states() -> None:
    for precision, optim, bytes_per_parameter in (
        (Precision.fp32, "adamw", 4 + 4 + 4 + 8),
        (Precision.bf16, "adamw", 2 + 2 + 4 + 8),
        (Precision.fp16, "adamw_8bit", 2 + 2 + 4 + 2),
    ):
        config = _config(f"optim={optim}", "tuning.head=frozen")
        model = tiny_model("llama", tie_word_embeddings=False)
        tuning.apply_tuning(model, registry.load("fireflyds.models.families", "llama").FAMILY, config.tuning, None, 0)
        rows = {row.group: row for row in param_groups.summarize_groups(model, config, precision)}
        assert rows["embeddings"].memory_bytes == bytes_per_parameter * 50 * 32
        assert rows["frozen"].parameters == 50 * 32
        assert rows["frozen"].memory_bytes == 50 * 32 * (4 if precision is Precision.fp32 else 2)
        assert f"{50 * 32:,}" in param_groups.format_groups(list(rows.values()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["tuning=qlora", "tuning.bits=8", "zero=3"],
            r"tuning.bits=8: .* zero.stage=3 give wrong losses. Use zero=2, or tuning.bits=4",
        ),
        (["tuning=qlora", "tuning.use_dora=true", "zero=3"], "tuning.use_dora=true: .*Use tuning.bits=4 with zero=2"),
        (
            ["tuning=qlora", "tuning.use_dora=true", "tuning.bits=8"],
            "tuning.use_dora=true: .*Use tuning.bits=4 with zero=2",
        ),
        (["optim=paged_adamw_32bit", "zero.offload_optimizer=cpu"], "zero.offload_optimizer=cpu: .*Use optim=adamw"),
        (["zero=0"], "hardware.precision=fp16: DeepSpeed scales no loss with zero.stage=0.*Use zero=1"),
        (["optim=adamw_8bit", "zero.offload_optimizer=cpu"], "optim=adamw_8bit is of bitsandbytes.*Use optim=adamw"),
    ],
)
def test_incompatible_combinations_are_refused_with_an_alternative(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_compatibility(_config(*overrides), Precision.fp16)


def test_a_learning_rate_for_a_group_without_trained_parameters_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"optim.head.lr=0.5: no parameter of that group trains \(a tied head is embeddings\)"
    ):
        _groups("llama", "optim.head.lr=0.5", tie_word_embeddings=True)
    with pytest.raises(UserError, match="optim=muon: with tuning=lora no matrix of the body trains"):
        check_compatibility(_config("optim=muon", "tuning=lora"), Precision.fp32)


def test_changed_and_unusual_settings_give_notes() -> None:
    muon = _config("optim=muon", "optim.max_grad_norm=1")
    assert "optim.max_grad_norm=1 is taken as 0" in check_compatibility(muon, Precision.fp32)[0]
    assert gradient_clipping(muon) == 0
    assert (
        "can be read but not written"
        in check_compatibility(_config("tuning=lora", "tuning.embeddings=all"), Precision.fp32)[0]
    )
    assert check_compatibility(_config(), Precision.fp32) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neftune_noise_scales_with_the_length_of_each_document(dtype: torch.dtype) -> None:
    model = fuse(tiny_model("llama").to(dtype))
    # Times the width beyond what float16 can hold.
    lengths, width = (2200, 3), 32
    documents = [torch.randint(0, 50, (length,)) for length in lengths]
    embedding_outputs = []
    embeddings = model.get_input_embeddings()
    add_embedding_noise(model, 10.0)
    embeddings.register_forward_hook(lambda module, inputs, output: embedding_outputs.append(output.detach()[0]))
    model(**packed_inputs(documents))
    model.eval()(**packed_inputs(documents))
    noise = embedding_outputs[0] - embedding_outputs[1]
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        bound = 10.0 / (length * width) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * (1 if dtype is torch.float32 else 1.1)
        assert part.float().mean().abs() < 0.2 * bound


@pytest.mark.parametrize(
    ("stage", "ranks", "wrong", "remedy"),
    [
        (1, 1, True, "zero=3, 4 GPUs or more"),
        (2, 2, True, "zero=3, 4 GPUs or more"),  # int32 would wrap to a positive number: a third would be updated
        (2, 3, True, "zero=3, 4 GPUs or more"),
        (2, 4, False, ""),
        (3, 1, False, ""),
        (0, 1, False, ""),
    ],
)
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit"])
def test_a_flat_partition_beyond_int32_is_refused_for_bitsandbytes(name, stage, ranks, wrong, remedy) -> None:
    layers = [[4096 * 4096] * 4 * 32 + [4096 * 11_008] * 3 * 32 + [55_296 * 4096] * 2, [4096] * 65]
    assert sum(layers[0]) > 3 * 2**31
    config = _config(f"optim={name}")
    if not wrong:
        refuse_large_tensors(config, layers, stage, ranks)
        return
    with pytest.raises(UserError, match=f"optim.name={name}: bitsandbytes counts .* in part. Use {remedy}"):
        refuse_large_tensors(config, layers, stage, ranks)
    refuse_large_tensors(_config("optim=adamw"), layers, stage, ranks)


def test_limits_of_int32_hold_for_single_parameters_and_sub_groups() -> None:
    config = _config("optim=adamw_8bit")
    with pytest.raises(UserError, match="2,147,483,648"):
        refuse_large_tensors(config, [[2**31, 5]], 0, 8)
    refuse_large_tensors(config, [[2**31 - 1, 2**31 - 1]], 0, 8)
    with pytest.raises(UserError, match="3,000,000,000"):
        refuse_large_tensors(config, [[6 * 10**9]], 3, 2, sub_group_size=3 * 10**9)


def test_eight_bit_weights_need_a_gpu_that_has_them() -> None:
    config = _config("tuning=qlora", "tuning.bits=8", "zero=2")
    with pytest.raises(UserError, match="tuning.bits=8: LLM.int8 needs a GPU of sm_75 or newer; this one is sm_70"):
        check_compatibility(config, Precision.fp16, capability=70)
    for capability in (0, 75, 90):
        check_compatibility(config, Precision.fp16, capability=capability)
