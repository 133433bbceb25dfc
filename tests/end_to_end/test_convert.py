"""A checkpoint in its maker's layout becomes a directory that plain transformers reads, with tokenizer and template."""

import json
import shutil
from pathlib import Path

import torch
from original_others import OTHERS
from safetensors.torch import save_file
from samples import CHINESE, ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer

from fireflyds.tokenizer.encoder import load_encoder


def save_original(folder: Path, tokenizer: Path) -> torch.Tensor:
    """Saves an InternLM2 with a tokenizer whose class is code beside it; returns the logits of `[[5, 6, ... 39]]`."""
    encoder, layout = load_encoder(tokenizer), OTHERS["internlm2"]
    folder.mkdir()
    shutil.copy2(tokenizer / "tokenizer.model", folder)
    settings = {"tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    code = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": code}))
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('never run')")
    config = layout.config() | {"vocab_size": encoder.vocab_size, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = layout.weights(config, torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return layout.logits(config, weights, torch.arange(5, 40)[None])


def test_an_original_is_converted_with_its_tokenizer(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    expected = save_original(tmp_path / "original", base_tokenizer)
    refused = verb("train", "run=x", "model=original", "data=none", "optim.steps=1", check=False)
    assert refused.returncode != 0
    untemplated = verb("convert", "model=original", "out=plain").stdout
    assert "for a chat model give template=internlm2" in untemplated
    # The second run replaces the folder.
    assert "llama from internlm2" in verb("convert", "model=original", "out=plain", "template=vicuna").stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        logits = model(torch.arange(5, 40)[None]).logits
    assert float((logits - expected).abs().max()) < 5e-6 * float(expected.abs().max())
    tokenizer, encoder = AutoTokenizer.from_pretrained(tmp_path / "plain"), load_encoder(base_tokenizer)
    for text in (*CHINESE[:3], *ENGLISH[:3]):
        assert tokenizer.encode(text, add_special_tokens=False) == encoder.encode(text)
    assert "USER: Hi" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert not list((tmp_path / "plain").glob("*.py"))

    kept = (tmp_path / "original/config.json").read_bytes()
    for arguments, message in (
        (["out=original"], "is the checkpoint to convert"),
        (["model=plain", "out=other"], "model_type=llama is not converted"),
    ):
        failed = verb("convert", "model=original", *arguments, check=False)
        assert failed.returncode == 2
        assert message in failed.stderr
    assert (tmp_path / "original/config.json").read_bytes() == kept
    assert not (tmp_path / "other").exists()
