"""Scaled rotary positions: known values, what reaches the model's configuration, and packed documents alike."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fireflyds.config import ModelConfig, ModelInit
from fireflyds.errors import UserError
from fireflyds.models.packed.forward import fuse
from fireflyds.models.rope_scaling import apply_rope_scaling, check_max_positions, ntk_alpha, ntk_base
from fireflyds.testing.models import loss_of_documents, packed_inputs

LLAMA2 = {"max_position_embeddings": 4096, "hidden_size": 4096, "num_attention_heads": 32}
KINDS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "ntk": {"rope_type": "ntk", "alpha": 3.0},
}


def _scaled(settings: dict, **architecture) -> LlamaConfig:
    model_config = ModelConfig(init=ModelInit.pretrained, path="x", rope_scaling=settings)
    return apply_rope_scaling(LlamaConfig(**(LLAMA2 | architecture)), model_config)


def test_known_bases_of_ntk_scaling() -> None:
    assert ntk_alpha(8192, 4096 / 2) == pytest.approx(3.0)
    assert ntk_base(1e4, 3.0, 128) == pytest.approx(30_527.7, abs=0.05)
    assert ntk_alpha(4096, 1024, 1.1) == pytest.approx(3.3)
    assert ntk_base(1e4, 3.3, 128) == pytest.approx(33_631.4, abs=0.05)
    scaled = _scaled({"rope_type": "ntk_auto", "seq_len": 8192})
    assert scaled.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(30_527.7, abs=0.05)}
    assert scaled.max_position_embeddings == 8192
    settings = {"rope_type": "ntk_auto", "seq_len": 4096, "half_context": 1024, "coefficient": 1.1}
    assert _scaled(settings, max_position_embeddings=2048).rope_parameters["rope_theta"] == pytest.approx(
        33_631.4, abs=0.05
    )


@pytest.mark.parametrize(
    ("kind", "max_positions"),
    [("linear", 16384), ("dynamic", 4096), ("yarn", 16384), ("llama3", 16384), ("ntk", 12288)],
)
def test_scaling_reaches_the_model_s_configuration(kind: str, max_positions: int, tmp_path: Path) -> None:
    config = _scaled(KINDS[kind])
    assert config.max_position_embeddings == max_positions
    check_max_positions(config, "seq_len", 10_000)
    config.save_pretrained(tmp_path)
    reloaded = LlamaConfig.from_pretrained(tmp_path)
    assert reloaded.rope_parameters == config.rope_parameters
    if kind in ("yarn", "llama3"):
        assert reloaded.rope_parameters["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_separate_documents_with_scaled_positions(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = _scaled(KINDS[kind], vocab_size=50, intermediate_size=64, num_hidden_layers=2, **sizes)
    model = LlamaForCausalLM(config)
    documents = [torch.randint(0, 50, (length,)) for length in (40, 5, 23)]
    unscaled_config = LlamaConfig(vocab_size=50, intermediate_size=64, num_hidden_layers=2, **sizes)
    unscaled_model = LlamaForCausalLM(unscaled_config)
    unscaled_model.load_state_dict(model.state_dict())
    expected_loss = loss_of_documents(model, documents)
    assert (expected_loss - loss_of_documents(unscaled_model, documents)).abs() > 1e-4
    torch.testing.assert_close(fuse(model)(**packed_inputs(documents)), expected_loss, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loss_of_documents(reloaded, documents), expected_loss, rtol=1e-5, atol=1e-5)


def test_errors_name_wrong_settings() -> None:
    for settings, message in (
        ({"rope_type": "lienar", "factor": 2}, "rope_type=lienar: no such kind. Known: default, linear"),
        ({"rope_type": "linear"}, "factor is missing. Settings of linear: factor"),
        ({"rope_type": "linear", "factor": 2, "beta": 1}, "beta is not one of its settings"),
        ({"rope_type": "ntk_auto", "seq_len": 2048}, "alpha=0 would shrink"),
        ({"rope_type": "ntk", "alpha": 0}, "model.rope_scaling.alpha=0: must be a number of at least 1"),
        ({"rope_type": "ntk", "alpha": "4"}, "model.rope_scaling.alpha='4': must be a number of at least 1"),
        ({"rope_type": "linear", "factor": 0}, "model.rope_scaling.factor=0: must be a number of at least 1"),
        ({"rope_type": "yarn", "factor": -2}, "model.rope_scaling.factor=-2: must be a number of at least 1"),
        ({"rope_type": "dynamic", "factor": "4"}, "model.rope_scaling.factor='4': must be a number of at least 1"),
        ({"rope_type": "linear", "factor": True}, "model.rope_scaling.factor=True: must be a number of at least 1"),
        (
            {"rope_type": "linear", "factor": float("inf")},
            "model.rope_scaling.factor=inf: must be a number of at least 1",
        ),
        (
            {"rope_type": "yarn", "factor": 2, "beta_fast": 0},
            "model.rope_scaling.beta_fast=0: must be a number above 0",
        ),
        ({"rope_type": "yarn", "factor": 2, "truncate": 1}, "model.rope_scaling.truncate=1: must be true or false"),
    ):
        with pytest.raises(UserError, match=message):
            _scaled(settings)
    scaled = _scaled(KINDS["linear"])
    with pytest.raises(UserError, match=r"scaled already \(linear\)"):
        apply_rope_scaling(scaled, ModelConfig(init=ModelInit.pretrained, path="x", rope_scaling=KINDS["yarn"]))
    with pytest.raises(
        UserError, match="seq_len=5000: the model has 4096 positions. Use 4096 or less, or extend the context"
    ):
        check_max_positions(LlamaConfig(**LLAMA2), "seq_len", 5000)
