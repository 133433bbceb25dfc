"""What AutoTokenizer loads gives SentencePiece's ids."""

from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH
from transformers import AutoTokenizer

from fireflyds.tokenizer.directory import write_tokenizer
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.learn import learn_chinese_pieces
from fireflyds.tokenizer.merge import merge

CODE = [
    "def f(x):\n    return  x ** 2  # 注释",
    "\tif a:\n\t\tb = 1\n\n",
    "  two  spaces  ",
    "a",
    "",
    "emoji 🐉 and ﷽",
    "全角，标点。",
]


@pytest.fixture(scope="module")
def merged(base_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    pieces = learn_chinese_pieces(lambda: CHINESE, num_pieces=80, max_piece_length=4)
    write_tokenizer(
        merge((base_tokenizer / "tokenizer.model").read_bytes(), pieces, cure=True, vocab_multiple=64).proto, folder
    )
    return folder


def test_auto_tokenizer_agrees_with_sentencepiece(merged: Path) -> None:
    fast, ours = AutoTokenizer.from_pretrained(merged), load_encoder(merged)
    assert len(fast) == ours.vocab_size
    for text in [*ENGLISH, *CHINESE, *CODE, *(a + b for a, b in zip(ENGLISH, CHINESE, strict=False))]:
        if text:
            assert fast.encode(text, add_special_tokens=False) == ours.encode(text), text
            assert fast.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text


def test_auto_tokenizer_puts_bos_in_front_and_knows_its_special_tokens(merged: Path) -> None:
    fast, ours = AutoTokenizer.from_pretrained(merged), load_encoder(merged)
    assert fast.encode("hello")[0] == ours.bos_id == fast.bos_token_id
    assert fast.eos_token_id == ours.eos_id
    assert fast.encode("</s>", add_special_tokens=False) == [ours.eos_id]


def test_text_that_goes_on_has_no_dummy_prefix(merged: Path) -> None:
    ours = load_encoder(merged)
    assert ours.encode("the river") != ours.encode("the river", continues=True)
    assert ours.encode(" the river", continues=True) == ours.encode("the river")
    assert ours.decode([*ours.encode("near"), *ours.encode("by", continues=True)]) == "nearby"
