"""Pieces are learned only from text of the given scripts, after the merges of the base."""

import json
from collections import Counter
from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH

from fireflyds.config import PieceAlgorithm
from fireflyds.errors import UserError
from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.fast_encoder import FastEncoder
from fireflyds.tokenizer.learn import common_characters, count_words, learn_byte_level, learn_pieces
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.vocabulary_merge import plan_merge

SCRIPTS = Scripts(["Han", "CJK_Punctuation"])


@pytest.mark.parametrize("algorithm", list(PieceAlgorithm))
def test_learned_pieces_are_within_the_script_and_length_limits(algorithm, base_tokenizer: Path) -> None:
    base, words = load_base(base_tokenizer), count_words(CHINESE, SCRIPTS)
    encoder = base.encoder(plan_merge(base, common_characters(words, SCRIPTS, 1), SCRIPTS).steps)
    pieces = learn_pieces(words, encoder, algorithm=algorithm, num_pieces=80, max_piece_length=3)
    assert len(pieces) > 10
    assert len(set(pieces)) == len(pieces)
    for piece in pieces:
        assert 2 <= len(piece) <= 3
        assert Scripts(["Han"]).covers(piece)


def test_words_are_counted() -> None:
    assert count_words(["河流，河流a山", "河流"], SCRIPTS) == Counter({"河流": 3, "，": 1, "山": 1})


def test_rare_characters_stay_with_byte_fallback() -> None:
    words = Counter({"河": 10_000, "流": 9_000, "龘": 1})
    assert common_characters(words, SCRIPTS, 1) == ["河", "流"]
    assert common_characters(words, SCRIPTS, 9_500) == ["河"]


def test_no_piece_contains_a_byte_fallback_character(base_tokenizer: Path) -> None:
    base, words = load_base(base_tokenizer), Counter({"河流龘山川": 100, "河流": 50})
    encoder = base.encoder(plan_merge(base, list("河流山川"), SCRIPTS).steps)
    pieces = learn_pieces(words, encoder, algorithm=PieceAlgorithm.bpe, num_pieces=10, max_piece_length=8)
    assert sorted(pieces) == ["山川", "河流"]


def test_a_corpus_without_the_script_is_refused() -> None:
    with pytest.raises(UserError, match="no Han or CJK_Punctuation text in it to learn pieces from"):
        count_words(ENGLISH, SCRIPTS)


def test_a_byte_level_tokenizer_round_trips_every_text() -> None:
    document = learn_byte_level(ENGLISH, vocab_size=420, max_piece_length=12)
    encoder = FastEncoder(json.dumps(document))
    for text in [*ENGLISH[:3], *CHINESE[:3], "\tx  =  1\r\n", "🐉"]:
        assert encoder.decode(encoder.encode(text)) == text
    assert len(encoder.encode(ENGLISH[0])) < 0.5 * len(ENGLISH[0])
