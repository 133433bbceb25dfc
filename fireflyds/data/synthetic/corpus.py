"""Writes the generated corpus: documents, held-out documents, dialogues and questions."""

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fireflyds.data.synthetic.language import Language
from fireflyds.data.synthetic.world import Entity, Fact, write_documents
from fireflyds.errors import UserError

NUM_CHOICES = 4


def documents_until(documents: Iterator[str], num_bytes: int) -> Iterator[str]:
    """Yields documents until their UTF-8 length reaches `num_bytes`."""
    written = 0
    while written < num_bytes:
        document = next(documents)
        written += len(document.encode())
        yield document


def write_language(
    language: Language, world: list[Entity], folder: Path, *, num_bytes: int, heldout: int, rng: random.Random
) -> None:
    """Writes `<code>.jsonl` for training and `<code>_heldout.jsonl` for evaluation."""
    documents = write_documents(language, world, rng)
    write_jsonl(folder / f"{language.code}_heldout.jsonl", ({"text": text} for text in islice(documents, heldout)))
    write_jsonl(folder / f"{language.code}.jsonl", ({"text": text} for text in documents_until(documents, num_bytes)))


def split_facts(world: list[Entity], num_questions: int, rng: random.Random) -> tuple[list[Fact], list[Fact]]:
    """Splits the facts into those of the evaluation questions and those of the dialogues; no fact is in both.

    Raises:
        UserError: fewer facts than questions, or none left for dialogues.
    """
    facts = [fact for entity in world for fact in entity.facts]
    if num_questions >= len(facts):
        raise UserError(
            f"the world has {len(facts)} facts, and dialogues need some too",
            key="num_questions",
            value=num_questions,
            remedy="Give fewer, or more num_entities",
        )
    rng.shuffle(facts)
    return facts[:num_questions], facts[num_questions:]


def questions(facts: Iterable[Fact], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields multiple-choice questions: the correct answer among other values of the same relation."""
    for fact in facts:
        others = rng.sample([value for value in fact.relation.values if value != fact.value], NUM_CHOICES - 1)
        choices = [fact.answer(value) for value in (fact.value, *others)]
        rng.shuffle(choices)
        yield {
            "question": rng.choice(fact.relation.questions).format(e=fact.entity),
            "choices": choices,
            "answer": choices.index(fact.answer()),
        }


def dialogues(language: Language, facts: list[Fact], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields multi-turn dialogues that use every question of every fact once, mixed with small talk."""
    asked = [(question.format(e=fact.entity), fact.answer()) for fact in facts for question in fact.relation.questions]
    rng.shuffle(asked)
    while asked:
        turns = []
        if rng.random() < 0.3:
            turns.append(rng.choice(language.small_talk))
        for _ in range(min(len(asked), rng.randint(1, 3))):
            question, answer = asked.pop()
            if turns:
                question = rng.choice(language.follow_up).format(q=question)
            turns.append((question, answer))
        yield {"conversation": [{"human": human, "assistant": assistant} for human, assistant in turns]}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, in UTF-8."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
