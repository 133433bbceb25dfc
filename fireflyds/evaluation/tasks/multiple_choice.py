"""Multiple choice by likelihood: the answer is the choice whose text is likeliest after the question."""

import json
from itertools import islice
from pathlib import Path

from fireflyds.config import MultipleChoiceConfig
from fireflyds.data.read.files import read_records
from fireflyds.data.read.records import RawRecord, RejectedRow
from fireflyds.errors import UserError
from fireflyds.evaluation.scorer import EvaluatedModel, continuation_losses
from fireflyds.evaluation.tasks import EvaluationTask


def evaluate(model: EvaluatedModel, options: MultipleChoiceConfig, limit: int | None) -> dict[str, float]:
    """`accuracy`, `chance` and `questions`."""
    questions = _read(options, limit)
    correct = 0
    for question, choices, answer in questions:
        prompt = model.prompt_ids(question)
        continues = model.chat_tokenizer is None
        losses = continuation_losses(
            model, prompt, [model.encoder.encode(choice, continues=continues) for choice in choices]
        )
        correct += losses.index(min(losses)) == answer
    chance = sum(1 / len(choices) for _, choices, _ in questions) / len(questions)
    return {"accuracy": correct / len(questions), "chance": chance, "questions": len(questions)}


def _read(options: MultipleChoiceConfig, limit: int | None) -> list[tuple[str, list[str], int]]:
    path = Path(options.questions)
    if not path.is_file():
        raise UserError(
            "no such file",
            key="multiple_choice.questions",
            value=f"{options.questions!r}",
            remedy="The task needs JSON lines with question, choices, answer",
        )
    rows = []
    for record in islice(read_records(path), limit):
        fields = record.fields if isinstance(record, RawRecord) else None
        match fields:
            case {"question": str(question), "choices": [_, _, *_] as choices, "answer": int(answer)} if (
                0 <= answer < len(choices) and all(isinstance(choice, str) and choice for choice in choices)
            ):
                rows.append((question, choices, answer))
            case _:
                description = (
                    record.reason
                    if isinstance(record, RejectedRow)
                    else json.dumps(record.fields, ensure_ascii=False)[:100]
                )
                raise UserError(
                    f"{description}: a row needs question (text), choices (two or more) and answer (index)",
                    key=f"{record.file}:{record.line}",
                    remedy="Correct the row, or remove it",
                )
    if not rows:
        raise UserError(
            "no question in it", key="multiple_choice.questions", value=path, remedy="Give a file with rows"
        )
    return rows


TASK = EvaluationTask(
    protocol="choice_text_likelihood",
    source="sum of the token log-likelihoods of each choice's text, not normalised by its length",
    evaluate=evaluate,
)
