"""Both kinds of encoder give the same ids, added tokens are known, and text that spells a special token is text."""

import json
import shutil
from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH
from transformers import AutoTokenizer

from fireflyds.data.encode import encode_document
from fireflyds.errors import UserError
from fireflyds.tokenizer.directory import copy_tokenizer
from fireflyds.tokenizer.encoder import FastEncoder, SentencePieceEncoder, load_encoder


@pytest.fixture
def fast_only(base_tokenizer: Path, tmp_path: Path) -> Path:
    shutil.copytree(base_tokenizer, tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").unlink()
    return tmp_path / "fast"


def test_fast_and_sentencepiece_agree_in_the_middle_of_text_too(base_tokenizer: Path, fast_only: Path) -> None:
    ours, fast = load_encoder(base_tokenizer), load_encoder(fast_only)
    assert isinstance(fast, FastEncoder)
    assert (fast.vocab_size, fast.bos_id, fast.eos_id) == (ours.vocab_size, ours.bos_id, ours.eos_id)
    for text in [*ENGLISH[:10], *CHINESE[:10], " by", "by"]:
        for continues in (False, True):
            assert fast.encode(text, continues=continues) == ours.encode(text, continues=continues), text


def test_text_that_spells_a_special_token_is_text(base_tokenizer: Path, fast_only: Path) -> None:
    for encoder in (load_encoder(base_tokenizer), load_encoder(fast_only)):
        assert encoder.eos_id not in encoder.encode("a </s> b")


def test_added_tokens_have_their_ids(base_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(base_tokenizer / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<|im_end|>": 401}))
    encoder = load_encoder(tmp_path)
    assert encoder.token_id("<|im_end|>") == 401
    assert encoder.vocab_size == 402
    assert encoder.token_id("<|other|>") is None


def test_a_bare_model_becomes_a_directory_with_the_same_ids(base_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copy_tokenizer(base_tokenizer / "tokenizer.model", tmp_path / "out")
    ours, theirs = load_encoder(base_tokenizer), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ENGLISH[:5] + CHINESE[:5]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"nonsense")
    for path, words in ((tmp_path, "neither tokenizer.model nor tokenizer.json"), (tmp_path / "x.model", "not a SentencePiece model"),
                        (tmp_path / "y", "no such file or directory")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_encoder(path)


def test_fingerprints_tell_tokenizers_apart(base_tokenizer: Path, fast_only: Path) -> None:
    first = load_encoder(base_tokenizer)
    assert isinstance(first, SentencePieceEncoder)
    assert first.fingerprint() == load_encoder(base_tokenizer / "tokenizer.model").fingerprint()
    assert first.fingerprint() != load_encoder(fast_only).fingerprint()


@pytest.mark.parametrize("fast", [False, True])
def test_documents_begin_with_bos_only_where_the_tokenizer_does_so(
    base_tokenizer: Path, tmp_path: Path, fast: bool
) -> None:
    folder = tmp_path / "t"
    shutil.copytree(base_tokenizer, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if fast:
        (folder / "tokenizer.model").unlink()
    encoder = load_encoder(folder)
    assert load_encoder(base_tokenizer).adds_bos
    assert not encoder.adds_bos
    assert encode_document(encoder, "the ships").input_ids.tolist() == [*encoder.encode("the ships"), encoder.eos_id]
    assert encoder.fingerprint() != load_encoder(base_tokenizer).fingerprint()
