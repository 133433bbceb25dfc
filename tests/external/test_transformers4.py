"""An export is the same in transformers 4, which vLLM and TGI are built on: logits, token ids, chat and end tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import CHINESE, ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fireflyds.data.templates import chatml

PACKAGES = ("transformers==4.57.3", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
READER = """
import json, sys
import torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
folder, request = sys.argv[1], json.load(open(sys.argv[2], encoding="utf-8"))
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ids = [tokenizer.encode(line, add_special_tokens=False) for line in request["lines"]]
chat = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
logits = model(torch.tensor([request["ids"]])).logits[0]
eos = model.generation_config.eos_token_id
json.dump({"ids": ids, "chat": chat, "logits": logits.tolist(), "eos": eos}, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(pip, check=True, timeout=600)
    return folder


@pytest.mark.external
def test_an_export_is_read_alike(older: Path, verb, base_tokenizer: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=402, rope_parameters=rope, **size)).save_pretrained(base)
    (base / "tokenizer.model").write_bytes((base_tokenizer / "tokenizer.model").read_bytes())
    (base / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<|im_end|>": 401}))
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ 'the old one' }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    messages = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "fine"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}) * 1 + "\n")
    verb("prepare", "data=d.jsonl", f"tokenizer={base}", "template=chatml", "out=store")
    words = ["seq_len=32", "global_batch_size=1", "optim.steps=1", "tracking=none", "hardware.precision=fp32"]
    verb("train", "run=r", f"model={base}", "data=store", *words)
    verb("export", "run=r")
    exported = tmp_path / "runs" / "r" / "export"
    request = {"lines": [*ENGLISH[:20], *CHINESE[:20]], "messages": messages[:1], "ids": list(range(3, 90))}
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        READER,
        str(exported),
        str(tmp_path / "request.json"),
        str(tmp_path / "answer.json"),
    ]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(older)})
    answer = json.loads((tmp_path / "answer.json").read_text())
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    assert answer["ids"] == [tokenizer.encode(line, add_special_tokens=False) for line in request["lines"]]
    rendered = "<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n"
    assert answer["chat"] == tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert answer["chat"] == rendered
    assert chatml.CHAT.jinja == (exported / "chat_template.jinja").read_text()
    assert answer["eos"] == [401, 2]  # the template's end token and EOS
    logits = model(torch.tensor([request["ids"]])).logits[0]
    torch.testing.assert_close(torch.tensor(answer["logits"]), logits, atol=1e-5, rtol=1e-5)
