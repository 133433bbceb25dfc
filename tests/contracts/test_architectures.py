"""Architectures without a written family, as tiny random models of transformers' own classes: packed documents train as
single ones, adapters go onto every linear layer, and merged weights are those of the plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmo2 import modeling_olmo2
from transformers.pytorch_utils import Conv1D

from fireflyds import app, registry
from fireflyds.config import Precision, TrainableRows, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.export.merged_weights import merged_entries
from fireflyds.export.publish import packed_logits
from fireflyds.models.derived_family import FAMILIES, derive_family
from fireflyds.models.load import family_of
from fireflyds.models.packed.derived_check import require_equivalence, small_config
from fireflyds.models.packed.equivalence import compare_implementations
from fireflyds.models.tuning import apply_tuning
from fireflyds.optim.param_groups import notes_on_experts
from fireflyds.zero.sharding import shard_parameters

LENGTHS = [5, 1, 70, 33, 90]
SMALL = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
ONE_OF_EACH = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2} | {
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10} | {
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12, "linear_value_head_dim": 12}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [1.7] * 6,
    "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0,
}  # fmt: skip
# By the name of the case: model type, and what differs from SMALL.
FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", ONE_OF_EACH | {"head_dim": 12, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", ONE_OF_EACH | {"head_dim": 12, "query_pre_attn_scalar": 12}),
    "phi3 longrope": (
        "phi3", NO_DROPOUT | {"rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": None}
    ),
    "gpt2": ("gpt2", NO_DROPOUT | {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 256}),
    "granite": ("granite", {"embedding_multiplier": 9.0, "logits_scaling": 5.0, "residual_multiplier": 0.3}),
    "cohere2": ("cohere2", ONE_OF_EACH | {"head_dim": 12, "logit_scale": 0.3}),
    "nemotron": ("nemotron", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 12, "decoder_sparse_step": 1}),
    "deepseek_v3": ("deepseek_v3", EXPERTS | LATENT | {"routed_scaling_factor": 1.5}),
    "gpt_oss": ("gpt_oss", EXPERTS | ONE_OF_EACH | {"head_dim": 12}),
    "llama4": (
        "llama4_text",
        EXPERTS | {"head_dim": 12, "attention_chunk_size": 24, "layer_types": ["chunked_attention", "full_attention"]}
        | {"interleave_moe_layer_step": 1, "no_rope_layers": [1, 0], "intermediate_size_mlp": 80},
    ),
    "qwen3_5": ("qwen3_5_text", DELTA | {"head_dim": 12, "layer_types": ["linear_attention", "full_attention"]}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 80}),
    "hunyuan": (
        "hunyuan_v1_dense",
        {"head_dim": 12, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 500.0, "factor": 1.0}},
    ),
}  # fmt: skip
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"head_dim": 12}),
    "phi": ("phi", NO_DROPOUT | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "opt": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 48, "dropout": 0.0}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", ONE_OF_EACH),
    "olmoe": ("olmoe", EXPERTS),
    "glm": ("glm", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "glm4_moe": ("glm4_moe", EXPERTS | {"head_dim": 12, "partial_rotary_factor": 0.5, "use_qk_norm": True}),
    "glm4_moe_lite": ("glm4_moe_lite", EXPERTS | LATENT),
    "granitemoe": ("granitemoe", EXPERTS | {"logits_scaling": 5.0, "intermediate_size": 24}),
    "deepseek_v2": ("deepseek_v2", EXPERTS | LATENT | {"topk_method": "group_limited_greedy"}),
    "minicpm3": ("minicpm3", LATENT | {"scale_emb": 9, "scale_depth": 1.3, "dim_model_base": 24}),
    "cohere": ("cohere", {"logit_scale": 0.2}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "ernie4_5": ("ernie4_5", {"head_dim": 12}),
    "ernie4_5_moe": ("ernie4_5_moe", EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "hunyuan_moe": ("hunyuan_v1_moe", EXPERTS | {"head_dim": 12, "moe_topk": 2}),
    "seed_oss": ("seed_oss", {"head_dim": 12, "residual_dropout": 0.0, "attention_dropout": 0.0}),
    "exaone4": ("exaone4", ONE_OF_EACH),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"decoder_sparse_step": 1}),
    "mixtral": ("mixtral", EXPERTS | {"sliding_window": None}),
    "minimax_m2": ("minimax_m2", EXPERTS | {"head_dim": 12, "rotary_dim": 8}),
    "qwen3_next": (
        "qwen3_next", EXPERTS | DELTA | {"head_dim": 12, "layer_types": ["linear_attention", "full_attention"]}
    ),
    "bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", MAMBA | {"head_dim": 12, "mamba_d_ssm": 96, "lm_head_multiplier": 0.5}),
    "helium": ("helium", {"head_dim": 12}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "ministral3": ("ministral3", {"head_dim": 12}),
    "starcoder2": ("starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 20}),
}  # fmt: skip
CASES = [
    *(pytest.param(*case, id=name) for name, case in FAST.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]


def model_of(model_type: str, changes: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **SMALL | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # norms begin at one and biases at zero: every part must count
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_packed_documents_train_as_single_ones(model_type: str, changes: dict[str, Any]) -> None:
    results = list(compare_implementations(model_of(model_type, changes), LENGTHS, seed=1))
    assert results
    assert all(result.proven for result in results), results


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_merged_adapters_are_the_plain_models_weights(model_type: str, changes: dict[str, Any]) -> None:
    model, plain = model_of(model_type, changes), model_of(model_type, changes, seed=1)
    linear = [name for name, layer in model.get_decoder().named_modules() if type(layer) in (nn.Linear, Conv1D)]
    config = TuningConfig(method=TuningMethod.lora, r=2, alpha=4.0, dropout=0.1)
    apply_tuning(model, family_of(model.config), config, None, 0)
    adapted = [name for name, layer in model.get_decoder().named_modules() if hasattr(layer, "lora_A")]
    assert adapted == [name for name in linear if name != "lm_head" and not name.endswith("mamba.out_proj")]
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ids = torch.randint(0, 128, (1, 30), generator=generator)
    logits = packed_logits(model, ids)
    plain.load_state_dict({name: entry.make() for name, entry in merged_entries(model).items()})
    with torch.no_grad():
        expected = plain(ids).logits
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["gemma3", "granite", "phi3 longrope"])
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
    logits = packed_logits(model, ids)
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
