"""New rows from a donor model: sums of common tokens carry over to a base with rows of another width."""

from pathlib import Path

import pytest
import torch
from bases import KINDS
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fireflyds.config import ExpandConfig, RowInit
from fireflyds.errors import UserError
from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.donor import check_donor, donor_rows, matching_pursuit
from fireflyds.tokenizer.encoder import load_encoder

TEXTS = ["河流", "山", "大海"]


def save_model(folder: Path, embeddings: torch.Tensor, head: torch.Tensor | None = None) -> None:
    """A LLaMA in the folder of its tokenizer, with the given rows."""
    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(
        vocab_size=len(embeddings), hidden_size=embeddings.shape[1], tie_word_embeddings=head is None, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file) | {"model.embed_tokens.weight": embeddings.contiguous()}
    save_file(weights | ({} if head is None else {"lm_head.weight": head.contiguous()}), file, {"format": "pt"})


@pytest.fixture(params=["sentencepiece", "byte_level"])
def models(request, tmp_path: Path, verbs_of):
    """A base with rows of 128 values, and a donor with rows of 160, in which the base's rows are turned."""
    torch.manual_seed(0)
    base = KINDS[request.param](tmp_path / "base")
    pieces = tmp_path / "pieces.txt"
    pieces.write_text("\n".join(TEXTS), encoding="utf-8")
    ended = verbs_of(tmp_path)(
        "expand", f"base={base}", f"pieces={pieces}", f"out={tmp_path / 'donor'}", "vocab_multiple=1"
    )
    assert ended.returncode == 0, ended.stderr
    num_old = load_base(base).num_tokens
    num_new = load_encoder(tmp_path / "donor").vocab_size - num_old
    rows = torch.randn(num_old, 128)
    turn = torch.linalg.qr(torch.randn(160, 128))[0].T
    return base, tmp_path / "donor", rows, turn, num_new


def test_a_sum_of_common_tokens_is_the_same_sum_of_the_bases_rows(models) -> None:
    base, donor, rows, turn, num_new = models
    encoder = load_encoder(base)
    usable = [index for index in range(260, len(rows)) if index not in encoder.fragments()]
    parts = torch.tensor([usable[3 * number : 3 * number + 3] for number in range(num_new)])
    factors = torch.rand(num_new, 3) + 0.5
    new = (factors[:, :, None] * rows[parts]).sum(1)
    head_factors = torch.rand(num_new, 3) - 2
    new_head = (head_factors[:, :, None] * rows[parts]).sum(1)
    save_model(donor, torch.cat([rows, new]) @ turn, torch.cat([rows, new_head]) @ turn)
    donor_encoder = load_encoder(donor)
    fragments = donor_encoder.fragments()  # byte-level pieces that are parts of characters have no text
    is_text = torch.tensor([len(rows) + number not in fragments for number in range(num_new)])
    texts = [donor_encoder.token(len(rows) + number) if is_text[number] else None for number in range(num_new)]
    donated = donor_rows(donor, encoder, texts, num_terms=8)
    assert donated.embeddings.known.tolist() == is_text.tolist()
    assert donated.counts["single"] == int(is_text.sum()) >= len(TEXTS)
    assert donated.counts["none"] == num_new - int(is_text.sum())
    torch.testing.assert_close(donated.embeddings.of(rows)[is_text], new[is_text], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(donated.head.of(rows)[is_text], new_head[is_text], atol=2e-3, rtol=1e-3)


def test_matching_pursuit_fits_all_weights_anew_with_every_term() -> None:
    torch.manual_seed(1)
    points, targets = torch.randn(200, 16), torch.randn(5, 16)
    left = []
    for terms in (1, 2, 4, 8, 16):
        chosen, weights = matching_pursuit(points, targets, terms)
        assert all(len(set(row)) == terms for row in chosen.tolist())
        for row, chosen_row, weights_row in zip(targets, chosen, weights, strict=True):
            best = torch.linalg.lstsq(points[chosen_row].T, row[:, None]).solution[:, 0]
            torch.testing.assert_close(weights_row, best, atol=1e-2, rtol=1e-2)
        left.append(float((targets - (weights[:, None, :] @ points[chosen])[:, 0]).norm()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-2 * left[0]
    # The first term is the row with the closest direction.
    cosines = torch.nn.functional.normalize(targets) @ torch.nn.functional.normalize(points).T
    assert matching_pursuit(points, targets, 1)[0][:, 0].tolist() == cosines.abs().argmax(1).tolist()


def test_init_omp_and_a_donor_belong_together() -> None:
    for options in ({"init": RowInit.omp}, {"donor": "models/qwen"}):
        with pytest.raises(UserError, match="init=omp and donor belong together"):
            ExpandConfig(base="b", out="o", corpus="c", num_pieces=10, **options)


def test_a_donor_without_weights_and_a_base_without_rows_are_refused_at_once(tmp_path: Path) -> None:
    base = KINDS["byte_level"](tmp_path / "base")
    with pytest.raises(UserError, match="donor=.*is a tokenizer alone, which has no rows to make. Give the directory"):
        check_donor(base, base)
    (base / "config.json").write_text("{}", encoding="utf-8")
    for donor in (base, tmp_path / "none"):
        with pytest.raises(
            UserError, match="donor=.*is no model with a tokenizer.*Give the directory of a whole model"
        ):
            check_donor(donor, base)
