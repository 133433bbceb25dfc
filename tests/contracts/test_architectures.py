"""Architectures without a written family, as tiny random models of transformers' own classes: packed documents train as
single ones, adapters go onto every linear layer, and merged weights are those of the plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAST, LENGTHS, LONG, NO_DROPOUT, SLOW, SMALL, model_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmo2 import modeling_olmo2
from transformers.pytorch_utils import Conv1D

from fireflyds import app, registry
from fireflyds.config import Precision, TrainableRows, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.export.merged_weights import merged_entries
from fireflyds.export.publish import trained_logits
from fireflyds.models.derived_family import FAMILIES, derive_family
from fireflyds.models.load import family_of
from fireflyds.models.packed.derived_check import require_equivalence, small_config
from fireflyds.models.packed.equivalence import compare_implementations
from fireflyds.models.packed.forward import fuse
from fireflyds.models.tuning import apply_tuning
from fireflyds.optim.param_groups import notes_on_experts
from fireflyds.zero.sharding import shard_parameters

CASES = [
    *(pytest.param(*case, id=name) for name, case in FAST.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_packed_documents_train_as_single_ones(model_type: str, changes: dict[str, Any]) -> None:
    results = list(compare_implementations(model_of(model_type, changes), LENGTHS, seed=1))
    assert results
    assert all(result.proven for result in results), results


# The head, the last layer of Mamba's mixers, whose kernel takes its weight, and layers whose weights Gemma 3n reads.
LEFT_OUT = ("lm_head", "mamba.out_proj", "mixer.out_proj", "prediction_coefs", "correction_coefs")
UNPACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", NO_DROPOUT | {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "llama": ("llama", {}),  # a written family
    "gemma2": FAST["gemma2"],  # soft caps, which transformers' sdpa leaves out
}


@pytest.mark.parametrize(("model_type", "changes"), UNPACKED.values(), ids=UNPACKED)
def test_without_packing_every_document_runs_by_itself(model_type: str, changes: dict[str, Any]) -> None:
    results = list(compare_implementations(model_of(model_type, changes), LENGTHS, seed=1, packed=False))
    assert [result.implementation for result in results] == ["not packed"]
    assert results[0].proven, results


@pytest.mark.parametrize("name", ["gptj", "mpt"])
def test_attention_of_its_own_is_refused_with_what_to_give(name: str) -> None:
    with pytest.raises(UserError, match="does not use transformers' AttentionInterface.*Give packing=false"):
        fuse(model_of(*UNPACKED[name]))


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_merged_adapters_are_the_plain_models_weights(model_type: str, changes: dict[str, Any]) -> None:
    model, plain = model_of(model_type, changes), model_of(model_type, changes, seed=1)
    linear = [name for name, layer in model.get_decoder().named_modules() if type(layer) in (nn.Linear, Conv1D)]
    config = TuningConfig(method=TuningMethod.lora, r=2, alpha=4.0, dropout=0.1)
    apply_tuning(model, family_of(model.config), config, None, 0)
    adapted = [name for name, layer in model.get_decoder().named_modules() if hasattr(layer, "lora_A")]
    assert adapted == [name for name in linear if not name.endswith(LEFT_OUT)]
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ids = torch.randint(0, 128, (1, 30), generator=generator)
    logits = trained_logits(model, ids)
    plain.load_state_dict({name: entry.make() for name, entry in merged_entries(model).items()})
    with torch.no_grad():
        expected = plain(ids).logits
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["gemma3", "granite", "phi3 longrope", "llama4"])
def test_new_rows_train_and_are_written_into_one_matrix(name: str) -> None:
    """Gemma scales its embeddings, Granite their sum; the plain model has the joined rows."""
    model, plain = model_of(*FAST[name]), model_of(*FAST[name], seed=1)
    config = TuningConfig(
        method=TuningMethod.lora, r=2, alpha=4.0, embeddings=TrainableRows.new_rows, head=TrainableRows.new_rows
    )
    apply_tuning(model, family_of(model.config), config, 100, 0)
    trained = model.get_input_embeddings().trainable
    assert trained.shape == (28, 48)
    trained.data.add_(1.0)
    ids = torch.arange(90, 128)[None]
    logits = trained_logits(model, ids)
    plain.load_state_dict({name: entry.make() for name, entry in merged_entries(model).items()}, strict=False)
    with torch.no_grad():
        expected = plain(ids).logits
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "method", "note"),
    [
        ("qwen3_moe", "lora", "no adapters on the experts, which hold"),
        ("qwen3_moe", "full", "no loss that balances the load"),
        ("lfm2", "lora", None),  # the weights of its convolutions have three dimensions too
        ("gemma3", "full", None),
    ],
)
def test_what_is_not_done_with_experts_is_said(name: str, method: str, note: str | None) -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", f"tuning={method}"])
    notes = notes_on_experts(model_of(*FAST[name]), config)
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_stage_3_refuses_layers_that_run_once_for_every_document() -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", "zero=3"])
    with pytest.raises(UserError, match="zero.stage=3: Lfm2ShortConv runs once for every document"):
        shard_parameters(model_of(*FAST["lfm2"]), {}, config, Precision.fp32)


@pytest.mark.parametrize("name", registry.names(FAMILIES))
def test_the_derived_family_of_a_written_one_is_the_written_one(name: str) -> None:
    written = registry.load(FAMILIES, name).FAMILY
    settings = {"num_attention_heads": 4, "hidden_size": 48, "num_hidden_layers": 2}
    with torch.device("meta"):
        derived = derive_family(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)))
    if name != "falcon":  # its layers are of a class of its own, which the written family knows
        assert set(derived.linear_layers) == set(written.linear_layers)
    assert derived.fused == written.fused


def test_a_derived_family_is_compared_once(tmp_path: Path) -> None:
    config = AutoConfig.for_model("olmo2", **SMALL | {"num_hidden_layers": 9, "hidden_size": 512})
    lines: list[str] = []
    require_equivalence(config, Precision.fp32, lines.append, tmp_path)
    assert "no family is written for olmo2" in lines[0]
    assert "proven" in lines[0]
    require_equivalence(config, Precision.fp32, lines.append, tmp_path)
    assert len(lines) == 1
    long = LONG | {"original_max_position_embeddings": 4096}
    scaled = small_config(AutoConfig.for_model("phi3", **SMALL | {"rope_parameters": long}))
    assert scaled.rope_parameters["original_max_position_embeddings"] == 100  # shorter than a document of the check
    small = small_config(config)
    assert (small.num_hidden_layers, small.hidden_size, small.num_attention_heads) == (2, 512, 4)


def test_an_architecture_that_differs_is_refused_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_olmo2.Olmo2MLP.forward

    def leaking(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x + x.mean(dim=1, keepdim=True))

    monkeypatch.setattr(modeling_olmo2.Olmo2MLP, "forward", leaking)
    with pytest.raises(UserError, match=r"NOT EQUAL") as refusal:
        require_equivalence(AutoConfig.for_model("olmo2", **SMALL), Precision.fp32, print, tmp_path)
    assert "model=olmo2" in str(refusal.value)
    assert not list(tmp_path.iterdir())
