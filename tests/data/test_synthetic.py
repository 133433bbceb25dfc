"""The generated corpus is deterministic and large enough, and only its documents answer its questions."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def corpus(verb, tmp_path: Path) -> Path:
    verb("synthesize", "out=corpus")
    return tmp_path / "corpus"


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_corpus_is_deterministic_and_of_the_documented_size(corpus: Path, verb, tmp_path: Path) -> None:
    verb("synthesize", "out=again")
    for file in corpus.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert sum(len(row["text"].encode()) for row in _rows(corpus / "zh.jsonl")) >= 2_000_000
    assert sum(len(row["text"].encode()) for row in _rows(corpus / "en.jsonl")) >= 1_000_000


def test_questions_are_answered_by_documents_and_never_by_dialogues(corpus: Path) -> None:
    questions = _rows(corpus / "questions.jsonl")
    assert len(questions) >= 200
    documents = (corpus / "zh.jsonl").read_text(encoding="utf-8")
    dialogues = (corpus / "dialogues.jsonl").read_text(encoding="utf-8")
    for row in questions:
        correct_choice = row["choices"][row["answer"]]
        assert correct_choice in documents
        assert correct_choice not in dialogues
        assert row["question"] not in dialogues
        for index, choice in enumerate(row["choices"]):
            assert index == row["answer"] or choice not in documents


def test_answers_are_spread_over_positions_and_dialogues_have_several_turns(corpus: Path) -> None:
    positions = [row["answer"] for row in _rows(corpus / "questions.jsonl")]
    assert all(positions.count(position) > 30 for position in range(4))
    assert max(len(row["conversation"]) for row in _rows(corpus / "dialogues.jsonl")) >= 3


def test_held_out_documents_are_not_trained_on(corpus: Path) -> None:
    for language in ("zh", "en"):
        heldout_texts = {row["text"] for row in _rows(corpus / f"{language}_heldout.jsonl")}
        assert len(heldout_texts) > 100
        assert not heldout_texts & {row["text"] for row in _rows(corpus / f"{language}.jsonl")}


def test_a_user_corpus_replaces_the_generated_chinese(verb, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("".join(f"第{number}篇文章。\n" for number in range(100)), encoding="utf-8")
    verb("synthesize", "out=corpus", "corpus=own.txt")
    assert len(_rows(tmp_path / "corpus" / "zh.jsonl")) == 95
    assert len(_rows(tmp_path / "corpus" / "zh_heldout.jsonl")) == 5
