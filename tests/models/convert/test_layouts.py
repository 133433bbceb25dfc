"""Checkpoints in their makers' layouts give, converted, the logits of reference models written from the equations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from original_llamas import LLAMAS
from original_others import OTHERS, meta_llama_config, meta_llama_shards
from original_parts import Config, Layout, Weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fireflyds.errors import UserError
from fireflyds.models.convert.checkpoint import convert_checkpoint
from fireflyds.tokenizer.shards import save_sharded

LAYOUTS = LLAMAS | OTHERS
# Reference, changes of its configuration, and the architecture that it becomes.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "baichuan 7b": ("baichuan_7b", {"normalized_head": False}, "LlamaForCausalLM"),
    "baichuan2 7b": ("baichuan2_7b", {"normalized_head": True}, "LlamaForCausalLM"),
    "internlm 7b": ("internlm", {}, "LlamaForCausalLM"),
    "internlm 20b": ("internlm_20b", {}, "LlamaForCausalLM"),
    "internlm2": ("internlm2", {}, "LlamaForCausalLM"),
    "internlm2 biases": ("internlm2", {"bias": True}, "LlamaForCausalLM"),
    "internlm3": ("internlm3", {}, "LlamaForCausalLM"),
    "internlm3 biases": ("internlm3", {"bias": True, "qkv_bias": True}, "LlamaForCausalLM"),
    "qwen": ("qwen1", {}, "Qwen2ForCausalLM"),
    "chatglm2": ("chatglm2", {}, "GlmForCausalLM"),
    "chatglm2 32k": ("chatglm2", {"rope_ratio": 8}, "GlmForCausalLM"),
    "chatglm3 32k": ("chatglm3", {"rope_ratio": 8}, "GlmForCausalLM"),
    "minicpm": ("minicpm", {}, "GraniteForCausalLM"),
    "xverse": ("xverse", {}, "LlamaForCausalLM"),
    "yi": ("yi_old", {}, "LlamaForCausalLM"),
}
CODE = {"chatglm2": "positions = seq_idx / self.rope_ratio", "chatglm3": "base = base * self.rope_ratio"}


def save_original(folder: Path, config: Config, weights: Weights) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def difference(folder: Path, out: Path, expected: torch.Tensor, ids: torch.Tensor, architecture: str) -> float:
    """Converts `folder` to `out`, loads it, and returns the largest relative difference of its logits."""
    converted = convert_checkpoint(folder)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(converted.config))
    save_sharded(out, converted.entries)
    model, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == architecture
    with torch.no_grad():
        logits = model(ids).logits
    return float((logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("name", "changes", "architecture"), CASES.values(), ids=CASES)
def test_converted_weights_give_the_logits_of_the_published_equations(
    name: str, changes: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    layout: Layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(0)
    config = layout.config() | changes
    weights = layout.weights(config, generator)
    folder = save_original(tmp_path / "original", config, weights)
    (folder / f"modeling_{config['model_type']}.py").write_text(CODE.get(name, "raise SystemExit('never run')"))
    ids = torch.randint(3, 131, (2, 40), generator=generator)
    expected = layout.logits(config, weights, ids)
    assert difference(folder, tmp_path / "out", expected, ids, architecture) < 5e-6


@pytest.mark.parametrize("version", ["1", "2", "3", "3.1"])
@pytest.mark.parametrize("count", [1, 2])
def test_metas_parts_are_joined(version: str, count: int, tmp_path: Path) -> None:
    layout = LAYOUTS["meta_llama"]
    generator = torch.Generator().manual_seed(0)
    params = meta_llama_config(version)
    weights = layout.weights(params, generator)
    named = params | ({"rope_scaling_factor": 8} if version == "3.1" else {})
    (tmp_path / "params.json").write_text(json.dumps(named))
    for number, shard in enumerate(meta_llama_shards(params, weights, count)):
        torch.save(shard, tmp_path / f"consolidated.{number:02d}.pth")
    ids = torch.randint(3, 132, (2, 40), generator=generator)
    expected = layout.logits(params, weights, ids)
    assert difference(tmp_path, tmp_path / "out", expected, ids, "LlamaForCausalLM") < 5e-6


def test_quantised_weights_of_a_makers_layout_become_plain_in_one_go(tmp_path: Path) -> None:
    """A Qwen whose last products are in eight bits: the reference takes the same rounded weights."""
    layout = LAYOUTS["qwen1"]
    config, generator = layout.config() | {"torch_dtype": "float32"}, torch.Generator().manual_seed(0)
    weights = layout.weights(config, generator)
    stored, rounded = dict(weights), dict(weights)
    for name in [name for name in weights if name.endswith("c_proj.weight")]:
        largest = weights[name].abs().amax(1)
        stored[name] = (weights[name] / largest[:, None] * 127).round().to(torch.int8)
        stored[name.replace(".weight", ".SCB")] = largest
        rounded[name] = stored[name].float() * largest[:, None] / 127
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    folder = save_original(tmp_path / "original", config | settings, stored)
    ids = torch.randint(3, 131, (2, 40), generator=generator)
    expected = layout.logits(config, rounded, ids)
    assert difference(folder, tmp_path / "out", expected, ids, "Qwen2ForCausalLM") < 5e-6


def test_tensors_that_are_left_out_are_named(tmp_path: Path) -> None:
    layout = LAYOUTS["xverse"]
    weights = layout.weights(layout.config(), torch.Generator().manual_seed(0))
    folder = save_original(tmp_path / "original", layout.config(), weights)
    assert convert_checkpoint(folder).notes == ("left out, because it is computed or tied: rotary_emb.inv_freq",)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("baichuan_13b", {"normalized_head": False}, "has ALiBi.*Give it to train, evaluate and export as it is"),
    "rope_ratio": ("chatglm2", {"rope_ratio": 8}, "rope_ratio=8, which divides the positions in ChatGLM2"),
    "half the biases": ("internlm3", {"qkv_bias": True}, "qkv_bias=True: LLaMA has biases in all products"),
    "rotary": ("internlm", {"rotary": {"type": "other"}}, "rotary=.*only origin and dynamic are known"),
    "experts": ("minicpm", {"num_experts": 8}, "num_experts=8: a mixture of experts"),
    "sizes": (
        "xverse",
        {"intermediate_size": 100},
        r"is \[64, 152\], and LlamaForCausalLM has \[64, 100\]",
    ),
    "missing": ("xverse", {"num_hidden_layers": 4}, "model.layers.3.*is missing"),
    "more": ("xverse", {"num_hidden_layers": 2}, "LlamaForCausalLM has no such weight"),
    "known already": ("xverse", {"model_type": "llama"}, "model_type=llama is not converted.*known layouts: baichuan"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_an_architecture_cannot_express_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    weights = layout.weights(layout.config(), torch.Generator().manual_seed(0))
    folder = save_original(tmp_path / "original", layout.config() | changes, weights)
    with pytest.raises(UserError, match=message):
        convert_checkpoint(folder)


def test_the_small_models_of_llama_3_2_need_their_factor(tmp_path: Path) -> None:
    params = meta_llama_config("3.1")
    (tmp_path / "params.json").write_text(json.dumps(params))
    weights = LAYOUTS["meta_llama"].weights(params, torch.Generator().manual_seed(0))
    torch.save(weights, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match="no rope_scaling_factor, which is 32 for Llama 3.2"):
        convert_checkpoint(tmp_path)
