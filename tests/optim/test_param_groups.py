"""Parameter groups, the table of what trains, and combinations that are refused."""

import pytest
import torch

from fireflyds import app, registry
from fireflyds.config import Precision
from fireflyds.errors import UserError
from fireflyds.models import tuning
from fireflyds.models.neftune import add_embedding_noise
from fireflyds.models.packed.forward import fuse
from fireflyds.optim import param_groups
from fireflyds.optim.compatibility import check_compatibility
from fireflyds.optim.optimizers import gradient_clipping
from fireflyds.testing.models import packed_inputs, tiny_model


def _config(*overrides: str):
    return app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", *overrides])


def _groups(model_type: str, *overrides: str, **changes) -> dict[str, param_groups.ParamGroup]:
    config, family = _config(*overrides), registry.load("fireflyds.models.families", model_type).FAMILY
    model = tuning.apply_tuning(tiny_model(model_type, **changes), family, config.tuning, None, 0)
    return {group.name: group for group in param_groups.parameter_groups(model, config)}


def test_matrices_decay_and_vectors_do_not_unless_asked() -> None:
    found = _groups("falcon", "optim.weight_decay=0.1", alibi=False, bias=True, tie_word_embeddings=False)
    assert {name: group.weight_decay for name, group in found.items()} == {
        "matrices": 0.1,
        "embeddings": 0.1,
        "head": 0.1,
        "norms": 0.0,
        "biases": 0.0,
    }
    assert {parameter.dim() for parameter in found["matrices"].parameters} == {2}
    found = _groups(
        "falcon",
        "optim.weight_decay=0.1",
        "optim.norms.weight_decay=0.2",
        "optim.biases.lr=0.5",
        alibi=False,
        bias=True,
    )
    assert (found["norms"].weight_decay, found["biases"].lr) == (0.2, 0.5)


def test_a_tied_head_is_the_embeddings() -> None:
    found = _groups("llama", "optim.embeddings.lr=0.5", tie_word_embeddings=True)
    assert "head" not in found
    assert [tuple(parameter.shape) for parameter in found["embeddings"].parameters] == [(50, 32)]
    assert found["embeddings"].lr == 0.5


def test_muon_takes_the_body_s_matrices_alone() -> None:
    found = _groups("llama", "optim=muon", "optim.muon_lr=0.03", tie_word_embeddings=False)
    assert {name: (group.as_matrices, group.lr) for name, group in found.items()} == {
        "matrices": (True, 0.03),
        "embeddings": (False, 2e-4),
        "head": (False, 2e-4),
        "norms": (False, 2e-4),
    }


def test_every_parameter_that_trains_is_in_one_group() -> None:
    for overrides in (["tuning=full"], ["tuning=dora", "tuning.embeddings=all"], ["tuning=embeddings_and_norms"]):
        config, family = _config(*overrides), registry.load("fireflyds.models.families", "qwen2").FAMILY
        model = tuning.apply_tuning(tiny_model("qwen2", tie_word_embeddings=False), family, config.tuning, None, 0)
        grouped = [id(p) for group in param_groups.parameter_groups(model, config) for p in group.parameters]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_table_counts_bytes_of_weights_gradients_masters_and_states() -> None:
    for precision, optim, each in (
        (Precision.fp32, "adamw", 4 + 4 + 4 + 8),
        (Precision.bf16, "adamw", 2 + 2 + 4 + 8),
        (Precision.fp16, "adamw_8bit", 2 + 2 + 4 + 2),
    ):
        config = _config(f"optim={optim}", "tuning.head=frozen")
        model = tiny_model("llama", tie_word_embeddings=False)
        tuning.apply_tuning(model, registry.load("fireflyds.models.families", "llama").FAMILY, config.tuning, None, 0)
        rows = {row.group: row for row in param_groups.summarize_groups(model, config, precision)}
        assert rows["embeddings"].memory_bytes == each * 50 * 32
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
def test_combinations_that_cannot_work_are_refused_with_the_nearest(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_compatibility(_config(*overrides), Precision.fp16)


def test_a_rate_for_a_group_in_which_nothing_trains_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"optim.head.lr=0.5: no parameter of that group trains \(a tied head is embeddings\)"
    ):
        _groups("llama", "optim.head.lr=0.5", tie_word_embeddings=True)
    with pytest.raises(UserError, match="optim=muon: with tuning=lora no matrix of the body trains"):
        check_compatibility(_config("optim=muon", "tuning=lora"), Precision.fp32)


def test_what_is_changed_or_strange_is_said_aloud() -> None:
    muon = _config("optim=muon", "optim.max_grad_norm=1")
    assert "optim.max_grad_norm=1 is taken as 0" in check_compatibility(muon, Precision.fp32)[0]
    assert gradient_clipping(muon) == 0
    assert (
        "can be read but not written"
        in check_compatibility(_config("tuning=lora", "tuning.embeddings=all"), Precision.fp32)[0]
    )
    assert check_compatibility(_config(), Precision.fp32) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_is_as_wide_as_each_document_s_length_says(dtype: torch.dtype) -> None:
    model = fuse(tiny_model("llama").to(dtype))
    # Times the width beyond what float16 can hold.
    lengths, width = (2200, 3), 32
    documents = [torch.randint(0, 50, (length,)) for length in lengths]
    seen = []
    embeddings = model.get_input_embeddings()
    add_embedding_noise(model, 10.0)
    embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()[0]))
    model(**packed_inputs(documents))
    model.eval()(**packed_inputs(documents))
    noise = seen[0] - seen[1]
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        bound = 10.0 / (length * width) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * (1 if dtype is torch.float32 else 1.1)
        assert part.float().mean().abs() < 0.2 * bound
