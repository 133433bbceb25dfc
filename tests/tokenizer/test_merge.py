"""A merged vocabulary leaves old text alone, reaches every new piece, and gives everything back."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import CHINESE, ENGLISH

from fireflyds.errors import UserError
from fireflyds.tokenizer.directory import ties
from fireflyds.tokenizer.learn import has_han, learn_chinese_pieces
from fireflyds.tokenizer.merge import merge, read_pieces, unreachable


@pytest.fixture(scope="module")
def pieces() -> list[str]:
    return learn_chinese_pieces(lambda: CHINESE, num_pieces=80, max_piece_length=4)


@pytest.fixture(scope="module")
def old(base_tokenizer: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(base_tokenizer / "tokenizer.model"))


@pytest.fixture(scope="module")
def new(base_tokenizer: Path, pieces: list[str]) -> sentencepiece.SentencePieceProcessor:
    merged = merge((base_tokenizer / "tokenizer.model").read_bytes(), pieces, cure=True, vocab_multiple=64)
    return sentencepiece.SentencePieceProcessor(model_proto=merged.proto.SerializeToString())


def test_learnt_pieces_are_chinese_and_cross_no_punctuation(pieces: list[str]) -> None:
    assert len(pieces) > 40
    assert "，" in pieces
    for piece in pieces:
        assert len(piece) == 1 or all(has_han(character) for character in piece)


def test_old_pieces_keep_their_ids(old, new) -> None:
    for index in range(old.get_piece_size()):
        assert new.id_to_piece(index) == old.id_to_piece(index)


def test_vocabulary_reaches_the_multiple_and_no_piece_is_dead(old, new) -> None:
    assert new.get_piece_size() % 64 == 0
    added = [new.id_to_piece(index) for index in range(old.get_piece_size(), new.get_piece_size())]
    assert len(added) == len(set(added)) > 40
    assert unreachable(new.serialized_model_proto(), added) == []


def test_chinese_takes_fewer_tokens(old, new) -> None:
    text = "".join(CHINESE)
    assert len(new.encode(text)) < 0.4 * len(old.encode(text))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="▁")))
def test_any_string_comes_back(new, text: str) -> None:
    if "\x00" not in text:  # SentencePiece itself stops at NUL
        assert new.decode(new.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(max_codepoint=0x2E7F, blacklist_categories=("Cs",)) | st.sampled_from(list("".join(ENGLISH))))
)
def test_text_without_new_characters_keeps_its_ids(old, new, text: str) -> None:
    assert new.encode(text) == old.encode(text)


def test_a_piece_without_a_path_gets_its_intermediate(base_tokenizer: Path) -> None:
    base = (base_tokenizer / "tokenizer.model").read_bytes()
    merged = merge(base, ["意大利"], cure=True, vocab_multiple=1)
    assert merged.intermediates == ["意大"]
    assert unreachable(merged.proto.SerializeToString(), ["意大利"]) == []
    raw = merge(base, ["意大利"], cure=False, vocab_multiple=1)
    assert unreachable(raw.proto.SerializeToString(), ["意大利"]) == ["意大利"]


def test_cured_scores_are_distinct_and_uncured_ones_tie(base_tokenizer: Path, pieces: list[str]) -> None:
    base = (base_tokenizer / "tokenizer.model").read_bytes()
    assert not ties(merge(base, pieces, cure=True, vocab_multiple=64).proto)
    assert ties(merge(base, pieces, cure=False, vocab_multiple=1).proto)


def test_a_multiple_beyond_all_characters_is_refused(base_tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_multiple=1000000: .* Give a smaller multiple"):
        merge((base_tokenizer / "tokenizer.model").read_bytes(), ["河流"], cure=True, vocab_multiple=1_000_000)


def test_no_intermediate_touches_old_text(base_tokenizer: Path) -> None:
    base = (base_tokenizer / "tokenizer.model").read_bytes()
    merged = merge(base, ["2017年", "年轻"], cure=True, vocab_multiple=1)
    assert all(has_han(piece) for piece in merged.added)
    assert merged.dropped == ["2017年"]


def test_pieces_of_other_scripts_are_dropped_by_the_cure_alone(base_tokenizer: Path) -> None:
    base = (base_tokenizer / "tokenizer.model").read_bytes()
    assert merge(base, ["河流", "xyzzy"], cure=True, vocab_multiple=1).dropped == ["xyzzy"]
    assert "xyzzy" in merge(base, ["河流", "xyzzy"], cure=False, vocab_multiple=1).added
    with pytest.raises(UserError, match="in the base already or were dropped"):
        merge(base, ["xyzzy"], cure=True, vocab_multiple=1)


def test_a_list_with_a_piece_twice_names_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "pieces.txt"
    file.write_text("河流\n山川\n河流\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"pieces.txt:3: piece '河流' stands already in line 1"):
        read_pieces(file)


def test_a_corpus_without_chinese_is_refused() -> None:
    with pytest.raises(UserError, match="no Han text"):
        learn_chinese_pieces(lambda: ENGLISH, num_pieces=50, max_piece_length=4)
