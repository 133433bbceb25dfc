"""New rows: the mean of the piece's own old tokens, and nothing else changed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fireflyds.config import RowInit
from fireflyds.errors import UserError
from fireflyds.tokenizer.encoder import SentencePieceEncoder
from fireflyds.tokenizer.rows import expand_model, new_rows, old_ids_of


def test_old_ids_hold_neither_bos_nor_the_dummy_prefix(encoder: SentencePieceEncoder) -> None:
    ids = old_ids_of(["河"], encoder)[0]
    assert [encoder.token_id(f"<0x{byte:02X}>") for byte in "河".encode()] == ids


def test_mean_rows_are_means_of_old_rows() -> None:
    weight = torch.randn(10, 4)
    rows = new_rows(weight, [[1, 2], [3]], RowInit.mean, seed=0)
    torch.testing.assert_close(rows, torch.stack([(weight[1] + weight[2]) / 2, weight[3]]))


def test_random_rows_have_the_old_rows_mean_and_spread_and_are_deterministic() -> None:
    weight = torch.randn(500, 4) * 3 + 5
    rows = new_rows(weight, [[0]] * 4000, RowInit.random, seed=1)
    torch.testing.assert_close(rows.mean(0), weight.mean(0), atol=0.3, rtol=0)
    torch.testing.assert_close(rows.std(0), weight.std(0), atol=0.3, rtol=0)
    assert torch.equal(rows, new_rows(weight, [[0]] * 4000, RowInit.random, seed=1))


@pytest.mark.parametrize("tied", [False, True])
def test_expanded_model_keeps_its_old_logits(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    counts = expand_model(tmp_path / "base", tmp_path / "out", 40, [[3, 4], [5]], RowInit.mean, 0)
    assert counts["parameters_after"] - counts["parameters_before"] == 2 * 16 * (1 if tied else 2)
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 42
    ids = torch.randint(0, 40, (1, 12))
    torch.testing.assert_close(new(ids).logits[..., :40], old(ids).logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(new.model.embed_tokens.weight[40], old.model.embed_tokens.weight[3:5].mean(0))


def test_rows_that_disagree_with_the_config_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 40', '"vocab_size": 39'))
    with pytest.raises(UserError, match=r"has 40 rows but config.json says vocab_size=39"):
        expand_model(tmp_path, tmp_path / "out", 39, [[1]], RowInit.mean, 0)
