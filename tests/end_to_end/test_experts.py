"""A mixture of experts from its base to its export: adapters on experts, losses of routers, the load in the metrics."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from samples import ENGLISH
from transformers import AutoModelForCausalLM

ARCHITECTURE = (
    "{model_type: qwen3_moe, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, head_dim: 16, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 24, "
    "decoder_sparse_step: 1, max_position_embeddings: 256, initializer_range: 0.1}"
)
SMALL = ["seq_len=128", "micro_batch_size=1", "global_batch_size=4", "optim.lr=1e-2", "optim.schedule=constant"]
ADAPTERS = ["tuning=lora", "tuning.r=4", "tuning.dropout=0", "tuning.experts=true"]
LOSSES = ["objective.router_aux_loss=0.01", "objective.router_z_loss=0.001"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_adapters_on_experts_are_trained_and_exported(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    shutil.copytree(base_tokenizer, tmp_path / "tok")
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    verb("prepare", "data=en.txt", "tokenizer=tok", "out=en", "workers=1")
    scratch = ["model=at_path", "model.init=scratch", "model.tokenizer=tok", f"model.architecture={ARCHITECTURE}"]
    verb("train", "run=base", *scratch, "data=en", "optim.steps=2", *LOSSES, *SMALL)
    verb("export", "run=base")
    base = tmp_path / "runs" / "base" / "export"
    shared = ["model=runs/base/export", "data=en", *ADAPTERS, *SMALL, "zero=2"]
    verb("plan", *shared, "optim.steps=4", "cluster=cpu")
    verb("train", "run=adapted", *shared, "optim.steps=4", "checkpoint.every=2")
    rows = [json.loads(line) for line in (tmp_path / "runs" / "adapted" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"expert_load/0", "expert_load/1", "experts_unused"} <= rows[0].keys()
    assert "router_aux_loss" not in rows[0]
    assert "router_aux_loss" in (tmp_path / "runs" / "base" / "metrics.jsonl").read_text()

    verb("export", "run=adapted")  # compares logits with the trained model
    verb("export", "run=adapted", "what=adapter", "out=adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "adapted" / "export")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    before, after = weights(base), weights(tmp_path / "runs" / "adapted" / "export")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # As published files have them, one matrix for each expert.
    parts = {name.split(".experts.")[1].partition(".")[2] for name in changed if ".experts." in name}
    assert parts == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert not [name for name in changed if ".mlp.gate." in name]

    quantised = [*shared, "tuning=qlora", "zero=3", "hardware.precision=bf16", "optim.steps=2"]
    stderr = verb("train", "run=quantised", *quantised).stderr
    assert "stay in 16 bits" in stderr
    verb("export", "run=quantised", "dtype=fp32")
    after = weights(tmp_path / "runs" / "quantised" / "export")
    assert all((after[name] != before[name].bfloat16().float()).any() for name in before if ".experts." in name)
