"""Models that hold a text model beside towers: the text is trained, everything else stays what it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from fireflyds import app
from fireflyds.config import Precision, RowInit
from fireflyds.errors import UserError
from fireflyds.export.merged_weights import merged_entries
from fireflyds.export.older_readers import with_older_keys
from fireflyds.export.publish import trained_logits, write_weights
from fireflyds.models.deferred import deferred_model
from fireflyds.models.load import architecture_of, bare_model, config_of
from fireflyds.models.packed.equivalence import compare_implementations
from fireflyds.models.text_model import plain_class, trained_class
from fireflyds.models.tuning import load_tuned_model
from fireflyds.tokenizer.row_init import NewRows
from fireflyds.tokenizer.rows import expand_model

TEXT = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
KINDS = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 12}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12, "linear_value_head_dim": 12}
# By model type: settings of the text model, those of the tower, and the layer of text that the base calls otherwise.
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gemma3": (KINDS | {"tie_word_embeddings": True}, VISION, "language_model.model.embed_tokens.weight"),
    "qwen3_5": (
        DELTA | {"layer_types": ["linear_attention", "full_attention"], "tie_word_embeddings": False},
        QWEN_VISION,
        "model.language_model.embed_tokens.weight",
    ),
    "qwen3_vl": (
        {"tie_word_embeddings": False},
        QWEN_VISION | {"deepstack_visual_indexes": [0]},
        "model.language_model.embed_tokens.weight",
    ),
    "mistral3": (
        {"model_type": "ministral3", "tie_word_embeddings": False},
        VISION | {"model_type": "pixtral", "head_dim": 8},
        "language_model.model.embed_tokens.weight",
    ),
}
IMAGE_TOKENS = dict.fromkeys(
    ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id",
     "boi_token_index", "eoi_token_index"), 3
)  # fmt: skip
PREDICTOR = "mtp.layers.0.mlp.gate_proj.weight"


def save_wrapper(model_type: str, folder: Path) -> Path:
    """Saves a tiny wrapper as transformers does, with a tensor that only other programs read."""
    text, vision, _ = WRAPPERS[model_type]
    config = AutoConfig.for_model(model_type, text_config=TEXT | text, vision_config=vision, **IMAGE_TOKENS)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    for part in (config, config.text_config):
        part.bos_token_id = part.eos_token_id = part.pad_token_id = None
    torch.manual_seed(0)
    model = plain_class(config)._from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {PREDICTOR: torch.randn(3, 5)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("model_type", WRAPPERS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_text_is_trained_and_all_else_is_written_bit_for_bit(model_type: str, method: str, tmp_path: Path) -> None:
    base, out = save_wrapper(model_type, tmp_path / "base"), tmp_path / "out"
    before = load_file(base / "model.safetensors")
    assert WRAPPERS[model_type][2] in before
    keys = ["run=x", f"model={base}", "data=c/d", "optim.steps=3", f"tuning={method}", "tuning.dropout=0"]
    config = app.compose("train", keys)
    hf_config = config_of("model", str(base))
    bare = bare_model(hf_config)
    is_tied = bare.get_output_embeddings().weight is bare.get_input_embeddings().weight
    assert is_tied == WRAPPERS[model_type][0]["tie_word_embeddings"]
    model = load_tuned_model(config, hf_config, Precision.fp32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        assert "vision" not in name
        assert "visual" not in name
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    out.mkdir()
    copied = write_weights(out, hf_config, merged_entries(model, torch.float32), torch.float32, base)
    after = load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    assert (out / "preprocessor_config.json").is_file()
    text = {name for name in before if "language_model" in name or name == "lm_head.weight"}
    assert copied == len(before.keys() - text)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - text)
    changed = {name for name in text if not torch.equal(after[name], before[name])}
    matrices = {name for name in text if after[name].dim() == 2 and "embed" not in name and "lm_head" not in name}
    assert changed == text if method == "full" else changed <= matrices and len(changed) >= 10
    written = config_of("model", str(out))
    assert written.architectures == json.loads((base / "config.json").read_text())["architectures"]
    reloaded = plain_class(written).from_pretrained(out, attn_implementation="eager").eval()
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected = reloaded(ids).logits
    logits = trained_logits(model, ids)
    assert float((logits - expected).abs().max()) <= 5e-5 * float(expected.abs().max())


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_packed_documents_of_the_text_model_are_single_ones(model_type: str, tmp_path: Path) -> None:
    base = save_wrapper(model_type, tmp_path)
    model = trained_class(config_of("model", str(base))).from_pretrained(base, attn_implementation="eager").eval()
    results = list(compare_implementations(model, [5, 1, 70, 33], seed=1))
    assert results
    assert all(result.proven for result in results), results


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_rows_are_added_to_the_text_model(model_type: str, tmp_path: Path) -> None:
    base = save_wrapper(model_type, tmp_path / "base")
    result = expand_model(base, tmp_path / "out", NewRows(64, [[3, 4], [5]], RowInit.mean, seed=0))
    assert result["base_vocab_sizes"] == [64]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["text_config"]["vocab_size"], config["text_config"]["base_vocab_size"]) == (66, 64)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    grown = {name for name in before if after[name].shape != before[name].shape}
    assert grown == {name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    for name in before:
        assert torch.equal(after[name][: len(before[name])], before[name]), name
    loaded = plain_class(config_of("model", str(tmp_path / "out"))).from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape == (66, 48)


def test_a_second_table_of_embeddings_is_refused_by_name(tmp_path: Path) -> None:
    base = save_wrapper("qwen3_vl", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.language_model.embed_tokens_per_layer.weight"] = torch.zeros(64, 4)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="embed_tokens_per_layer.weight is a second table"):
        expand_model(base, tmp_path / "out", NewRows(64, [[3]], RowInit.mean, seed=0))


def test_a_head_among_the_weights_counts_where_the_configuration_is_silent(tmp_path: Path) -> None:
    """transformers' default is tied for the wrapper of Mistral 3, and untied for its text model."""
    base = save_wrapper("mistral3", tmp_path)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    model = bare_model(config_of("model", str(base)))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_a_wrapper_from_scratch_is_refused_by_name() -> None:
    keys = ["run=x", "data=c/d", "model=at_path", "model.path=", "model.init=scratch", "optim.steps=3"]
    config = app.compose("train", [*keys, "model.architecture={model_type: gemma3}", "model.tokenizer=x"])
    with pytest.raises(UserError, match="gemma3 holds a text model beside towers.*gemma3_text"):
        architecture_of(config.model)


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_weights_of_a_wrapper_are_read_one_by_one_when_they_are_sharded(model_type: str, tmp_path: Path) -> None:
    """Also where its files have the names of older versions of transformers."""
    base = save_wrapper(model_type, tmp_path)
    model = deferred_model(str(base), config_of("model", str(base)), torch.float32)
    assert model is not None
    whole = trained_class(model.config).from_pretrained(base).state_dict()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta
        assert torch.equal(parameter.read(), whole[name]), name


def test_older_readers_find_their_keys_in_the_text_model() -> None:
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    text = {"rope_parameters": {"full_attention": rope, "sliding_attention": local}, "dtype": "bfloat16"}
    written = with_older_keys({"model_type": "gemma3", "text_config": text})
    older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "torch_dtype": "bfloat16"}
    older["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert written == {"model_type": "gemma3", "text_config": text | older}
    # A kind that they do not know has none of their keys, and neither has a model without rotary embeddings.
    later = {"rope_parameters": {"full_attention": rope | {"rope_type": "proportional"}, "sliding_attention": local}}
    assert with_older_keys(later) == later
    assert with_older_keys({"model_type": "bloom"}) == {"model_type": "bloom"}
