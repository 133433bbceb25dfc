"""Ranks of tiktoken give, as `tokenizer.json`, the ids of the byte-level tokenizer that they were written from."""

import base64
import json
from itertools import pairwise
from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH
from tokenizers import Tokenizer

from fireflyds.errors import UserError
from fireflyds.models.convert.tokenizer import write_tokenizer_of
from fireflyds.tokenizer.byte_level import byte_values
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.learn import learn_byte_level
from fireflyds.tokenizer.tiktoken_ranks import fast_tokenizer

TEXTS = [*ENGLISH[:20], *CHINESE[:20], "x = 12345;\n\tif (x) {}  ", "Ünïcode 🙂 end", ""]
PATTERN = r"[^\s]+|\s+"


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    """Byte strings of a learned vocabulary in the order of its merges, single bytes first."""
    learned = learn_byte_level([*ENGLISH, *CHINESE], vocab_size=600, max_piece_length=16)
    values = byte_values()
    merged = [bytes(values[c] for c in "".join(pair)) for pair in learned["model"]["merges"]]
    return [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(token for token in merged if len(token) > 1)]


def write_ranks(file: Path, tokens: list[bytes]) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    file.write_text("\n".join(lines) + "\n")
    return file


def ids_by_rank(text: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as tiktoken describes it: of all neighbours that are a token, merge the one of lowest rank."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not known:
            return [ranks[part] for part in parts]
        _, place = min(known)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_ids_are_those_of_merging_by_rank(tokens: list[bytes], tmp_path: Path) -> None:
    document = fast_tokenizer(write_ranks(tmp_path / "ranks", tokens), PATTERN, ["<|end|>"])
    tokenizer = Tokenizer.from_str(json.dumps(document))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for text in TEXTS:
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        values = byte_values()
        expected = [i for word in words for i in ids_by_rank(bytes(values[c] for c in word), ranks)]
        assert tokenizer.encode(text).ids == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("<|end|>").ids == [len(tokens)]


@pytest.mark.parametrize(("kind", "name"), [("qwen", "qwen.tiktoken"), ("Meta's files", "tokenizer.model")])
def test_the_makers_special_tokens_follow_the_ranks(kind: str, name: str, tokens: list[bytes], tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"model_type": "qwen2" if kind == "qwen" else "llama"}))
    write_ranks(base / name, tokens)
    assert write_tokenizer_of(base, out, kind)
    encoder = load_encoder(out)
    first = len(tokens)
    if kind == "qwen":
        assert encoder.eos_id == first
        assert (encoder.token(first + 2), encoder.token(first + 207)) == ("<|im_end|>", "<|extra_204|>")
        assert not encoder.adds_bos
        assert len(encoder.encode("2024 3")) == 6  # every digit by itself
    else:
        assert (encoder.bos_id, encoder.eos_id) == (first, first + 1)
        assert (encoder.token(first + 9), encoder.vocab_size) == ("<|eot_id|>", first + 256)
        assert encoder.adds_bos
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(("line", "message"), [("no base64! 3", "line 3 is not a token"), ("YWI= 9", "are missing")])
def test_damaged_ranks_are_refused(line: str, message: str, tokens: list[bytes], tmp_path: Path) -> None:
    file = write_ranks(tmp_path / "ranks", tokens[:258])
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(UserError, match=message):
        fast_tokenizer(file, PATTERN, [])
