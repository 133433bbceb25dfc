"""Both kinds of encoder give the same ids, added tokens are known, and text that spells a special token is text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from bases import KINDS
from samples import CHINESE, ENGLISH
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fireflyds.data.encode import encode_document
from fireflyds.errors import UserError
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.fast_encoder import FastEncoder
from fireflyds.tokenizer.hf_files import copy_tokenizer
from fireflyds.tokenizer.sentencepiece_encoder import SentencePieceEncoder


@pytest.fixture
def fast_only(base_tokenizer: Path, tmp_path: Path) -> Path:
    shutil.copytree(base_tokenizer, tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").unlink()
    return tmp_path / "fast"


def test_fast_and_sentencepiece_encoders_give_equal_ids(base_tokenizer: Path, fast_only: Path) -> None:
    reference, fast = load_encoder(base_tokenizer), load_encoder(fast_only)
    assert isinstance(fast, FastEncoder)
    assert (fast.vocab_size, fast.bos_id, fast.eos_id) == (reference.vocab_size, reference.bos_id, reference.eos_id)
    for text in [*ENGLISH[:10], *CHINESE[:10], " by", "by"]:
        for continues in (False, True):
            assert fast.encode(text, continues=continues) == reference.encode(text, continues=continues), text


def test_text_that_spells_a_special_token_is_encoded_as_text(base_tokenizer: Path, fast_only: Path) -> None:
    for encoder in (load_encoder(base_tokenizer), load_encoder(fast_only)):
        assert encoder.eos_id not in encoder.encode("a </s> b")


def test_added_tokens_have_their_ids(base_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(base_tokenizer / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400, "<|im_end|>": 401}))
    encoder = load_encoder(tmp_path)
    assert encoder.token_id("<|im_end|>") == 401
    assert encoder.vocab_size == 402
    assert encoder.token_id("<|other|>") is None


def test_a_copied_sentencepiece_model_gives_the_same_ids_in_transformers(base_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copy_tokenizer(base_tokenizer / "tokenizer.model", tmp_path / "out")
    encoder, hf_tokenizer = load_encoder(base_tokenizer), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ENGLISH[:5] + CHINESE[:5]:
        assert hf_tokenizer.encode(text, add_special_tokens=False) == encoder.encode(text)


def test_invalid_tokenizer_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"nonsense")
    for path, message in (
        (tmp_path, "neither tokenizer.model nor tokenizer.json"),
        (tmp_path / "x.model", "not a SentencePiece model"),
        (tmp_path / "y", "no such file or directory"),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder(path)


# Text outside the vocabulary, spelled special tokens, runs of spaces, characters of the byte table, empty text.
EDGE_CASES = [
    "\ud55c\uae00 \U0001f98a\u0301",
    "a </s> <|begin|> b",
    "  two  spaces \n\n\tand lines\r\n",
    "é",
    "Ġ <0x41>",
    "x",
    "",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_sum_to_those_of_the_text(kind: str, tmp_path: Path) -> None:
    encoder = load_encoder(KINDS[kind](tmp_path / "base"))
    table = encoder.token_bytes()
    assert (table.dtype, table.shape) == (np.int32, (encoder.vocab_size,))
    # What SentencePiece puts before a text counts as the space it is.
    prefix = int(kind in ("sentencepiece", "json_only"))
    for text in [*ENGLISH, *CHINESE, *EDGE_CASES]:
        if text:
            assert table[encoder.encode(text)].sum() == len(text.encode()) + prefix, text
            assert table[encoder.encode(text, continues=True)].sum() == len(text.encode()), text
    for index in (encoder.bos_id, encoder.eos_id):
        assert index is not None
        assert table[index] == 0
    assert (table >= 0).all()
    if prefix:
        assert all(table[index] == 1 for index in encoder.fragments())


def test_special_added_tokens_have_no_bytes_and_others_have(base_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(base_tokenizer / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 400}))
    assert load_encoder(tmp_path).token_bytes().tolist()[400:] == [0]
    shutil.copy(base_tokenizer / "tokenizer.json", tmp_path)
    shutil.copy(base_tokenizer / "tokenizer_config.json", tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"] += [
        {"id": 400, "content": "<|im_start|>", "special": True, **flags},
        {"id": 401, "content": "小説", "special": False, **flags},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "added_tokens.json").unlink()
    fast = load_encoder(tmp_path)
    assert fast.token_bytes().tolist()[400:] == [0, 6]
    assert fast.token_bytes()[fast.encode("小説", continues=True)].sum() == 6


def test_fingerprints_distinguish_tokenizers(base_tokenizer: Path, fast_only: Path) -> None:
    encoder = load_encoder(base_tokenizer)
    assert isinstance(encoder, SentencePieceEncoder)
    assert encoder.fingerprint() == load_encoder(base_tokenizer / "tokenizer.model").fingerprint()
    assert encoder.fingerprint() != load_encoder(fast_only).fingerprint()


@pytest.mark.parametrize("fast", [False, True])
def test_documents_begin_with_bos_only_if_the_tokenizer_adds_it(
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


def test_special_tokens_named_in_the_settings_count_before_those_of_the_model(
    base_tokenizer: Path, tmp_path: Path
) -> None:
    """Phi-3: documents end with an added token, not with the model's `</s>`."""
    folder = tmp_path / "phi"
    shutil.copytree(base_tokenizer, folder)
    size = load_encoder(base_tokenizer).vocab_size
    file = folder / "tokenizer_config.json"
    token = {"content": "<|endoftext|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    settings = json.loads(file.read_text()) | {"eos_token": token, "added_tokens_decoder": {str(size): token}}
    file.write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    encoder, plain = load_encoder(folder), load_encoder(base_tokenizer)
    assert encoder.eos_id == size
    assert (encoder.bos_id, plain.eos_id) == (plain.bos_id, 2)
    assert encode_document(encoder, "hi").input_ids[-1] == size
    assert encoder.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_text_that_continues_other_text_keeps_its_newlines(tmp_path: Path, dummy_prefix: bool) -> None:
    """Also where newlines are pieces of their own, as in Gemma, or merge with the text after them."""
    (tmp_path / "corpus.txt").write_text("\n".join([*ENGLISH, *CHINESE]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\n\n"],
    )
    encoder = load_encoder(tmp_path / "m.model")
    for text in ("\n\nok", "\nok", "ok", "\n", "\n\n\nthe old bridge\n", "青岭镇\n"):
        assert encoder.decode(encoder.encode(text, continues=True)) == text
    assert encoder.encode("the", continues=True) != encoder.encode("the") or not dummy_prefix


def test_tiktoken_ranks_give_way_to_a_tokenizer_json(fast_only: Path) -> None:
    expected = load_encoder(fast_only).fingerprint()
    (fast_only / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert load_encoder(fast_only).fingerprint() == expected
    (fast_only / "tokenizer.json").unlink()
    for path in (fast_only, fast_only / "tokenizer.model"):
        with pytest.raises(
            UserError, match=r"tokenizer.model: holds tiktoken's ranks, .* Convert the model with launch/convert.py"
        ):
            load_encoder(path)


def test_limits_of_a_tokenizer_json_are_switched_off(fast_only: Path, tmp_path: Path) -> None:
    text = "the old harbour " * 300
    expected = load_encoder(fast_only).encode(text)
    limited = tmp_path / "limited"
    shutil.copytree(fast_only, limited)
    tokenizer = Tokenizer.from_file(str(limited / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=8192)
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(limited / "tokenizer.json"))
    encoder = load_encoder(limited)
    assert encoder.encode(text) == expected
    assert encoder.encode_batch([text, "a"])[0] == expected
    assert encoder.fingerprint() == load_encoder(fast_only).fingerprint()
    (tmp_path / "out").mkdir()
    copy_tokenizer(limited, tmp_path / "out")
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text, add_special_tokens=False).ids == (
        expected
    )
